"""The channel part of a block: a feed-forward net or an expert layer."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from morex.sections.base import NonNegative, Section
from morex.sections.depth import ExpertChoiceConfig, FixedConfig, StepsRouterConfig


class FeedForwardConfig(Section):
    """A feed-forward mixer: `swiglu` and `geglu` have three matrices, `gelu` and `relu` have two. No biases."""

    kind: Literal["swiglu", "geglu", "gelu", "relu"] = "swiglu"
    d_ff: PositiveInt | None = None
    """Hidden width; default: 8/3 d_model rounded up to a multiple of 32 for three matrices, 4 d_model for two."""

    @property
    def is_gated(self) -> bool:
        """Whether there are three matrices, one of them a gate."""
        return self.kind in ("swiglu", "geglu")

    def hidden(self, d_model: int) -> int:
        """Hidden width in a model of width `d_model`."""
        if self.d_ff:
            return self.d_ff
        return -(-8 * d_model // 3 // 32) * 32 if self.is_gated else 4 * d_model

    def twin_width(self, d_model: int) -> int:
        """Hidden width of the swiglu with as many weights: 2/3 of that of a net of two matrices, a multiple of 8."""
        width = self.hidden(d_model)
        return width if self.is_gated else max(1, round(width / 12)) * 8

    def shrunk(self, narrower: Callable[[int], int], d_model: int) -> Self:
        """The same net of another width, for a model of another width than `d_model`."""
        return self.model_copy(update={"d_ff": narrower(self.hidden(d_model))})


class ExpertRouterConfig(Section):
    """Chooses K of E experts for each token: linear, softmax, top-k; weights renormalised for K > 1."""

    experts: PositiveInt = 4
    """Experts E."""
    top_k: PositiveInt = 2
    """Experts that each token visits, K. For K = 1 the probability itself is the weight."""
    balance_weight: NonNegative = 0.01
    """Weight of the Switch balance loss E * sum(load * importance), 1.0 at balance."""
    balance_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the weight of the balance loss rises from 0."""
    z_weight: NonNegative = 0.0
    """Weight of the router z-loss, the mean squared logsumexp of the logits."""
    bias_rate: NonNegative = 0.0
    """Rate u of the loss-free balancing bias, which counts in the choice of experts only; 0 turns it off."""

    @model_validator(mode="after")
    def _chosen(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k {self.top_k} is more than the {self.experts} experts there are; use at most {self.experts}, or "
                "more experts"
            )
        return self


class ExpertsConfig(Section):
    """What the program asks about an expert layer of any kind."""

    kind: str
    router: ExpertRouterConfig = ExpertRouterConfig()

    has_blocks: ClassVar[bool] = False
    """Whether attention and norms like those of a block are part of the layer."""
    has_states: ClassVar[bool] = False
    """Whether a trace has how far each of its `steps` moved a state."""
    routes_every_step: ClassVar[bool] = False
    """Whether each of its `steps` chooses experts anew."""

    @property
    def num_steps(self) -> int:
        """Times that the layer or its experts loop."""
        return int(getattr(self, "steps", 1))

    @property
    def steps_router(self) -> StepsRouterConfig | None:
        """Router that decides how many steps a token takes; None where a layer has none."""
        return None

    def options(self, d_model: int) -> dict[str, Any]:
        """Constructor options of the layer, without its routers."""
        raise NotImplementedError

    def twin_width(self, d_model: int) -> int:
        """Hidden width of the dense twin's swiglu, which has the size of one expert."""
        raise NotImplementedError

    def shrunk(self, narrower: Callable[[int], int], d_model: int) -> Self:
        """The same layer for a model of another width than `d_model`: what is set in `d_ff` and `expert` narrower."""
        small: dict[str, Any] = {}
        d_ff: int | None = getattr(self, "d_ff", None)
        expert: FeedForwardConfig | None = getattr(self, "expert", None)
        if d_ff is not None:
            small["d_ff"] = narrower(d_ff)
        if expert is not None and expert.d_ff is not None:
            small["expert"] = expert.shrunk(narrower, d_model)
        return self.model_copy(update=small)


class MoEConfig(ExpertsConfig):
    """Feed-forward experts."""

    kind: Literal["moe"]
    expert: FeedForwardConfig = FeedForwardConfig()

    def options(self, d_model: int) -> dict[str, Any]:
        return {"expert": self.expert.kind, "d_ff": self.expert.hidden(d_model)}

    def twin_width(self, d_model: int) -> int:
        return self.expert.twin_width(d_model)


class RecursiveExpertsConfig(ExpertsConfig):
    """Experts that are small recursive transformers: each loops `steps` times through attention and swiglu."""

    has_blocks = True

    kind: Literal["recursive"]
    steps: PositiveInt = 3
    """Times S that an expert loops; its weights are shared over the steps."""
    depth: StepsRouterConfig = FixedConfig()
    """Router that decides how many of the steps a token takes in an expert; one for each layer."""
    d_ff: PositiveInt = 256
    """Hidden width of an expert's swiglu."""
    attention_scope: Literal["routed", "token"] = "routed"
    """`routed`: causal attention over the tokens of the sequence that visit the same expert; `token`: only itself."""
    branch: Literal["change", "output"] = "change"
    """What the expert returns: `change` z - x, or `output` norm(z)."""
    keep_unused_qk: bool = False
    """Store the query and key weights that `token` never uses, to match a parameter count."""

    @model_validator(mode="after")
    def _steps_can_be_decided(self) -> Self:
        self.depth.check(self.steps, "mixer.depth", "mixer.steps")
        if isinstance(self.depth, ExpertChoiceConfig) and self.depth.causal == "none":
            raise ValueError(
                "mixer.depth.causal 'none' gives experts no rule that can decode; use 'aux_loss' or 'aux_router'"
            )
        return self

    @property
    def steps_router(self) -> StepsRouterConfig:
        return self.depth

    @model_validator(mode="after")
    def _keeps_what_is_unused(self) -> Self:
        if self.keep_unused_qk and self.attention_scope == "routed":
            raise ValueError(
                "mixer.keep_unused_qk goes with mixer.attention_scope 'token'; with 'routed' these weights are used"
            )
        return self

    def options(self, d_model: int) -> dict[str, Any]:
        return self.model_dump(exclude={"kind", "router", "depth"})

    def twin_width(self, d_model: int) -> int:
        return self.d_ff


class HuginnExpertsConfig(ExpertsConfig):
    """Experts that are recurrent blocks: a latent state meets the input again at each of `steps` steps."""

    has_blocks = has_states = True

    kind: Literal["huginn"]
    steps: PositiveInt = 2
    """Times S that an expert recurs; its weights are shared over the steps."""
    d_ff: PositiveInt | None = None
    """Hidden width of an expert's swiglu; default: 2 d_model."""
    attention_scope: Literal["routed", "token"] = "routed"
    """`routed`: causal attention over the tokens of the sequence that visit the same expert; `token`: only itself."""
    state_std: NonNegative = 0.02
    """Standard deviation of the first state in training; in evaluation it is zero."""

    def options(self, d_model: int) -> dict[str, Any]:
        return self.model_dump(exclude={"kind", "router"}) | {"d_ff": self.twin_width(d_model)}

    def twin_width(self, d_model: int) -> int:
        return self.d_ff or 2 * d_model


class SharedRecurrentConfig(ExpertsConfig):
    """Light experts, mixed first, then one recurrent block that every token passes `steps` times."""

    has_blocks = has_states = True

    kind: Literal["shared_recurrent"]
    expert: FeedForwardConfig = FeedForwardConfig(kind="gelu")
    """The light experts; default: gelu of hidden width 2 d_model."""
    steps: PositiveInt = 2
    """Times S that the block recurs; its weights are shared over the steps."""
    d_ff: PositiveInt | None = None
    """Hidden width of the block's swiglu; default: 4 d_model."""
    state_std: NonNegative = 0.02
    """Standard deviation of the first state in training; in evaluation it is zero."""

    def options(self, d_model: int) -> dict[str, Any]:
        return {
            "expert": self.expert.kind,
            "expert_d_ff": self.expert.d_ff or 2 * d_model,
            "steps": self.steps,
            "d_ff": self.twin_width(d_model),
            "state_std": self.state_std,
        }

    def twin_width(self, d_model: int) -> int:
        return self.d_ff or 4 * d_model


class LayerRecurrentConfig(ExpertsConfig):
    """Feed-forward experts whose layer recurs `steps` times on its own output, routed anew at each step."""

    has_states = routes_every_step = True

    kind: Literal["layer_recurrent"]
    expert: FeedForwardConfig = FeedForwardConfig()
    steps: PositiveInt = 2
    """Times S that the layer recurs."""
    scale: PositiveFloat = 1.0
    """Factor on what each step adds."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the earlier steps' router logits that a step keeps; 0 routes on its own alone."""
    entropy_floor: NonNegative = 0.8
    """Least entropy of a token's router in nats, at most 0.9 ln E: its temperature rises until it is reached."""

    def options(self, d_model: int) -> dict[str, Any]:
        own = self.model_dump(include={"steps", "scale", "ema", "entropy_floor"})
        return {"expert": self.expert.kind, "d_ff": self.expert.hidden(d_model), **own}

    def twin_width(self, d_model: int) -> int:
        return self.expert.twin_width(d_model)


MixerConfig = Annotated[
    FeedForwardConfig
    | MoEConfig
    | RecursiveExpertsConfig
    | HuginnExpertsConfig
    | SharedRecurrentConfig
    | LayerRecurrentConfig,
    Field(discriminator="kind"),
]
