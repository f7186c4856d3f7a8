"""The schedule: which block runs when, at which recursion, with which cache slot.

This file alone owns depth arithmetic; the model, the caches, the counts and every tool read its steps.
A model has `prelude` unshared blocks, `core` blocks that recur, and `coda` unshared blocks. Under `cycle` the core
recurs as a whole (ABC ABC ABC) and is one routed group; under `sequence` each core block recurs before the next one
starts (AAA BBB CCC) and is a routed group of its own. Blocks are numbered prelude, core, coda. No torch here.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Sharing = Literal["none", "cycle", "sequence", "middle_cycle", "middle_sequence"]
Order = Literal["cycle", "sequence"]


class Slot(NamedTuple):
    """The place of one (block, recursion), or of one (expert, step) inside it, in the KV cache."""

    block: int
    recursion: int
    expert: int = -1
    step: int = -1


class Stream(NamedTuple):
    """Slots that the same tokens visit one after another, and where one of them stands among these."""

    first: Slot
    """The first of these slots, by which the stream is known."""
    place: int
    width: int
    """How many slots there are."""


class Step(NamedTuple):
    """One entry of the schedule: `block` runs as part of recursion `recursion` (1 for prelude and coda)."""

    block: int
    recursion: int

    @property
    def slot(self) -> Slot:
        return Slot(self.block, self.recursion)


@dataclass(frozen=True)
class Group:
    """A routed group: core blocks that recur together. `recursions[r - 1]` holds the steps of recursion r."""

    recursions: tuple[tuple[Step, ...], ...]


@dataclass(frozen=True)
class Schedule:
    """Block counts, number of recursions R, and the order in which core blocks recur."""

    prelude: int
    core: int
    coda: int
    recursions: int
    order: Order = "cycle"

    @property
    def num_blocks(self) -> int:
        """Blocks that are stored."""
        return self.prelude + self.core + self.coda

    @property
    def unrolled_depth(self) -> int:
        """Blocks that a token passes when it takes every recursion (L)."""
        return self.prelude + self.core * self.recursions + self.coda

    @property
    def prelude_steps(self) -> tuple[Step, ...]:
        return tuple(Step(b, 1) for b in range(self.prelude))

    @property
    def coda_steps(self) -> tuple[Step, ...]:
        return tuple(Step(b, 1) for b in range(self.prelude + self.core, self.num_blocks))

    @property
    def num_groups(self) -> int:
        """Routed groups."""
        return self.core if self.order == "sequence" else 1

    @property
    def groups(self) -> tuple[Group, ...]:
        blocks = range(self.prelude, self.prelude + self.core)
        depths = range(1, self.recursions + 1)
        if self.order == "cycle":
            return (Group(tuple(tuple(Step(b, r) for b in blocks) for r in depths)),)
        return tuple(Group(tuple((Step(b, r),) for r in depths)) for b in blocks)

    def recurring(self, recursions: int) -> "Schedule":
        """The same with another number of recursions."""
        return self if recursions == self.recursions else replace(self, recursions=recursions)

    def place(self, step: Step) -> int:
        """Where a step stands in `steps`, from 0."""
        block = step.block - self.prelude
        if block < 0:
            return step.block
        if block >= self.core:
            return self.prelude + self.core * self.recursions + block - self.core
        before = (step.recursion - 1) * self.core + block
        if self.order == "sequence":
            before = block * self.recursions + step.recursion - 1
        return self.prelude + before

    def stream(self, slot: Slot) -> Stream:
        """Where a slot stands: the prelude is a stream, each recursion of a routed group, the coda.

        Each slot of an expert is one of its own.
        """
        place = slot.block - self.prelude
        if slot.expert < 0 and place < 0:
            return Stream(Slot(0, slot.recursion), slot.block, self.prelude)
        if slot.expert < 0 and place >= self.core:
            return Stream(Slot(self.prelude + self.core, slot.recursion), place - self.core, self.coda)
        if slot.expert < 0 and self.order == "cycle":
            return Stream(Slot(self.prelude, slot.recursion), place, self.core)
        return Stream(slot, 0, 1)

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every step, in the order in which a token that takes all recursions meets them."""
        core = tuple(step for group in self.groups for recursion in group.recursions for step in recursion)
        return self.prelude_steps + core + self.coda_steps


def from_layers(sharing: Sharing, layers: int, recursions: int) -> Schedule:
    """The schedule of a named sharing strategy for an unrolled depth.

    Args:
        sharing: `none`, `cycle`, `sequence`, or the `middle_` forms, which keep a unique first and last block.
        layers: unrolled depth L.
        recursions: R.

    Raises:
        ValueError: L does not divide; the sentence names the nearest depths that do.
    """
    if sharing == "none":
        if recursions != 1:
            raise ValueError(f"schedule.sharing 'none' has no recursions: recursions is {recursions}, it must be 1")
        return Schedule(0, layers, 0, 1)
    ends = 2 if sharing.startswith("middle_") else 0
    order: Order = "cycle" if sharing.endswith("cycle") else "sequence"
    shared = layers - ends
    if shared < recursions or shared % recursions:
        below = ends + shared // recursions * recursions
        nearest = sorted({depth for depth in (below, below + recursions) if depth >= ends + recursions})
        within = f" between a unique first and last block ({layers} - 2 = {shared})" if ends else ""
        raise ValueError(
            f"schedule.layers {layers} does not divide into {recursions} recursions{within}; "
            f"the nearest depths that work: {' and '.join(map(str, nearest or [ends + recursions]))}"
        )
    return Schedule(ends // 2, shared // recursions, ends // 2, recursions, order)
