"""What a layer knows of the other processes, ranks, that compute one batch together with this one.

A router's losses are about the whole batch, of which a rank has some rows. It adds up its own tokens, asks here what
all ranks have, and returns a loss whose average over the ranks is that of the whole batch. Alone, this is plain.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_together = False
_aside: "Aside | None" = None


@contextmanager
def together() -> Iterator[None]:
    """Inside, layers and measurements count the tokens of all ranks of the default process group, if there is one."""
    global _together
    before, _together = _together, dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    try:
        yield
    finally:
        _together = before


class Aside:
    """A rank whose tokens do not count for now."""

    meets_others = False
    """Whether tokens of other ranks were counted."""


@contextmanager
def aside() -> Iterator[Aside]:
    """Inside, this rank adds nothing to what all ranks count: what it computes stands in for no token."""
    global _aside
    before, _aside = _aside, Aside()
    try:
        yield _aside
    finally:
        _aside = before


def rank() -> int:
    """Number of this rank, from 0."""
    return dist.get_rank() if _together else 0


def num_ranks() -> int:
    """Ranks that compute together."""
    return dist.get_world_size() if _together else 1


def summed(x: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, which have the same shape of it; without a gradient."""
    if not _together:
        return x.detach()
    total = x.detach().clone() if _aside is None else torch.zeros_like(x)
    dist.all_reduce(total)
    if _aside is not None:
        _aside.meets_others |= bool(total.any())
    return total


def mean(total: Tensor, count: Tensor | int) -> Tensor:
    """Of `count` values that add up to `total` on this rank, what averages over the ranks to the mean of all values.

    Zero where there are none. The gradient goes into this rank's total.
    """
    if not _together:
        return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(1, count))
    everyone = summed(torch.as_tensor(count, device=total.device))
    if _aside is not None:
        total = 0.0 * total
    return total * num_ranks() / everyone.clamp(min=1)


def gathered(value: Any) -> list[Any]:
    """A value of each rank, in their order."""
    if not _together:
        return [value]
    found: list[Any] = [None] * num_ranks()
    dist.all_gather_object(found, value)
    return found


def largest(value: int) -> int:
    """The largest of the values that ranks have."""
    if not _together:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def totals(values: Sequence[float]) -> list[float]:
    """Sums of some numbers over all ranks."""
    return list(values) if not _together else summed(torch.tensor(values, dtype=torch.float64)).tolist()
