"""Memory of one rank in a training step, in closed form: what it always holds, and the most that passes through it.

With several ranks FSDP2 gathers a unit's weights before its forward pass and again before its backward pass, and
divides its gradients when that is done (`morex.train.parallel`). Units are the blocks of prelude and coda, the core,
and the root: embedding, last norm and head, which stay gathered from the first use to the last. With blocks as units
of the core (`train.core_units`) one block and the next are gathered at a time; gradients of all of them add up until
their first recursion is done.
"""

from dataclasses import dataclass

from morex.config import Config, ModelConfig
from morex.model.count import block_costs, count
from morex.nn.norm import norm_costs
from morex.scaling.activations import Activations, Format, Recompute, activations

ADAM = 2
"""Moments that the optimizer keeps of each weight."""


@dataclass(frozen=True)
class Layout:
    """How a batch and a model are divided over ranks."""

    ranks: int
    shards: int
    """Ranks that hold one copy of weights, gradients and optimizer state together."""
    accumulation: int
    """Microbatches of a step."""
    recompute: Recompute = "nothing"
    """What is computed again."""
    has_block_units: bool = False
    """Whether each block of the core is a unit (`train.core_units: blocks`)."""

    @property
    def copies(self) -> int:
        return self.ranks // self.shards


@dataclass(frozen=True)
class Units:
    """Parameters of the units that are gathered together."""

    root: int
    core: int
    block: int
    """Of one block of prelude or coda."""
    outer: int
    """Blocks of prelude and coda."""
    inner: int
    """Blocks of the core."""
    recursions: int

    @property
    def total(self) -> int:
        return self.root + self.core + self.block * self.outer


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    parameters: float
    gradients: float
    """As the optimizer reads them."""
    optimizer: float
    activations: Activations
    gathered: float
    """At the moment of the peak: gathered weights, and gradients that are not divided yet."""
    passing: float
    """At the moment of the peak: activations and what is computed from them."""
    peak: float
    moment: str
    """When that is: in the `forward` pass of the core, at the `loss`, as the `backward` pass of the core begins, at the
    `reduction` of its gradients, when it ends, or in the `optimizer` step."""

    @property
    def states(self) -> float:
        """Weights, gradients and optimizer state."""
        return self.parameters + self.gradients + self.optimizer


def units_of(config: ModelConfig) -> Units:
    """Parameters by unit, from the config alone."""
    schedule, counts = config.schedule.resolved, count(config)
    root = counts.parameters - counts.unique_non_embedding + norm_costs(config.norm, config.d_model).parameters
    block, outer = block_costs(config).parameters, schedule.prelude + schedule.coda
    core = counts.parameters - root - block * outer
    return Units(root, core, block, outer, schedule.core, schedule.recursions)


def memory(config: Config, layout: Layout, precision: Format, has_fast_paths: bool = False) -> Memory:
    """Memory of the rank that has most.

    Args:
        config: the model and its batch, `train.batch_size` sequences a step.
        layout: whose ranks and microbatches divide that batch.
        precision: `bf16` is autocast over fp32 weights.
        has_fast_paths: whether those for a CPU run.
    """
    return held(config, layout, precision, kept(config, layout, precision, has_fast_paths), units_of(config.model))


def kept(config: Config, layout: Layout, precision: Format, has_fast_paths: bool) -> Activations:
    """What the forward pass of a microbatch keeps."""
    train = config.train
    rows = train.batch_size // layout.ranks // layout.accumulation
    masks = config.data.mask_documents
    return activations(
        config.model, rows, train.seq_len, precision, has_fast_paths, layout.recompute, mask_documents=masks
    )


def held(config: Config, layout: Layout, precision: Format, kept: Activations, units: Units) -> Memory:
    """`memory`, from what a microbatch keeps and what is gathered together."""
    train, size = config.train, 8 if precision == "fp64" else 4
    rows = train.batch_size // layout.ranks // layout.accumulation
    own = size * units.total / layout.shards
    stream = rows * train.seq_len * config.model.d_model * size
    moments = _moments(kept, stream, units, size, layout)
    moment = max(moments, key=lambda name: sum(moments[name]))
    gathered, passing = moments[moment]
    return Memory(
        parameters=own,
        gradients=own,
        optimizer=ADAM * own,
        activations=kept,
        gathered=gathered,
        passing=passing,
        peak=(1 + ADAM) * own + gathered + passing,
        moment=moment,
    )


def _moments(
    kept: Activations, stream: float, units: Units, size: int, layout: Layout
) -> dict[str, tuple[float, float]]:
    """Where the peak may be: (weights and gradients beside parameters and optimizer state, what passes).

    Args:
        stream: bytes of the residual stream of a microbatch.
        size: bytes of a parameter.
    """
    own = size * units.total / layout.shards
    # A recursion that is computed again as a whole is there before its own gradients; of several, others' were before.
    is_alone = layout.recompute == "recursions" and units.recursions == 1
    inner = kept.kept - kept.probabilities - kept.ends
    # The gradient of the stream and that of a branch, and what a step makes on its way; the output is still there.
    step = kept.again + 4 * stream + kept.gradients + kept.logits
    # The gradients of the probabilities and of the logits; or before, while autocast still holds its copies.
    unkept = max(0.0, kept.cast - kept.weights)
    at_loss = kept.kept + kept.logits + kept.probabilities + max(kept.probabilities, unkept)
    if layout.ranks == 1:  # gradients stand where they add up
        before = own if layout.accumulation > 1 else 0.0
        return {
            "loss": (before, at_loss),
            "backward": (max(before, size * units.root), inner + step),
            # At the first block all gradients are there, and of a recursion that is alone what that block keeps.
            "reduction": (own, step - (kept.again * (1 - 1 / units.inner) if is_alone else 0.0)),
            "optimizer": (own, 0.0),
        }
    root, core = size * units.root, size * units.core
    # Of a core in blocks one is in use, and the next is there.
    one = core / units.inner if layout.has_block_units else core
    in_use = 2 * one if layout.has_block_units else core
    # Until the last microbatch of a step gradients add up undivided, a unit's when its backward pass is over.
    before = size * units.total if layout.accumulation > 1 else 0.0
    of_core = before + root + (0.0 if is_alone else one if before else core)
    # The next unit is gathered ahead, and gradients of the last one are on their way.
    neighbours = 2 * size * units.block if units.outer else 0
    return {
        # Weights are there twice while they are copied out of what was gathered.
        "forward": (before + root + in_use + one, kept.blocks + max(kept.cast, kept.weights)),
        "loss": (before + root, at_loss),
        "backward": (of_core + root + in_use + neighbours, inner + step),
        # A copy of a unit's gradients goes to the others, and a part comes back.
        "reduction": (of_core + root + in_use + one / layout.shards + neighbours, kept.blocks + step - kept.again),
        "optimizer": (own, 0.0),
    }
