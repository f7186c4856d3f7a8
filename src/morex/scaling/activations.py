"""What a forward pass keeps for its backward pass, in closed form: the parts' `Kept`, by the tokens that visit them.

A block keeps nothing of a token that does not visit it, so recursion r keeps c_r of what the first one keeps. Padding
is left out.
"""

from dataclasses import dataclass
from typing import Literal

from morex.config import ModelConfig
from morex.depth.routers import ROUTERS
from morex.model.count import block_costs, expected_shares, head_costs, lora_costs, router_costs
from morex.model.lm import attention_shape
from morex.nn.attention import has_fast_heads, kept_beside_heads
from morex.nn.costs import Kept, Rows
from morex.nn.norm import norm_costs
from morex.sections.head import ClassifierHeadConfig
from morex.sections.mixers import ExpertsConfig

Format = Literal["fp32", "bf16", "fp64"]
Recompute = Literal["nothing", "selective", "steps", "recursions"]
"""What is computed again, as `train.recompute` says it."""
WIDE = 4
"""Bytes of a value of the residual stream, which autocast leaves alone."""


@dataclass(frozen=True)
class Activations:
    """Bytes that the forward pass of one microbatch keeps."""

    blocks: float
    """Of prelude and coda."""
    recursions: tuple[float, ...]
    """Of the core at each recursion that has a gradient."""
    routers: float
    """Of the depth routers, and of what recursions meet again."""
    ends: float
    """Of embedding, last norm and the input of the head."""
    weights: float
    """Copies of weights, cast to bf16 or joined, that the backward pass will read."""
    cast: float
    """Copies of weights that autocast holds until the forward pass ends, whether they are kept or not."""
    again: float
    """Of the step, or the steps of a recursion, that are there together while computed again; 0 without that."""
    recomputed: float
    """Of all steps together, as they come and go while they are computed again; 0 without recomputation."""
    maps_flops: float
    """FLOPs of the forward pass that are not spent again: of linear maps, where their results are kept; else 0."""
    gradients: float
    """Of a step's experts, as the backward pass makes them on its way: of hidden values, queries, keys and values."""
    probabilities: float
    """What the loss keeps: logarithms of the probabilities of all ids, at each exit that it reads."""
    logits: float
    """The logits, which the output holds."""

    @property
    def kept(self) -> float:
        """All that the backward pass will read, as the forward pass leaves it."""
        return self.blocks + sum(self.recursions) + self.routers + self.ends + self.weights + self.probabilities


def activations(
    config: ModelConfig,
    rows: int,
    seq_len: int,
    precision: Format = "fp32",
    has_fast_paths: bool = False,
    recompute: Recompute = "nothing",
    shares: tuple[float, ...] | None = None,
    mask_documents: bool = False,
) -> Activations:
    """Counts what a microbatch keeps.

    Args:
        config: the model.
        rows, seq_len: of the microbatch.
        precision: `bf16` is autocast over fp32 weights.
        has_fast_paths: whether those for a CPU run.
        recompute: whether a step, or in the core a whole recursion, keeps its input alone, or a step that and the
            results of linear maps, those inside experts left out.
        shares: share of the tokens active at recursion r = 1..R, where it was measured.
        mask_documents: whether tokens see their own document alone.
    """
    schedule = config.schedule.resolved
    active = shares or trained_shares(config, seq_len)
    own = _Microbatch(config, rows, seq_len, precision, has_fast_paths, mask_documents)
    once, core = own.rows_of(1.0, 0), [own.rows_of(share, r) for r, share in enumerate(active, start=1)]

    groups, keeps_all = schedule.num_groups, recompute == "nothing"
    core_inputs = groups if recompute == "recursions" else schedule.core

    def entries(share: float, visited: Rows) -> float:
        """What is kept of a step that is computed again."""
        return share * own.values(config.d_model) + maps(share, visited)

    def maps(share: float, visited: Rows) -> float:
        return own.maps(share, visited) if recompute == "selective" else 0.0

    selections = sum(own.rotations(share, visited) for share, visited in zip(active, core, strict=True) if share < 1)
    rotated = own.rotations(1.0, once) + groups * selections if keeps_all else 0.0
    probabilities, logits = own.logits(len(active))
    outer, of_core = schedule.prelude + schedule.coda, [own.step(*visit) for visit in zip(active, core, strict=True)]
    visits = [(outer, 1.0, once), *((schedule.core, *visit) for visit in zip(active, core, strict=True))]
    steps = sum(count * (own.step(share, visited) - maps(share, visited)) for count, share, visited in visits)
    again = [own.step(1.0, visited) - maps(1.0, visited) + own.joint(visited) for visited in (once, *core[:1])]
    again[1:] = [schedule.core / core_inputs * one for one in again[1:]]
    cast = own.cast()
    joint = outer * own.joint(once) + schedule.core * sum(own.joint(r) for r in core)
    return Activations(
        blocks=outer * (own.step(1.0, once) if keeps_all else entries(1.0, once)) + rotated,
        recursions=tuple(
            schedule.core * step if keeps_all else core_inputs * entries(share, visited)
            for step, share, visited in zip(of_core, active, core, strict=True)
        ),
        routers=groups * own.routers(active),
        ends=own.ends(),
        weights=cast + joint if keeps_all else own.cast_head(),
        cast=cast,
        again=0.0 if keeps_all else max(again),
        recomputed=0.0 if keeps_all else steps,
        maps_flops=sum(count * own.maps_flops(share, visited) for count, share, visited in visits)
        if recompute == "selective"
        else 0.0,
        gradients=own.gradients(),
        probabilities=probabilities,
        logits=logits,
    )


@dataclass(frozen=True)
class _Microbatch:
    """Bytes of the parts, for all tokens of a microbatch."""

    config: ModelConfig
    rows: int
    seq_len: int
    precision: Format
    has_fast_paths: bool
    mask_documents: bool

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    def bytes(self, kept: Kept) -> float:
        """What is kept in this format and on this path."""
        narrow = self.precision == "bf16"
        if self.has_fast_paths:
            found = kept.fast_bf16 if narrow else kept.fast_fp32
        else:
            found = kept.bf16 if narrow else kept.fp32
        return found * (2 if self.precision == "fp64" else 1)

    def values(self, count: float) -> float:
        """Of so many values a token, in the format of the weights."""
        return self.tokens * count * WIDE * (2 if self.precision == "fp64" else 1)

    def rows_of(self, share: float, recursion: int) -> Rows:
        """The rows of a step that this share of the tokens takes; recursion 0 is prelude and coda."""
        config, attention = self.config, self.config.attention
        masked = self.mask_documents or (attention.window is not None and attention.window < self.seq_len)
        rereads = recursion > 0 and config.kv != "per_recursion" and not self._takes_all
        is_plain = rereads or attention.qk_norm or config.dropout.attention > 0 or (config.lora is not None)
        makes_keys = not (rereads and config.kv == "shared_first" and recursion > 1)
        reads = self.seq_len if rereads and recursion > 1 else share * self.seq_len if masked else 0.0
        return Rows(share * self.seq_len, share == 1 or self._is_even, is_plain, makes_keys, reads)

    @property
    def _takes_all(self) -> bool:
        return self.config.depth.kind in ("fixed", "sampled", "exit_gate")

    @property
    def _is_even(self) -> bool:
        """Whether all sequences have as many active tokens."""
        return self.config.depth.kind in ("expert_choice", "random")

    def step(self, share: float, rows: Rows) -> float:
        """Of one step that this share of the tokens takes, copies of weights left out."""
        block, shape = block_costs(self.config), attention_shape(self.config)
        kept = block.kept + kept_beside_heads(self.config.d_model, shape, rows).kept
        if self.config.dropout.residual:  # what was dropped, in bytes, and what it was dropped from
            kept += Kept.alike(2.0 * self.config.d_model)
        for attention in block.attention:
            own = rows if attention.rereads else Rows(share * attention.share * self.seq_len)
            kept += attention.kept(own)
        return share * self.tokens * self.bytes(kept)

    def maps(self, share: float, rows: Rows) -> float:
        """Of the results of a step's linear maps."""
        block, shape = block_costs(self.config), attention_shape(self.config)
        keys = 0 if rows.makes_keys else 2 * shape.kv_heads * shape.head_dim
        return share * self.tokens * self.bytes(Kept.alike(4.0, 2.0) * (block.maps - keys))

    def maps_flops(self, share: float, rows: Rows) -> float:
        """FLOPs that these take."""
        block = block_costs(self.config)
        return share * self.tokens * (block.per_token_maps - (0.0 if rows.makes_keys else block.per_token_keys))

    def joint(self, rows: Rows) -> float:
        """Of weights that a step makes for itself."""
        beside = kept_beside_heads(self.config.d_model, attention_shape(self.config), rows).kept_weights
        return self.bytes(block_costs(self.config).kept_weights + beside)

    def gradients(self) -> float:
        """Of the rows of experts in a backward pass; those of other parts come and go within the stream's."""
        mixer, d_model = self.config.mixer, self.config.d_model
        if not isinstance(mixer, ExpertsConfig):
            return 0.0
        hidden = 3 * mixer.twin_width(d_model) + (4 * d_model if mixer.has_blocks else 0)
        return self.tokens * self.bytes(Kept.alike(4.0, 2.0) * (mixer.router.top_k * hidden))

    def cast_head(self) -> float:
        """Of the head's weights, which is never computed again."""
        return self.bytes(head_costs(self.config).cast_weights)

    def cast(self) -> float:
        """Of weights that autocast casts once a pass."""
        schedule = self.config.schedule.resolved
        block = block_costs(self.config).cast_weights * schedule.num_blocks
        return self.bytes(block + head_costs(self.config).cast_weights + lora_costs(self.config).cast_weights)

    def rotations(self, share: float, rows: Rows) -> float:
        """Of the cosines and sines of a selection of tokens; fast attention has its own, which nobody keeps."""
        shape = attention_shape(self.config)
        if shape.rope is None or (self.has_fast_paths and has_fast_heads(shape, rows)):
            return 0.0
        return share * self.values(2 * shape.head_dim)

    def routers(self, active: tuple[float, ...]) -> float:
        """Of the router of one group, and of what is injected there."""
        kept = router_costs(self.config, active).kept
        if self.config.input_injection == "concat":
            # The states that the adapter takes; those of the input are the first norm's.
            copies = Kept.alike(4.0 * self.config.d_model, 2.0 * self.config.d_model)
            kept += copies * (1 + sum(active))
        return self.tokens * self.bytes(kept)

    def ends(self) -> float:
        """Of embedding, last norm and the input of the head."""
        d_model = self.config.d_model
        return self.tokens * self.bytes(
            norm_costs(self.config.norm, d_model).kept + Kept.alike(16.0, 16.0 + 2 * d_model)
        )

    def logits(self, recursions: int) -> tuple[float, float]:
        """Logarithms of probabilities at all exits that the loss reads, and the logits that the output holds."""
        if isinstance(self.config.head, ClassifierHeadConfig):
            return 0.0, 0.0
        exits = recursions if ROUTERS[self.config.depth.kind].reads_every_state else 1
        per_exit = 1 if self.config.logit_cap is None else 2  # the tangent keeps what it makes
        held = self.values(self.config.vocab_size)
        return exits * per_exit * held, held / (2 if self.precision == "bf16" else 1)


def trained_shares(config: ModelConfig, seq_len: int) -> tuple[float, ...]:
    """Largest shares of the recursions of a training, those that have a gradient.

    While capacities warm up all tokens take all recursions; where the number is drawn, it is the mean.
    """
    recursions, kind = config.schedule.recursions, ROUTERS[config.depth.kind]
    if getattr(config.depth, "warmup_steps", 0):
        return (1.0,) * recursions
    drawn = kind.train_visits(None, recursions, **config.depth.options(recursions))
    return expected_shares(config, seq_len) if drawn is None else (1.0,) * round(drawn[1])
