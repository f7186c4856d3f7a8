"""Products of rows that stand expert by expert with weights that are stacked by expert. An expert may have no rows."""

from typing import Any

import torch
from torch import Tensor

from morex.nn.fast.switch import full_precision, full_precision_backward, run


def multiply(x: Tensor, weights: Tensor, counts: list[int], out: Tensor | None = None, add: bool = False) -> Tensor:
    """Each expert's rows times its weight.

    Args:
        x: rows [N, in], expert by expert.
        weights: [E, in, out].
        counts: rows of each expert.
        out: takes the result; default: fresh memory.
        add: add to `out` instead.

    Returns:
        [N, out].
    """
    y = x.new_empty(x.shape[0], weights.shape[2]) if out is None else out
    if x.shape[0] in counts:  # one expert has all rows, as when a token is decoded alone
        parts = [(x, weights[counts.index(x.shape[0])], y)]
    else:
        parts = list(zip(x.split(counts), weights.unbind(0), y.split(counts), strict=True))
    for rows, weight, part in parts:
        if not rows.shape[0]:
            continue
        if add:
            part.addmm_(rows, weight)
        else:
            torch.mm(rows, weight, out=part)
    return y


def multiply_transposed(
    left: Tensor, right: Tensor, counts: list[int], out: Tensor | None = None, add: bool = False
) -> Tensor:
    """left^T right of each expert's rows [N, ...] -> [E, left, right]; `out` and `add` as for `multiply`."""
    total = left.new_empty(len(counts), left.shape[1], right.shape[1]) if out is None else out
    for a, b, part in zip(left.split(counts), right.split(counts), total.unbind(0), strict=True):
        if add:
            part.addmm_(a.t(), b)
        else:
            torch.mm(a.t(), b, out=part)
    return total


def expert_linear(x: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """Each expert's linear map on its own rows: x [N, in], weights [E, out, in] -> [N, out]."""
    y: Tensor = run(_ExpertLinear, x, weights, counts)
    return y


class _ExpertLinear(torch.autograd.Function):
    """Products land in their place; autograd would make a tensor for each expert and copy."""

    @staticmethod
    @full_precision
    def forward(ctx: Any, x: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        ctx.save_for_backward(x, weights)
        return multiply(x, weights.mT, counts)

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weights = ctx.saved_tensors
        d_x = multiply(grad, weights, ctx.counts) if ctx.needs_input_grad[0] else None
        return d_x, multiply_transposed(grad, x, ctx.counts), None
