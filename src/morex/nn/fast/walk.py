"""Several blocks, one after another, in one kernel: for a few tokens, the calls between them would cost as much."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from morex.nn.fast.native import MULTIPLIED, has_tiles, may_run, run_kernel

if TYPE_CHECKING:
    from morex.nn.keys import PagedSlots

COUNTS = "steps", "tokens", "channels", "hidden", "kv_heads", "group", "dim", "stride", "page"
POINTERS = "where", "table", "start", "end", "cos", "sin"
STEP = np.dtype([("weights", np.uint64, 9), ("epsilon", np.float64), *((name, np.uint64) for name in POINTERS)])
"""`Step` in kernels.cpp."""
WALK = np.dtype(
    [
        *((name, np.int64) for name in COUNTS),
        ("scale", np.float64),
        *((name, np.uint64) for name in ("row", "k", "v")),
    ]
)
"""`Walk` in kernels.cpp."""


class Walk:
    """Blocks with RMS norms in front, attention over pages, and a gated feed-forward net (SwiGLU), without biases."""

    def __init__(self, weights: Sequence[Sequence[Tensor]], epsilons: Sequence[float]) -> None:
        """Args:
        weights: of each block: norm 1, q, k, v, o, norm 2, gate, up, down. They may change, but must stay where they
            are: whoever gives a model other weights makes another walk.
        epsilons: of each block's norms.
        """
        self.weights = [weight.detach() for own in weights for weight in own]
        self.steps = np.zeros(len(weights), STEP)
        self.steps["weights"] = [[weight.data_ptr() for weight in own] for own in weights]
        self.steps["epsilon"] = epsilons
        self.walk = np.zeros(1, WALK)
        self.addresses = self.walk.ctypes.data, self.steps.ctypes.data
        first, needs_gradient = self.weights[0], any(weight.requires_grad for own in weights for weight in own)
        self.dtype, self.needs_gradient = first.dtype, needs_gradient
        is_plain = all(w.dtype == self.dtype and w.is_contiguous() and type(w) is Tensor for w in self.weights)
        self.is_known = is_plain and self.dtype in MULTIPLIED

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel may take states [N, D], and is faster than torch."""
        if not self.is_known or x.dtype != self.dtype or (self.needs_gradient and torch.is_grad_enabled()):
            return False
        return 0 < x.shape[0] <= _most_tokens(self.dtype) and may_run(x, *self.weights[:1])

    def __call__(
        self,
        x: Tensor,
        slots: "PagedSlots",
        seen: Sequence[tuple[Tensor, Tensor, Tensor]],
        turns: Sequence[tuple[Tensor, Tensor] | None],
        scale: float,
    ) -> Tensor:
        """As `Block.forward` of S blocks, keys and values written to their pages; between blocks nothing is rounded.

        Args:
            x: [N, D].
            slots: of the S blocks.
            seen: of each block, the entries that tokens see, as `Entries.seen_by` says it.
            turns: cosines and sines of the rotation [N, 1, dim], fp32, of each block; None: no rotation.
            scale: factor on the scores of attention.

        Returns:
            [N, D].
        """
        x = x.contiguous()
        y, steps = torch.empty_like(x), self.steps
        k, v, pages, where = slots.k, slots.v, slots.pages, slots.where
        steps["table"] = _each(pages, 1)
        steps["where"] = 0 if where is None else _each(where, 0)
        steps["start"], steps["end"] = _pointers(seen, 3)[1:]
        steps["cos"], steps["sin"] = _pointers(turns, 2)
        size, kv_heads, dim = k.shape[1:]
        queries, hidden = self.weights[1].shape[0], self.weights[6].shape[0]
        shape = len(steps), *x.shape, hidden, kv_heads, queries // (kv_heads * dim), dim, pages.stride(0), size
        self.walk[0] = *shape, scale, slots.row.data_ptr(), k.data_ptr(), v.data_ptr()
        run_kernel("blocks", x.dtype, x.data_ptr(), y.data_ptr(), *self.addresses)
        return y


def _most_tokens(dtype: torch.dtype) -> int:
    """Up to so many tokens the kernel is faster than torch's products with all that stands between them. Measured."""
    if dtype == torch.float32:
        return 64
    return 32 if has_tiles() else 512


def _each(x: Tensor, dim: int) -> np.ndarray:
    """Where each part of a tensor along a dimension begins, uint64."""
    assert x.is_contiguous(), "the kernel takes no steps between numbers"
    step = x.stride(dim) * x.element_size()
    return x.data_ptr() + step * np.arange(x.shape[dim], dtype=np.uint64)


def _pointers(each: Sequence[tuple[Tensor, ...] | None], count: int) -> np.ndarray:
    """Where the `count` tensors of each step stand [count, steps]; [count, 1] where all steps have the same."""
    distinct = each[:1] if all(own is each[0] for own in each) else each
    found = []
    for own in distinct:
        assert own is None or all(part.is_contiguous() for part in own), "the kernel takes no steps between numbers"
        found.append([0] * count if own is None else [part.data_ptr() for part in own])
    return np.array(found, dtype=np.uint64).T
