"""Time of a training step, in closed form: arithmetic, bytes to and from memory, and what ranks exchange.

Arithmetic and memory traffic of a pass are added, as kernels run one after another. Where a device can do both, a
unit's exchange runs while its neighbour computes, and only what is longer counts: weights are gathered one unit ahead,
and gradients are reduced while the unit before computes.
"""

from dataclasses import dataclass

from morex.config import Config, ModelConfig
from morex.model.count import Count, block_costs, count, head_costs
from morex.scaling.activations import Activations, Format, activations
from morex.scaling.devices import Device
from morex.scaling.memory import Layout, Memory, Units, units_of

TRAFFIC = 4
"""Times that a kept byte crosses the memory's bus: it is written and read, and so is its gradient."""
LOSS_TRAFFIC = 6
"""The same for the probabilities of all ids, with the logits on their way."""
OPTIMIZER_TRAFFIC = 10
"""The same for a parameter in a step: seven times in AdamW, three in clipping."""

COPY_TRAFFIC = 3
"""The same for a byte that is gathered or reduced: it is written, and copied to or from its place."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, on the slowest rank."""

    arithmetic: float
    traffic: float
    """To and from memory, the optimizer's included."""
    exchange: float
    """Of all collectives, hidden or not."""
    exposed: float
    """What is left of them beside computing."""
    exchanged: float
    """Bytes that a rank receives."""

    @property
    def seconds(self) -> float:
        return self.arithmetic + self.traffic + self.exposed

    @property
    def bound(self) -> str:
        """What takes most of the time: `arithmetic`, `memory` or `exchange`."""
        parts = {"arithmetic": self.arithmetic, "memory": self.traffic, "exchange": self.exposed}
        return max(parts, key=lambda name: parts[name])


def step_time(
    config: Config, layout: Layout, device: Device, precision: Format, held: Memory, counts: Count, units: Units
) -> StepTime:
    """Time of a step of `train.batch_size` sequences.

    Args:
        held: the memory of this layout.
        counts, units: of the model.
    """
    model, train = config.model, config.train
    tokens = train.batch_size // layout.ranks // layout.accumulation * train.seq_len
    again = layout.recompute != "nothing"
    flops = (device.flops_bf16 if precision == "bf16" else device.flops_fp32) * device.matmul_share
    bandwidth = device.bandwidth * device.bandwidth_share
    passed = tokens * _flops_per_token(counts, head_costs(model).per_token, again) - held.activations.maps_flops
    arithmetic = passed / flops
    traffic = _traffic(held.activations, again, units, precision) / bandwidth
    size = 8 if precision == "fp64" else 4
    update = OPTIMIZER_TRAFFIC * held.parameters / bandwidth
    if layout.ranks > 1:
        uses = units.recursions if layout.has_block_units else 1
        traffic += COPY_TRAFFIC * size * (2 * (units.total + (uses - 1) * units.core) - units.root) / bandwidth
        update += COPY_TRAFFIC * size * units.total / bandwidth
    exchange = exposed = exchanged = 0.0
    if layout.ranks > 1:
        shares, prelude = _shares(config, counts), model.schedule.resolved.prelude
        passes = _Passes(units, size, layout, device, shares, arithmetic + traffic, prelude)
        once, last = passes.microbatch(False), passes.microbatch(True)
        exchange, exposed, exchanged = ((layout.accumulation - 1) * a + b for a, b in zip(once, last, strict=True))
    return StepTime(
        arithmetic=layout.accumulation * arithmetic,
        traffic=layout.accumulation * traffic + update,
        exchange=exchange,
        exposed=exposed,
        exchanged=exchanged,
    )


def passes_of(
    model: ModelConfig, rows: int, seq_len: int, precision: Format, has_fast_paths: bool
) -> tuple[float, float]:
    """FLOPs, and bytes to and from memory, of the passes through a microbatch on one rank, nothing computed again."""
    kept, units = activations(model, rows, seq_len, precision, has_fast_paths), units_of(model)
    flops = rows * seq_len * count(model, seq_len=seq_len).train_flops_per_token
    return flops, _traffic(kept, False, units, precision)


def _flops_per_token(counts: Count, head: float, recompute: bool) -> float:
    """FLOPs of training; steps that are computed again add a forward pass without the head."""
    return counts.train_flops_per_token + (counts.forward_flops_per_token - head if recompute else 0.0)


def _shares(config: Config, counts: Count) -> tuple[float, float, float]:
    """Share of root, core and one other block in the FLOPs of a forward pass."""
    model, tokens, schedule = config.model, config.train.seq_len, config.model.schedule.resolved
    block, head = block_costs(model), head_costs(model).per_token
    one = block.per_token + sum(pairs.per_pair * pairs.share * tokens for pairs in block.attention)
    root, outer = head / counts.forward_flops_per_token, one / counts.forward_flops_per_token
    return root, max(0.0, 1 - root - outer * (schedule.prelude + schedule.coda)), outer


def _traffic(kept: Activations, recompute: bool, units: Units, precision: Format) -> float:
    """Bytes that cross the memory's bus in the passes of a microbatch."""
    inner = kept.kept - kept.probabilities
    if recompute:
        inner += kept.recomputed
    cast = 6.0 * units.total if precision == "bf16" else 0.0
    return TRAFFIC * inner + LOSS_TRAFFIC * kept.probabilities + cast


@dataclass(frozen=True)
class _Passes:
    """What the units of a model exchange, and what they compute meanwhile."""

    units: Units
    size: int
    """Bytes of a parameter."""
    layout: Layout
    device: Device
    shares: tuple[float, float, float]
    """Of the root, the core and one other block, in computing."""
    seconds: float
    """Computing of a microbatch, forward and backward."""
    prelude: int
    """Blocks before the core."""

    def microbatch(self, reduces: bool) -> tuple[float, float, float]:
        """(seconds of exchange, of it beside computing, bytes received) of one microbatch.

        Args:
            reduces: whether it is the last of a step, which also exchanges gradients.
        """
        units = self._units()
        gathers = [self._gather(parameters) for parameters, *_ in units]
        reductions = [
            self._reduce(parameters) if reduces and is_first else (0.0, 0.0) for parameters, _, is_first in units
        ]
        # Forward: every use of a unit. Backward: the root is still there, and gradients go when all uses have theirs.
        forward = [seconds for seconds, _ in gathers]
        backward = [seconds for seconds, _ in gathers[1:]]
        reducing = [seconds for seconds, _ in reductions]
        total = sum(forward) + sum(backward) + sum(reducing)
        received = sum(size for _, size in [*gathers, *gathers[1:], *reductions])
        if not self.device.overlaps:
            return total, total, received
        computing = [self.seconds * share / 3 for _, share, _ in units]
        exposed = forward[0] + forward[1]
        for i in range(1, len(units)):
            following = forward[i + 1] if i + 1 < len(units) else 0.0
            exposed += max(0.0, following - computing[i])
        # The head's backward pass covers the last unit's gathering; then each covers its neighbours'.
        exposed += max(0.0, backward[-1] - 2 * computing[0])
        for i in range(len(units) - 1, 0, -1):
            before = backward[i - 2] if i > 1 else 0.0
            after = reducing[i + 1] if i + 1 < len(units) else 0.0
            exposed += max(0.0, before + after - 2 * computing[i])
        return total, exposed + reducing[1] + reducing[0], received

    def _units(self) -> list[tuple[float, float, bool]]:
        """Parameters, share of the computing, and whether it is the first use, of each use of a unit, the root first.

        Recursions of a core in blocks are taken to be alike.
        """
        root, core, block = self.shares
        outer = [(self.units.block, block, True)] * self.units.outer
        uses = [(float(self.units.core), core, True)]
        if self.layout.has_block_units:
            inner, recursions = self.units.inner, self.units.recursions
            uses = [
                (self.units.core / inner, core / inner / recursions, recursion == 0)
                for recursion in range(recursions)
                for _ in range(inner)
            ]
        return [(self.units.root, root, True), *outer[: self.prelude], *uses, *outer[self.prelude :]]

    def _gather(self, parameters: float) -> tuple[float, float]:
        """Seconds and bytes of a unit's all-gather."""
        shards, whole = self.layout.shards, self.size * parameters
        return self._exchange(whole, shards, 1), whole * (shards - 1) / shards

    def _reduce(self, parameters: float) -> tuple[float, float]:
        """Seconds and bytes of the reduce-scatter of a unit's gradients, and of adding up the copies'."""
        shards, copies = self.layout.shards, self.layout.copies
        seconds, size = self._gather(parameters)
        if copies > 1:
            part = self.size * parameters / shards
            seconds += 2 * self._exchange(part, copies, shards)
            size += 2 * part * (copies - 1) / copies
        return seconds, size

    def _exchange(self, whole: float, ranks: int, stride: int) -> float:
        """Seconds until each of some ranks has all of `whole` bytes, of which it had its part.

        Inside a machine they come over its links; from other machines over the network, which the ranks of a machine
        share out among them.

        Args:
            stride: ranks from one to the next.
        """
        if ranks == 1:
            return 0.0
        inside = max(1, min(ranks, self.device.per_node // stride))
        machines = -(-ranks // inside)
        over_links = whole * (inside - 1) / inside / self.device.link
        over_network = whole * (machines - 1) / machines / inside / self.device.network
        return max(over_links, over_network) / self.device.link_share + machines * self.device.latency
