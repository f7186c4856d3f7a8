"""The config tree: a run is one `Config` with the sections model, data, train and eval.

Every section is a frozen pydantic model that refuses unknown keys; variants differ by `kind`. `morex.sections` has the
parts, this file what they add up to and the checks across them, so that a config that validates builds.
`morex.loading` reads a config from a preset or a YAML file with dotted overrides. No torch import.
"""

from itertools import pairwise
from typing import Any, Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from morex.sections.attention import AttentionConfig
from morex.sections.base import Section, Seed
from morex.sections.data import DataConfig
from morex.sections.depth import (
    DepthConfig,
    ExpertChoiceConfig,
    FixedConfig,
    GatedConfig,
    HaltingConfig,
    TokenChoiceConfig,
)
from morex.sections.head import ClassifierHeadConfig, HeadConfig, LanguageModelHeadConfig
from morex.sections.mixers import (
    FeedForwardConfig,
    HuginnExpertsConfig,
    MixerConfig,
    RecursiveExpertsConfig,
    SharedRecurrentConfig,
)
from morex.sections.schedule import ScheduleConfig
from morex.sections.tasks import GeneratedTaskConfig
from morex.sections.train import EvalConfig, TrainConfig


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
    head: HeadConfig = LanguageModelHeadConfig()
    """What the last states become: logits of the next token, or of the classes of a sequence."""
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
    def _task_fits(self) -> Self:
        task, model = self.data.task, self.model
        classes = model.head.classes if isinstance(model.head, ClassifierHeadConfig) else None
        if isinstance(task, GeneratedTaskConfig):
            task.check_fit(model.vocab_size, self.train.seq_len, model.max_seq_len, classes)
        elif task is not None and classes is not None:
            raise ValueError(f"data.task.kind {task.kind!r} is answered in words; use model.head.kind 'lm'")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to a run's config.yaml."""
        return self.model_dump(mode="json")
