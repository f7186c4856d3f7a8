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
from morex.nn.packing import SHORT, pack_rows
from morex.nn.rope import Rope

LONG = 512
"""Tokens of a text behind which a long piece of it is worth the copy of all keys that torch's attention needs."""
Walked = tuple[str, Block, Step, StepParts]
"""Name of a block, the block, its step, and what the step brings."""


Key = tuple[str, int, int]
"""Part of the model, routed group and recursion: the same blocks, and what their steps bring."""


class Angles:
    """Cosines and sines at all positions up to some, so that a kernel looks up those of its tokens."""

    def __init__(self) -> None:
        self._known: dict[tuple[Rope, int], tuple[Tensor, Tensor]] = {}
        """By rotation and channels of a head."""

    def turns(self, end: int, device: torch.device, dim: int, rope: Rope) -> tuple[Tensor, Tensor]:
        """As `Packing.turns` in fp32, of all positions below `end`, and maybe more."""
        known = self._known.get((rope, dim))
        if known is None or known[0].shape[0] < end:
            every = torch.arange(1 << (end - 1).bit_length(), device=device)
            packing = pack_rows([len(every)], every, every, len(every))
            known = self._known[rope, dim] = packing.turns(dim, rope, torch.float32)
        return known


class Walks:
    """Walks through a model's blocks."""

    def __init__(self) -> None:
        self._angles = Angles()
        self._known: dict[Key, tuple[list[Walked], fast.Walk | None]] = {}
        """The steps, and the kernel that takes them, if any."""

    def look_again(self) -> None:
        """Forgets the steps of all keys."""
        self._known.clear()

    def __call__(
        self,
        key: Key,
        steps: Callable[[], list[Walked]],
        x: Tensor,
        lists: PassLists,
        local: Callable[[Step], Local | None] | None,
    ) -> Tensor:
        """x [N, D] -> [N, D].

        Args:
            steps: asked for when the key is new.
            lists: whose rows are segments, and whose places are the steps.
            local: what the attention of a step does otherwise, if windows are the model's way.
        """
        if key not in self._known:
            found = steps()
            self._known[key] = found, _kernel_of(found)
        walked, kernel = self._known[key]
        if kernel is not None:
            shape = walked[0][1].attention.shape
            here = [None] if local is None else [local(step) for _, _, step, _ in walked]
            y = _at_once(kernel, shape, x, lists, here, self._angles)
            if y is not None:
                return y
        traces = any(segment.trace is not None for segment in lists.segments)
        for place, (name, block, step, parts) in enumerate(walked):
            parts = replace(parts, traces=True) if traces else parts
            own = None if local is None else local(step)
            x, reports = block(x, lists.packing, lists.view(place), own, parts)
            for router, signals in reports.items() if traces else ():
                for choice in signals.choices:
                    _note_choice(f"stack.{name}.mixer.{router}", choice.experts, lists)
        return x


def _at_once(
    kernel: fast.Walk,
    shape: AttentionShape,
    x: Tensor,
    lists: PassLists,
    local: Sequence[Local | None],
    angles: Angles,
) -> Tensor | None:
    """In one kernel; None where the tokens are not for it. `local`: of each block, or one for all."""
    packing = lists.packing
    is_near = packing.width <= SHORT or max(segment.start for segment in lists.segments) < LONG
    if packing.documents is not None or not is_near or not kernel.takes(x):
        return None
    slots = lists.reserve(x.dtype)
    if slots is None:
        return None

    positions = packing.positions.contiguous()

    def sight(here: Local | None) -> fast.Sight:
        rope, window = (shape.rope, None) if here is None else (here.rope, here.window)
        _, start, end = slots.entries.seen_by(packing, window)
        if rope is None:
            return start, end, None, None, None
        return start, end, *angles.turns(lists.end, x.device, shape.head_dim, rope), positions

    alike = all(here is local[0] for here in local)
    return kernel(x, slots, [sight(here) for here in (local[:1] if alike else local)], shape.scale)


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
