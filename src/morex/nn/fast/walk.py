"""Several blocks, one after another, in one kernel: for a few tokens, the calls between them would cost as much."""

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morex.nn.fast.native import MULTIPLIED, POINTER, has_tiles, may_run, run_kernel

if TYPE_CHECKING:
    from morex.nn.keys import PagedSlots

Sight = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""How attention sees: the entries that each token sees, from start up to end [N], int32; cosines and sines of rotations
[P, 1, dim], fp32, and which of them is that of each token [N], int64; None without rotation."""


class _Step(ctypes.Structure):
    _fields_ = ("weights", POINTER * 9), ("epsilon", ctypes.c_double)


class _Walk(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("steps", "tokens", "channels", "hidden", "kv_heads", "group", "dim")),
        *((name, ctypes.c_int64) for name in ("most", "page", "sights")),
        ("scale", ctypes.c_double),
        *((name, POINTER) for name in ("list", "pages", "where", "k", "v")),
    )


class Walk:
    """Blocks with RMS norms in front, attention over pages, and a gated feed-forward net (SwiGLU), without biases."""

    def __init__(self, weights: Sequence[Sequence[Tensor]], epsilons: Sequence[float]) -> None:
        """Args:
        weights: of each block: norm 1, q, k, v, o, norm 2, gate, up, down. They may change, but must stay where they
            are: whoever gives a model other weights makes another walk.
        epsilons: of each block's norms.
        """
        self.weights = [weight.detach() for own in weights for weight in own]
        self.steps = (_Step * len(weights))()
        for step, own, epsilon in zip(self.steps, weights, epsilons, strict=True):
            step.weights[:], step.epsilon = [weight.data_ptr() for weight in own], epsilon
        self.queries, self.channels, self.hidden = weights[0][1].shape[0], weights[0][1].shape[1], len(weights[0][6])
        first, needs_gradient = self.weights[0], any(weight.requires_grad for own in weights for weight in own)
        self.dtype, self.needs_gradient = first.dtype, needs_gradient
        is_plain = all(w.dtype == self.dtype and w.is_contiguous() and type(w) is Tensor for w in self.weights)
        self.is_known = is_plain and self.dtype in MULTIPLIED

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel may take states [N, D], and is faster than torch."""
        if not self.is_known or x.dtype != self.dtype or (self.needs_gradient and torch.is_grad_enabled()):
            return False
        return 0 < x.shape[0] <= _most_tokens(self.dtype) and may_run(x, *self.weights[:1])

    def __call__(self, x: Tensor, slots: "PagedSlots", sights: Sequence[Sight], scale: float) -> Tensor:
        """As `Block.forward` of S blocks, keys and values written to their pages; between blocks nothing is rounded.

        Args:
            x: [N, D].
            slots: of the S blocks.
            sights: of each block, or one for all.
            scale: factor on the scores of attention.

        Returns:
            [N, D].
        """
        x = x.contiguous()
        y, k, pages, where = torch.empty_like(x), slots.k, slots.pages, slots.where
        steps, (page, kv_heads, dim) = len(self.steps), k.shape[1:]
        assert pages.shape[1] == steps and len(sights) in (1, steps), "every block has its slot and its sight"
        assert pages.is_contiguous() and (where is None or where.is_contiguous()), "the kernel takes no steps"
        shape = x.shape[0], self.channels, self.hidden, kv_heads, self.queries // (kv_heads * dim), dim
        at = slots.row.data_ptr(), pages.data_ptr(), None if where is None else where.data_ptr()
        walk = _Walk(steps, *shape, pages.shape[2], page, len(sights), scale, *at, k.data_ptr(), slots.v.data_ptr())
        seen = [None if part is None else part.data_ptr() for sight in sights for part in sight]
        own = ctypes.addressof(walk), ctypes.addressof(self.steps)
        run_kernel("blocks", x.dtype, x.data_ptr(), y.data_ptr(), *own, (POINTER * len(seen))(*seen))
        return y


def _most_tokens(dtype: torch.dtype) -> int:
    """Up to so many tokens the kernel is faster than torch's products with all that stands between them. Measured."""
    if dtype == torch.float32:
        return 64
    return 32 if has_tiles() else 512
