"""The whole config tree. Every section is a frozen pydantic model that refuses unknown keys; variants differ by `kind`.

A run is described by one `Config`: model, data, train, eval. `morex.loading` reads it from a preset or a YAML file with
dotted overrides. Cross-field checks live here, so that a config that validates builds. No torch import.
"""

import math
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from morex.depth.schedule import Schedule, Sharing, from_layers

Share = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """Base of every section: keyword-only, immutable, strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def divisors(number: int) -> str:
    """All divisors of a number, for messages: `1, 2 or 4`."""
    *others, last = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(others)} or {last}" if others else last


class RopeScalingConfig(Section):
    """Longer rotary periods for sequences longer than a model was trained on, as in Llama 3.

    Periods up to original_max_seq_len / high_freq_factor stay, those from original_max_seq_len / low_freq_factor on are
    `factor` times as long, and those between them change smoothly.
    """

    kind: Literal["llama3"] = "llama3"
    factor: Annotated[float, Field(ge=1)] = 8.0
    """How many times as long the long periods become."""
    low_freq_factor: PositiveFloat = 1.0
    """Turns within the original length up to which a period counts as long."""
    high_freq_factor: PositiveFloat = 4.0
    """Turns within the original length from which on a period counts as short."""
    original_max_seq_len: PositiveInt = 8192
    """Longest sequence before the scaling."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} must be below high_freq_factor {self.high_freq_factor}"
            )
        return self


class AttentionConfig(Section):
    """Causal attention of a block, with grouped key/value heads."""

    heads: PositiveInt = 4
    """Query heads H."""
    kv_heads: PositiveInt | None = None
    """Key/value heads; default: as many as query heads."""
    head_dim: PositiveInt | None = None
    """Width of a head; default: d_model / heads."""
    scale: PositiveFloat | None = None
    """Factor on the scores; default: 1 / sqrt(head_dim)."""
    positions: Literal["rope", "learned", "none"] = "rope"
    """`rope` turns queries and keys; `learned` adds a vector per position to the token embeddings, for max_seq_len
    positions; with `none` the order of tokens is known from causality alone."""
    rope_base: PositiveFloat = 10_000.0
    """Base of the rotary position embedding (rotate-half convention)."""
    rope_scaling: RopeScalingConfig | None = None
    """Stretches the rotary periods for longer sequences; default: not at all."""
    window: PositiveInt | None = None
    """Keys that a query of a local step sees, its own included; default: no step is local."""
    global_every: Annotated[int, Field(ge=2)] | None = None
    """With n, steps n, 2n, 3n ... of the unrolled depth see all keys; default: with a window, every step is local."""
    local_rope_base: PositiveFloat | None = None
    """Base of the rotary position embedding in local steps, without rope_scaling; default: they turn as all others."""
    bias: bool = False
    """Biases on queries, keys and values."""
    output_bias: bool = False
    """A bias on the output projection."""
    qk_norm: bool = False
    """A norm on each head of queries and keys, before rotation; its weight is shared by the heads."""

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @model_validator(mode="after")
    def _grouping(self) -> Self:
        if self.heads % self.num_kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}; use {divisors(self.heads)}")
        if self.positions == "rope" and self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary positions turn pairs of channels")
        if self.positions != "rope" and self.rope_scaling is not None:
            raise ValueError(
                f"rope_scaling stretches rotary positions, and positions is {self.positions!r}; use positions "
                "'rope' or leave rope_scaling out"
            )
        return self

    @model_validator(mode="after")
    def _local_steps(self) -> Self:
        for option in ("global_every", "local_rope_base"):
            if self.window is None and getattr(self, option) is not None:
                raise ValueError(f"{option} goes with local steps, and there are none; give window, or leave it out")
        if self.positions != "rope" and self.local_rope_base is not None:
            raise ValueError(
                f"local_rope_base is for rotary positions, and positions is {self.positions!r}; use positions "
                "'rope' or leave local_rope_base out"
            )
        return self

    def options(self, d_model: int) -> dict[str, Any]:
        """Sizes of an attention in a model of width `d_model`, defaults filled in; positions stand apart."""
        dim = self.head_dim or d_model // self.heads
        return {
            "heads": self.heads,
            "kv_heads": self.num_kv_heads,
            "head_dim": dim,
            "scale": self.scale or dim**-0.5,
            "bias": self.bias,
            "output_bias": self.output_bias,
        }


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


class ExpertRouterConfig(Section):
    """Chooses K of E experts for each token: linear, softmax, top-k; weights renormalised for K > 1."""

    experts: PositiveInt = 4
    """Experts E."""
    top_k: PositiveInt = 2
    """Experts that each token visits, K. For K = 1 the probability itself is the weight."""
    balance_weight: NonNegative = 0.01
    """Weight of the Switch balance loss E * sum(load * importance), 1.0 at balance."""
    z_weight: NonNegative = 0.0
    """Weight of the router z-loss, the mean squared logsumexp of the logits."""
    bias_rate: NonNegative = 0.0
    """Rate u of the loss-free balancing bias, which counts in the choice of experts only; 0 turns it off."""

    @model_validator(mode="after")
    def _chosen(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than the {self.experts} experts there are")
        return self


class MoEConfig(Section):
    """Feed-forward experts."""

    kind: Literal["moe"]
    router: ExpertRouterConfig = ExpertRouterConfig()
    expert: FeedForwardConfig = FeedForwardConfig()

    def options(self, d_model: int) -> dict[str, Any]:
        """Constructor options of the layer, without its router."""
        return {"expert": self.expert.kind, "d_ff": self.expert.hidden(d_model)}

    def twin_width(self, d_model: int) -> int:
        """Hidden width of the dense twin's swiglu, which has the size of one expert."""
        return self.expert.twin_width(d_model)


class RecursiveExpertsConfig(Section):
    """Experts that are small recursive transformers: each loops `steps` times through attention and swiglu."""

    kind: Literal["recursive"]
    router: ExpertRouterConfig = ExpertRouterConfig()
    steps: PositiveInt = 3
    """Times S that an expert loops; its weights are shared over the steps."""
    d_ff: PositiveInt = 256
    """Hidden width of an expert's swiglu."""
    attention_scope: Literal["routed", "token"] = "routed"
    """`routed`: causal attention over the tokens of the sequence that visit the same expert; `token`: only itself."""
    branch: Literal["change", "output"] = "change"
    """What the expert returns: `change` z - x, or `output` norm(z)."""
    keep_unused_qk: bool = False
    """Store the query and key weights that `token` never uses, to match a parameter count."""

    @model_validator(mode="after")
    def _keeps_what_is_unused(self) -> Self:
        if self.keep_unused_qk and self.attention_scope == "routed":
            raise ValueError(
                "mixer.keep_unused_qk goes with mixer.attention_scope 'token'; with 'routed' these weights are used"
            )
        return self

    def options(self, d_model: int) -> dict[str, Any]:
        """Constructor options of the layer, without its router."""
        return self.model_dump(exclude={"kind", "router"})

    def twin_width(self, d_model: int) -> int:
        """Hidden width of the dense twin's swiglu, which has the size of one expert."""
        return self.d_ff


class HuginnExpertsConfig(Section):
    """Experts that are recurrent blocks: a latent state meets the input again at each of `steps` steps."""

    kind: Literal["huginn"]
    router: ExpertRouterConfig = ExpertRouterConfig()
    steps: PositiveInt = 2
    """Times S that an expert recurs; its weights are shared over the steps."""
    d_ff: PositiveInt | None = None
    """Hidden width of an expert's swiglu; default: 2 d_model."""
    attention_scope: Literal["routed", "token"] = "routed"
    """`routed`: causal attention over the tokens of the sequence that visit the same expert; `token`: only itself."""
    state_std: NonNegative = 0.02
    """Standard deviation of the first state in training; in evaluation it is zero."""

    def options(self, d_model: int) -> dict[str, Any]:
        """Constructor options of the layer, without its router."""
        return self.model_dump(exclude={"kind", "router"}) | {"d_ff": self.twin_width(d_model)}

    def twin_width(self, d_model: int) -> int:
        """Hidden width of the dense twin's swiglu."""
        return self.d_ff or 2 * d_model


class SharedRecurrentConfig(Section):
    """Light experts, mixed first, then one recurrent block that every token passes `steps` times."""

    kind: Literal["shared_recurrent"]
    router: ExpertRouterConfig = ExpertRouterConfig()
    expert: FeedForwardConfig = FeedForwardConfig(kind="gelu")
    """The light experts; default: gelu of hidden width 2 d_model."""
    steps: PositiveInt = 2
    """Times S that the block recurs; its weights are shared over the steps."""
    d_ff: PositiveInt | None = None
    """Hidden width of the block's swiglu; default: 4 d_model."""
    state_std: NonNegative = 0.02
    """Standard deviation of the first state in training; in evaluation it is zero."""

    def options(self, d_model: int) -> dict[str, Any]:
        """Constructor options of the layer, without its router."""
        return {
            "expert": self.expert.kind,
            "expert_d_ff": self.expert.d_ff or 2 * d_model,
            "steps": self.steps,
            "d_ff": self.twin_width(d_model),
            "state_std": self.state_std,
        }

    def twin_width(self, d_model: int) -> int:
        """Hidden width of the dense twin's swiglu."""
        return self.d_ff or 4 * d_model


class LayerRecurrentConfig(Section):
    """Feed-forward experts whose layer recurs `steps` times on its own output, routed anew at each step."""

    kind: Literal["layer_recurrent"]
    router: ExpertRouterConfig = ExpertRouterConfig()
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
        """Constructor options of the layer, without its router."""
        own = self.model_dump(include={"steps", "scale", "ema", "entropy_floor"})
        return {"expert": self.expert.kind, "d_ff": self.expert.hidden(d_model), **own}

    def twin_width(self, d_model: int) -> int:
        """Hidden width of the dense twin's swiglu."""
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


class ScheduleConfig(Section):
    """How blocks are shared over depth: a named strategy for `layers`, or any `prelude`, `core` and `coda`."""

    sharing: Sharing = "none"
    """`cycle` ABCABC, `sequence` AABBCC, `middle_` forms keep a unique first and last block, `none` shares nothing."""
    layers: PositiveInt | None = None
    """Unrolled depth L; give either this or `core`."""
    recursions: PositiveInt = 1
    """Recursions R."""
    prelude: Annotated[int, Field(ge=0)] | None = None
    """Unshared first blocks; only with `core`."""
    core: PositiveInt | None = None
    """Shared blocks that recur."""
    coda: Annotated[int, Field(ge=0)] | None = None
    """Unshared last blocks; only with `core`."""

    @property
    def resolved(self) -> Schedule:
        """The schedule. Raises ValueError where the depths do not work out."""
        if (self.layers is None) == (self.core is None):
            raise ValueError("schedule needs either layers (unrolled depth) or core (shared blocks), and not both")
        if self.layers is not None:
            if self.prelude is not None or self.coda is not None:
                raise ValueError(
                    "schedule.prelude and schedule.coda go with schedule.core; with schedule.layers they follow from "
                    f"sharing {self.sharing!r}"
                )
            return from_layers(self.sharing, self.layers, self.recursions)
        if self.sharing not in ("cycle", "sequence"):
            raise ValueError(
                f"schedule.sharing {self.sharing!r} needs schedule.layers; with core use cycle or sequence"
            )
        assert self.core is not None
        return Schedule(self.prelude or 0, self.core, self.coda or 0, self.recursions, self.sharing)

    @model_validator(mode="after")
    def _resolves(self) -> Self:
        _ = self.resolved
        return self


class RouterConfig(Section):
    """Base of the depth routers."""

    def options(self, recursions: int) -> dict[str, Any]:
        """Constructor options of the router, defaults filled in."""
        return self.model_dump(exclude={"kind"})


class FixedConfig(RouterConfig):
    """Every token takes all recursions; at call time any number."""

    kind: Literal["fixed"] = "fixed"


class GatedConfig(RouterConfig):
    """What routers with one gated decision per recursion share."""

    capacities: tuple[Share, ...] | None = None
    """Share of the tokens that takes recursion r, for r = 1..R; default (R - r + 1) / R."""
    alpha: PositiveFloat = 0.1
    """Factor on the gate."""
    gate: Literal["output", "delta"] = "output"
    """`output`: H + g * core(H), core's own residual included; `delta`: H + g * (core(H) - H)."""

    def shares(self, recursions: int) -> tuple[float, ...]:
        """Capacities c_1..c_R."""
        if self.capacities is not None:
            return self.capacities
        return tuple((recursions - r) / recursions for r in range(recursions))

    def options(self, recursions: int) -> dict[str, Any]:
        return super().options(recursions) | {"capacities": self.shares(recursions)}


class LearnedGateConfig(GatedConfig):
    """What routers that score tokens share."""

    score: Literal["sigmoid", "tanh", "unweighted"] = "sigmoid"
    """Gate of an active token: alpha * sigmoid(logit), alpha * tanh(logit), or 1 (`expert_choice` with `aux_loss` only:
    nothing else would train the router)."""
    router: Literal["linear", "mlp"] = "linear"
    """Scores from one linear map, or from two with GELU between (hidden width 2 d_model)."""
    z_weight: NonNegative = 0.0
    """Weight of the router z-loss, the mean squared logit of the candidates."""

    @model_validator(mode="after")
    def _router_learns(self) -> Self:
        own_loss = isinstance(self, ExpertChoiceConfig) and self.causal == "aux_loss" and self.causal_weight > 0
        if self.score == "unweighted" and not own_loss:
            raise ValueError(
                "depth.score 'unweighted' gives the router no gradient, except with depth.kind 'expert_choice', "
                "depth.causal 'aux_loss' and depth.causal_weight above 0; use sigmoid or tanh"
            )
        return self


class ExpertChoiceConfig(LearnedGateConfig):
    """Mixture of Recursions, expert choice: each recursion picks its top share of the candidates."""

    kind: Literal["expert_choice"]
    causal: Literal["aux_loss", "aux_router", "none"] = "aux_loss"
    """How the causal rule of inference (logit >= 0) is learned: on the router's own logits, by a second predictor with
    stopped gradient, or not at all (then only the oracle loss exists and decoding is refused)."""
    causal_weight: NonNegative = 0.001
    """Weight of the binary cross-entropy against top-k membership."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which capacities fall from 1 to their value along a cosine."""
    hierarchical: bool = True
    """Only tokens active at r - 1 are candidates at r; if false, every token is a candidate at every r."""


class TokenChoiceConfig(RouterConfig):
    """Mixture of Recursions, token choice: each token chooses its depth once, before recursion 1."""

    kind: Literal["token_choice"]
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Activation of the R depth logits."""
    alpha: PositiveFloat | None = None
    """Factor on the gate; default 1 for softmax, 0.1 for sigmoid."""
    temperature: PositiveFloat = 1.0
    """Divides the logits."""
    gate: Literal["last", "each"] = "last"
    """`last`: gate only the last update, H1 + g * core^i(H1); `each`: gate every recursion (the paper's equation)."""
    balance: Literal["loss", "loss_free", "none"] = "loss"
    """How depths are kept in use: a balance loss, or a bias on the choice that is moved after every step."""
    balance_weight: NonNegative = 0.1
    """Weight of the balance loss R * sum f_i P_i."""
    bias_rate: NonNegative = 0.001
    """Rate u of the loss-free bias."""
    router: Literal["linear", "mlp"] = "linear"
    """Scores from one linear map, or from two with GELU between (hidden width 2 d_model)."""
    z_weight: NonNegative = 0.0
    """Weight of the router z-loss, the mean squared logsumexp of the logits."""


class ThresholdConfig(LearnedGateConfig):
    """Candidates above a tracked quantile are active: the same causal rule in training and in inference."""

    kind: Literal["threshold"]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Share of the old threshold that is kept at each update."""


class HaltingConfig(RouterConfig):
    """Adaptive computation time: a token recurs until its halting probabilities sum to 1 - epsilon."""

    kind: Literal["halting"]
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """A token stops where its halting probabilities sum to 1 - epsilon or more."""
    ponder_weight: NonNegative = 0.01
    """Weight of the ponder cost, the mean of recursions taken plus remainder."""
    initial_bias: float | None = None
    """Bias of the halting unit before training; default -ln(R - 1): p = 1/R, so all states weigh alike and nobody stops
    early."""

    def options(self, recursions: int) -> dict[str, Any]:
        # One recursion is refused by the model, after it has asked for nothing here.
        bias = -math.log(max(1, recursions - 1)) if self.initial_bias is None else self.initial_bias
        return super().options(recursions) | {"initial_bias": bias}


class RandomConfig(GatedConfig):
    """Control: active by a hash of (seed, position, recursion); the gate is the constant alpha / 2."""

    kind: Literal["random"]
    seed: Seed = 0
    """Seed of the hash."""


DepthConfig = Annotated[
    FixedConfig | ExpertChoiceConfig | TokenChoiceConfig | ThresholdConfig | HaltingConfig | RandomConfig,
    Field(discriminator="kind"),
]


class ModelConfig(Section):
    """embed -> prelude -> core under a depth router -> coda -> norm -> head."""

    vocab_size: PositiveInt
    """Token ids V; the tokenizer may have fewer."""
    d_model: PositiveInt
    """Width D of the residual stream."""
    max_seq_len: PositiveInt = 1024
    """Longest sequence that the model is meant for; the span of position-based depth policies."""
    tie_embeddings: bool = True
    """The head is the embedding matrix."""
    embedding_scale: bool = False
    """Multiply token embeddings by sqrt(d_model)."""
    logit_cap: PositiveFloat | None = None
    """Keeps logits within this bound, cap * tanh(logits / cap); default: no bound."""
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    """`rms` RMSNorm, `rms_plus_one` RMSNorm that multiplies by 1 + weight, `layer` LayerNorm with weight and bias."""
    norm_placement: Literal["pre", "sandwich", "pre_post"] = "pre"
    """`pre` x + f(norm(x)), `sandwich` norm(x + f(norm(x))), `pre_post` x + norm(f(norm(x))); f is attention, then the
    mixer."""
    norm_eps: PositiveFloat = 1e-6
    """Term under the root of the norms."""
    init: Literal["scaled", "plain"] = "scaled"
    """N(0, init_std); `scaled` divides residual projections by sqrt(2 L), L the unrolled depth."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    seed: Seed = 0
    """Seed of the initial weights."""
    attention: AttentionConfig = AttentionConfig()
    """Attention of every block, and of recursive experts."""
    mixer: MixerConfig = FeedForwardConfig()
    """Channel part of every block."""
    schedule: ScheduleConfig
    depth: DepthConfig = FixedConfig()
    """Router that decides which tokens take which recursions."""
    kv: Literal["per_recursion", "shared_first"] = "per_recursion"
    """`per_recursion`: each recursion has keys of its active tokens; `shared_first`: all read those of recursion 1."""
    step_embedding: bool = False
    """Add a learned vector per recursion to the input of the core."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        attention, recursions = self.attention, self.schedule.recursions
        if attention.head_dim is None:
            if self.d_model % attention.heads:
                raise ValueError(
                    f"d_model {self.d_model} does not divide into attention.heads {attention.heads}; use "
                    f"{self._nearest_widths(attention.heads)}"
                )
            if attention.positions == "rope" and (self.d_model // attention.heads) % 2:
                raise ValueError(
                    f"d_model {self.d_model} over attention.heads {attention.heads} gives heads of odd width "
                    f"{self.d_model // attention.heads}; rotary positions need an even width, use "
                    f"{self._nearest_widths(attention.heads)}"
                )
        if isinstance(self.mixer, RecursiveExpertsConfig | HuginnExpertsConfig | SharedRecurrentConfig):
            self._check_recurring_experts(self.mixer.kind)
        if self.kv == "shared_first" and recursions > 1 and attention.global_every and attention.local_rope_base:
            raise ValueError(
                "kv 'shared_first' reads keys as recursion 1 has turned them, and with attention.local_rope_base a "
                "block may turn otherwise where it recurs; leave attention.local_rope_base or attention.global_every "
                "out, or use kv 'per_recursion'"
            )
        if isinstance(self.depth, GatedConfig):
            self._check_capacities(self.depth, recursions)
        if isinstance(self.depth, TokenChoiceConfig | HaltingConfig) and recursions == 1:
            raise ValueError(
                f"depth.kind {self.depth.kind!r} needs recursions to choose from; schedule.recursions is 1 with "
                f"schedule.sharing {self.schedule.sharing!r}"
            )
        if isinstance(self.depth, HaltingConfig) and self.kv == "per_recursion":
            raise ValueError(
                "depth.kind 'halting' stops tokens that later tokens still have to see, and with kv 'per_recursion' "
                "these have no keys beyond the recursion where they stopped; use kv 'shared_first'"
            )
        return self

    def _nearest_widths(self, heads: int) -> str:
        below = self.d_model // (2 * heads) * 2 * heads
        return f"{below} or {below + 2 * heads}" if below else str(2 * heads)

    def _check_recurring_experts(self, kind: str) -> None:
        for option in ("bias", "output_bias", "qk_norm", "window"):
            if getattr(self.attention, option):
                raise ValueError(
                    f"attention.{option} is for blocks alone, and mixer.kind {kind!r} has experts with an attention "
                    f"like the blocks'; leave attention.{option} out or use another mixer"
                )

        if self.norm != "rms":
            raise ValueError(
                f"norm {self.norm!r} is for blocks alone, and mixer.kind {kind!r} has experts with norms of kind "
                "'rms'; use norm 'rms' or another mixer"
            )

    def _check_capacities(self, depth: GatedConfig, recursions: int) -> None:
        shares = depth.shares(recursions)
        if len(shares) != recursions:
            raise ValueError(f"depth.capacities has {len(shares)} entries for {recursions} recursions")
        nested = not isinstance(depth, ExpertChoiceConfig) or depth.hierarchical
        if nested and any(later > earlier for earlier, later in pairwise(shares)):
            raise ValueError(
                f"depth.capacities {list(shares)} must not grow: only tokens active at r - 1 are candidates at r"
            )
        if self.kv == "shared_first" and recursions > 1 and shares[0] < 1:
            raise ValueError(
                f"kv 'shared_first' needs every token at recursion 1, where the keys are written; depth.capacities[0] "
                f"is {shares[0]}, use 1.0 or kv 'per_recursion'"
            )


class TokenizerConfig(Section):
    """How text becomes token ids."""

    kind: Literal["byte", "char", "bpe", "hf"] = "bpe"
    """`byte` 256 bytes, `char` the characters of the corpus, `bpe` trained on the training split, `hf` from a file."""
    vocab_size: PositiveInt | None = None
    """Size of a trained `bpe`; default: model.vocab_size."""
    path: str | None = None
    """For `hf`: a tokenizer.json, a folder with one, or a model name on the Hugging Face hub."""

    @model_validator(mode="after")
    def _has_path(self) -> Self:
        if (self.kind == "hf") != (self.path is not None):
            raise ValueError("data.tokenizer.path names the tokenizer of kind 'hf'; give it there and only there")
        return self


class DataConfig(Section):
    """Where the text comes from and how it becomes windows of tokens."""

    corpus: str = "sotu"
    """`sotu`, `tinyshakespeare`, or the path of a text or JSONL file or of a folder of them."""
    column: str = "text"
    """Field of a JSONL line that holds the text."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of the text that is held out: whole documents, or the end of a corpus of one document."""
    seed: Seed = 0
    """Seed of the split."""
    windows: Literal["packed", "random"] = "packed"
    """`packed`: documents back to back, each token once an epoch; `random`: windows from random places."""
    mask_documents: bool = False
    """Tokens attend only to their own document."""


class TrainConfig(Section):
    """One training. Batches are counted in sequences per optimizer step."""

    steps: Annotated[int, Field(ge=0)] = 1000
    """Optimizer steps."""
    batch_size: PositiveInt = 32
    """Sequences per optimizer step."""
    accumulation: PositiveInt = 1
    """Microbatches that a step is computed in; must divide batch_size."""
    seq_len: PositiveInt = 128
    """Tokens per sequence."""
    lr: PositiveFloat = 1e-3
    """Highest learning rate."""
    schedule: Literal["cosine", "trapezoid", "constant"] = "cosine"
    """Learning rate after warm-up: cosine to min_lr_ratio, flat with a linear cool-down at the end, or flat."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from 0."""
    cooldown_fraction: Share = 0.2
    """Share of the steps in which `trapezoid` falls to min_lr_ratio."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Last learning rate over the highest."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of AdamW."""
    decay: Literal["matrices", "all"] = "matrices"
    """`matrices` spares norms, biases and embeddings; `all` spares nothing."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: PositiveFloat = 1e-8
    """Term in AdamW's denominator."""
    clip: NonNegative = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """`bf16` is autocast over fp32 weights; `auto` is resolved once by device and width and written to the run."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    threads: PositiveInt | None = None
    """CPU threads; default: torch's own."""
    seed: Seed = 0
    """Seed of everything random in training, the order of windows included."""
    log_every: PositiveInt = 10
    """Steps between metric lines."""
    eval_every: Annotated[int, Field(ge=0)] = 250
    """Steps between evaluations of the held-out set; 0 evaluates at the end only."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 500
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"train.accumulation {self.accumulation} does not divide train.batch_size {self.batch_size}; use "
                f"{divisors(self.batch_size)}"
            )
        if self.betas[0] >= 1 or self.betas[1] >= 1:
            raise ValueError(f"train.betas {list(self.betas)} must be below 1")
        return self


class EvalConfig(Section):
    """Evaluation on the whole held-out set, in windows of train.seq_len."""

    batch_size: PositiveInt = 32
    """Windows that are evaluated together."""
    depths: bool = False
    """Also report the loss at each fixed depth 1..R."""


class Config(Section):
    """Everything about a run."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _sequences_fit(self) -> Self:
        if self.train.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"train.seq_len {self.train.seq_len} is longer than model.max_seq_len {self.model.max_seq_len}; raise "
                f"model.max_seq_len or lower train.seq_len"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to a run's config.yaml."""
        return self.model_dump(mode="json")
