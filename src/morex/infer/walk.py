"""Blocks one after another for the rows of a pass: in one kernel where there is one for them, else one by one."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from morex.depth.schedule import Step
from morex.infer.lists import PassLists
from morex.nn import fast
from morex.nn.attention import AttentionShape, Local
from morex.nn.block import Block, StepParts
from morex.nn.packing import SHORT

LONG = 512
"""Tokens of a text behind which a long piece of it is worth the copy of all keys that torch's attention needs."""
Walked = tuple[str, Block, Step, StepParts]
"""Name of a block, the block, its step, and what the step brings."""


Key = tuple[str, int, int]
"""Part of the model, routed group and recursion: the same blocks, and what their steps bring."""


class Walks:
    """Walks through a model's blocks."""

    def __init__(self) -> None:
        self._known: dict[Key, tuple[list[Walked], fast.Walk | None]] = {}
        """The steps, and the kernel that takes them, if any."""

    def look_again(self) -> None:
        """Somebody may have given the model other weights or modules, or have come to look inside."""
        self._known.clear()

    def __call__(
        self,
        key: Key,
        steps: Callable[[], list[Walked]],
        x: Tensor,
        lists: PassLists,
        local: Callable[[Step], Local | None],
    ) -> Tensor:
        """x [N, D] -> [N, D].

        Args:
            steps: asked for when the key is new.
            lists: whose rows are segments, and whose places are the steps.
            local: what the attention of a step does otherwise.
        """
        if key not in self._known:
            found = steps()
            self._known[key] = found, _kernel_of(found)
        walked, kernel = self._known[key]
        if kernel is not None:
            shape = walked[0][1].attention.shape
            y = _at_once(kernel, shape, x, lists, [local(step) for _, _, step, _ in walked])
            if y is not None:
                return y
        traces = any(segment.trace is not None for segment in lists.segments)
        for place, (name, block, step, parts) in enumerate(walked):
            parts = replace(parts, traces=True) if traces else parts
            x, reports = block(x, lists.packing, lists.view(place), local(step), parts)
            for router, signals in reports.items() if traces else ():
                for choice in signals.choices:
                    _note_choice(f"stack.{name}.mixer.{router}", choice.experts, lists)
        return x


def _at_once(
    kernel: fast.Walk, shape: AttentionShape, x: Tensor, lists: PassLists, local: Sequence[Local | None]
) -> Tensor | None:
    """In one kernel; None where the tokens are not for it."""
    packing = lists.packing
    is_near = packing.width <= SHORT or max(segment.start for segment in lists.segments) < LONG
    if packing.documents is not None or not is_near or not kernel.takes(x):
        return None
    slots = lists.reserve(x.dtype)
    if slots is None:
        return None

    def of(here: Local | None) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        rope, window = (shape.rope, None) if here is None else (here.rope, here.window)
        turns = None if rope is None else packing.turns(shape.head_dim, rope, torch.float32)
        return slots.entries.seen_by(packing, window), turns

    alike = all(here is local[0] for here in local)
    seen, turns = zip(*([of(local[0])] * len(local) if alike else map(of, local)), strict=True)
    return kernel(x, slots, seen, turns, shape.scale)


def _kernel_of(steps: Sequence[Walked]) -> fast.Walk | None:
    """The kernel for some blocks, if it knows all of them."""
    found = [block.plain_weights(parts) for _, block, _, parts in steps]
    known = [own for own in found if own is not None]
    if len(known) < len(found):
        return None
    return fast.Walk([weights for weights, _ in known], [epsilon for _, epsilon in known])


def _note_choice(name: str, experts: Tensor, lists: PassLists) -> None:
    """Writes down which experts the tokens of those took who ask for a trace."""
    counts = lists.packing.counts
    for segment, times, own in zip(
        lists.segments, lists.packing.time.split(counts), experts.split(counts), strict=True
    ):
        if segment.trace is not None:
            segment.trace.note_choice(name, times.tolist(), own)
