"""The config tree: a run is one `Config` with the sections model, data, train and eval.

Every section is a frozen pydantic model that refuses unknown keys; variants differ by `kind`. `morex.sections` has the
parts, this file what they add up to and the checks across them, so that a config that validates builds.
`morex.loading` reads a config from a preset or a YAML file with dotted overrides. No torch import.
"""

from typing import Any, Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from morex.sections.attention import AttentionConfig
from morex.sections.base import Section, Seed
from morex.sections.data import DataConfig
from morex.sections.depth import (
    DepthConfig,
    ExitGateConfig,
    FixedConfig,
    GatedConfig,
    SampledConfig,
    StoppingConfig,
)
from morex.sections.dropout import DropoutConfig
from morex.sections.head import ClassifierHeadConfig, HeadConfig, LanguageModelHeadConfig
from morex.sections.lora import LoRAConfig
from morex.sections.mixers import ExpertsConfig, FeedForwardConfig, MixerConfig
from morex.sections.schedule import ScheduleConfig
from morex.sections.tasks import GeneratedTaskConfig
from morex.sections.train import EvalConfig, TrainConfig
from morex.sections.width import WidthScalingConfig


class ModelConfig(Section):
    """embed -> prelude -> core under a depth router -> coda -> norm -> head."""

    vocab_size: PositiveInt
    """Token ids V; the tokenizer may have fewer."""
    d_model: PositiveInt
    """Width D of the residual stream."""
    max_seq_len: PositiveInt = 1024
    """Longest sequence that the model is meant for; the span of position-based depth policies."""
    tie_embeddings: bool = True
    """The head of a language model is the embedding matrix; a classifier has a head of its own in any case."""
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
    width_scaling: WidthScalingConfig | None = None
    """How the width goes into initial weights, learning rates, logits and attention; default: not at all."""
    seed: Seed = 0
    """Seed of the initial weights."""
    attention: AttentionConfig = AttentionConfig()
    """Attention of every block, and of recursive experts."""
    mixer: MixerConfig = FeedForwardConfig()
    """Channel part of every block."""
    schedule: ScheduleConfig
    depth: DepthConfig = FixedConfig()
    """Router that decides which tokens take which recursions."""
    kv: Literal["per_recursion", "shared_first", "refresh"] = "per_recursion"
    """`per_recursion`: each recursion has keys of its active tokens; `shared_first`: all read those of recursion 1;
    `refresh`: each reads every token's keys of its latest recursion so far."""
    head: HeadConfig = LanguageModelHeadConfig()
    """What the last states become: logits of the next token, or of the classes of a sequence."""
    step_embedding: bool = False
    """Add a learned vector per recursion to the input of the core."""
    dropout: DropoutConfig = DropoutConfig()
    """What training drops at random; default: nothing."""
    residual_scale: Literal["none", "recursions"] = "none"
    """`recursions`: attention and mixer of core blocks add 1 / R of what they otherwise would."""
    recursion_norms: bool = False
    """Each recursion has norms of its own in the core blocks, but for those of queries and keys."""
    lora: LoRAConfig | None = None
    """Each recursion changes the linear maps of the core blocks by a low-rank product of its own; default: not."""
    input_injection: Literal["none", "add", "concat"] = "none"
    """How each recursion meets the core's first input e again: `add` core(H + e), `concat` core(A [H; e]) with a linear
    map A from 2 d_model to d_model."""

    @property
    def recursions_differ(self) -> bool:
        """Whether recursions have weights of their own, so that there can be no more than R."""
        alone = self.step_embedding or self.recursion_norms or self.lora is not None
        return alone or self.schedule.sharing == "none"

    @property
    def width_ratio(self) -> float:
        """Width over the width that initial weights and learning rates are meant for."""
        return 1.0 if self.width_scaling is None else self.d_model / self.width_scaling.base_width

    @property
    def windows_move(self) -> bool:
        """Whether the number of recursions says which steps are global: all rows of a batch then take as many."""
        schedule = self.schedule.resolved
        return self.attention.global_every is not None and (schedule.coda > 0 or schedule.num_groups > 1)

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
        if self.input_injection != "none" and self.schedule.sharing == "none":
            raise ValueError(
                f"input_injection {self.input_injection!r} goes into recursions, and schedule.sharing 'none' has none; "
                "use input_injection 'none' or another sharing"
            )
        if self.width_scaling is not None and self.embedding_scale:
            raise ValueError(
                "embedding_scale multiplies embeddings by sqrt(d_model), and width_scaling keeps their size the same "
                "at every width; leave one of them out"
            )
        self._check_relaxations(recursions)
        if isinstance(self.mixer, ExpertsConfig) and self.mixer.has_blocks:
            self._check_recurring_experts(self.mixer.kind)
        if self.kv != "per_recursion" and recursions > 1 and attention.global_every and attention.local_rope_base:
            raise ValueError(
                f"kv {self.kv!r} reads keys as an earlier recursion has turned them, and with "
                "attention.local_rope_base a block may turn otherwise where it recurs; leave "
                "attention.local_rope_base or attention.global_every out, or use kv 'per_recursion'"
            )
        self.depth.check(recursions, "depth", "schedule.recursions")
        if isinstance(self.depth, GatedConfig) and self.kv == "shared_first" and recursions > 1:
            self._check_first_keys(self.depth.shares(recursions)[0])
        if isinstance(self.depth, StoppingConfig) and self.kv == "per_recursion":
            raise ValueError(
                f"depth.kind {self.depth.kind!r} stops tokens that later tokens still have to see, and with kv "
                "'per_recursion' these have no keys beyond the recursion where they stopped; use kv 'refresh' or "
                "'shared_first'"
            )
        if isinstance(self.depth, ExitGateConfig):
            self._check_exits()
        if isinstance(self.depth, SampledConfig):
            self._check_sampled(self.depth)
        if self.kv != "per_recursion" and recursions == 1:
            self._check_may_recur()
        return self

    def _check_sampled(self, depth: SampledConfig) -> None:
        if self.schedule.sharing == "none":
            raise ValueError(
                "depth.kind 'sampled' draws how often the core recurs, and with schedule.sharing 'none' it does not; "
                "use schedule.sharing 'cycle' or depth.kind 'fixed'"
            )
        for option in ("step_embedding", "recursion_norms", "lora"):
            if getattr(self, option):
                raise ValueError(
                    f"{option} has weights for each of R recursions, and depth.kind 'sampled' draws more than R; "
                    f"leave {option} out"
                )
        if depth.state == "random" and self.input_injection == "none":
            raise ValueError(
                "depth.state 'random' starts from a state that knows nothing of the text; use input_injection "
                "'concat' or 'add', or depth.state 'input'"
            )
        if depth.gradient_recursions is None:
            return
        if self.input_injection == "none":
            raise ValueError(
                f"depth.gradient_recursions {depth.gradient_recursions} cuts the gradient to all that stands before "
                "the core, unless it is injected; use input_injection 'concat' or 'add', or "
                "depth.gradient_recursions null"
            )
        if self.kv == "shared_first":
            raise ValueError(
                f"depth.gradient_recursions {depth.gradient_recursions} cuts the gradient to the keys of recursion 1, "
                "which are all that kv 'shared_first' has; use kv 'refresh' or depth.gradient_recursions null"
            )

    def _check_exits(self) -> None:
        schedule = self.schedule.resolved
        if self.head.kind != "lm":
            raise ValueError(
                f"depth.kind 'exit_gate' learns from the next token's loss at every exit, and head.kind is "
                f"{self.head.kind!r}; use head.kind 'lm' or another router, such as 'halting'"
            )
        if schedule.coda:
            raise ValueError(
                "depth.kind 'exit_gate' puts norm and head on the state of every recursion, and a coda of "
                f"{schedule.coda} stands between; use schedule.sharing 'cycle' with schedule.coda 0"
            )
        if schedule.num_groups > 1:
            raise ValueError(
                "depth.kind 'exit_gate' puts norm and head on the state of every recursion, and with schedule.sharing "
                "'sequence' other blocks come after it; use 'cycle'"
            )

    def _nearest_widths(self, heads: int) -> str:
        below = self.d_model // (2 * heads) * 2 * heads
        return f"{below} or {below + 2 * heads}" if below else str(2 * heads)

    def _check_relaxations(self, recursions: int) -> None:
        """What sets recursions apart needs some; low-rank changes need maps that are matrices."""
        given = {
            "residual_scale": self.residual_scale != "none",
            "recursion_norms": self.recursion_norms,
            "lora": self.lora is not None,
            # With a core that is shared, one recursion is the shallowest form of a deeper model.
            "step_embedding": self.step_embedding and self.schedule.sharing == "none",
        }
        for option in (name for name, is_given in given.items() if is_given and recursions == 1):
            raise ValueError(
                f"{option} is for blocks that recur, and schedule.recursions is 1 with schedule.sharing "
                f"{self.schedule.sharing!r}; leave {option} out or use 2 recursions or more"
            )
        if self.lora is None:
            return
        if not isinstance(self.mixer, FeedForwardConfig):
            raise ValueError(
                f"lora changes attention and feed-forward nets, and mixer.kind {self.mixer.kind!r} has experts; leave "
                "lora out or use mixer.kind 'swiglu', 'geglu', 'gelu' or 'relu'"
            )
        if self.lora.rank >= self.d_model:
            raise ValueError(
                f"lora.rank {self.lora.rank} is no low rank for d_model {self.d_model}; use {self.d_model - 1} or less"
            )

    def _check_recurring_experts(self, kind: str) -> None:
        for option in ("bias", "output_bias", "qk_norm", "window"):
            if getattr(self.attention, option):
                raise ValueError(
                    f"attention.{option} is for blocks alone, and mixer.kind {kind!r} has experts with an attention "
                    f"like the blocks'; leave attention.{option} out or use another mixer"
                )

        if self.dropout.attention:
            raise ValueError(
                f"dropout.attention is for blocks alone, and mixer.kind {kind!r} has experts with an attention of "
                "their own; leave dropout.attention out or use another mixer"
            )
        if self.norm != "rms":
            raise ValueError(
                f"norm {self.norm!r} is for blocks alone, and mixer.kind {kind!r} has experts with norms of kind "
                "'rms'; use norm 'rms' or another mixer"
            )

    def _check_may_recur(self) -> None:
        """A shared core of one recursion may recur more often at call time, with `fixed` and `sampled` alone."""
        if self.schedule.sharing == "none" or not isinstance(self.depth, FixedConfig | SampledConfig):
            raise ValueError(
                f"kv {self.kv!r} is for blocks that recur, and schedule.recursions is 1 with schedule.sharing "
                f"{self.schedule.sharing!r}; use kv 'per_recursion' or 2 recursions or more"
            )

    def _check_first_keys(self, share: float) -> None:
        if share < 1:
            raise ValueError(
                f"kv 'shared_first' needs every token at recursion 1, where the keys are written; depth.capacities[0] "
                f"is {share}, use 1.0 or kv 'per_recursion'"
            )


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

    @model_validator(mode="after")
    def _steps_can_be_computed_again(self) -> Self:
        if self.train.recompute != "nothing" and self.model.kv == "refresh":
            raise ValueError(
                f"train.recompute {self.train.recompute!r} computes a step again after the others, and under model.kv "
                "'refresh' it would then read their keys; use train.recompute 'nothing' or another model.kv"
            )
        return self

    @model_validator(mode="after")
    def _experts_can_be_divided(self) -> Self:
        train, mixer = self.train, self.model.mixer
        if train.expert_shards == 1:
            return self
        asked = f"train.expert_shards {train.expert_shards}"
        if not isinstance(mixer, ExpertsConfig):
            raise ValueError(
                f"{asked} divides experts, and model.mixer.kind {mixer.kind!r} has none; leave train.expert_shards out"
            )
        if mixer.router.experts % train.expert_shards:
            raise ValueError(
                f"{asked} does not divide the {mixer.router.experts} experts of model.mixer.router.experts; use a "
                "divisor of their number"
            )
        if not isinstance(mixer.steps_router, FixedConfig | None):
            raise ValueError(
                f"{asked} is for experts whose tokens all take every step, and model.mixer.depth.kind "
                f"{mixer.steps_router.kind!r} decides that; use 'fixed', or leave train.expert_shards out"
            )
        if train.precision == "fp16":
            raise ValueError(
                f"{asked} is not for train.precision 'fp16', whose loss scale looks at all gradients together; use "
                "'bf16', or leave train.expert_shards out"
            )
        return self

    @model_validator(mode="after")
    def _task_fits(self) -> Self:
        task, model = self.data.task, self.model
        classes = model.head.classes if isinstance(model.head, ClassifierHeadConfig) else None
        if isinstance(task, GeneratedTaskConfig):
            task.check_fit(model.vocab_size, self.train.seq_len, model.max_seq_len, classes)
        elif task is not None and classes is not None:
            raise ValueError(f"data.task.kind {task.kind!r} is answered in words; use model.head.kind 'lm'")
        return self

    @model_validator(mode="after")
    def _depth_follows_difficulty(self) -> Self:
        if self.train.depth != "difficulty":
            return self
        task, model, asked = self.data.task, self.model, "train.depth 'difficulty'"
        recursions = model.schedule.resolved.recursions
        if not isinstance(task, GeneratedTaskConfig):
            raise ValueError(
                f"{asked} gives each example of a generated task as many recursions as it is difficult, and "
                f"{self.data.described} has no such examples; set data.task, or leave train.depth out"
            )
        if not isinstance(model.depth, FixedConfig):
            raise ValueError(
                f"{asked} leaves model.depth.kind {model.depth.kind!r} nothing to decide; use model.depth.kind 'fixed' "
                "or train.depth 'router'"
            )
        if model.windows_move:
            raise ValueError(
                f"{asked} gives examples of a batch different numbers of recursions, and these say which steps of this "
                "model are global; leave model.attention.global_every out, or use train.depth 'router'"
            )
        if task.difficulty[1] > recursions:
            raise ValueError(
                f"{asked} asks for up to {task.difficulty[1]} recursions, as data.task.difficulty says, and the model "
                f"has {recursions}; use model.schedule.recursions {task.difficulty[1]}, or lower data.task.difficulty"
            )
        hardest = (task.eval_difficulty or task.difficulty)[1]
        if hardest > recursions and model.recursions_differ:
            raise ValueError(
                f"{asked} asks for up to {hardest} recursions, as data.task.eval_difficulty says, and this model has "
                f"weights for each of {recursions}; lower data.task.eval_difficulty, or leave step_embedding, "
                "recursion_norms and lora out"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to a run's config.yaml."""
        return self.model_dump(mode="json")


def expect_model(config: object) -> None:
    """Raises TypeError, with what to pass, where something else stands in for a model's config."""
    if not isinstance(config, ModelConfig):
        given = "the whole config; pass its section, config.model" if isinstance(config, Config) else f"{config!r}"
        hint = "; load it first: morex.load_config(NAME).model" if isinstance(config, str) else ""
        raise TypeError(f"a ModelConfig is needed, not {given}{hint}")
