"""Rows that visit a piece of network and come back: gathers whose backward is a gather, never an accumulating scatter."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from morex.nn.fast.switch import usable


def gather_rows_plain(x: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
    """Rows of x for each assignment of a token to an expert.

    Args:
        x: [N, D].
        token: token of each assignment [N * K], in any order; every token K times.
        inverse: place of assignment n * K + k in that order [N * K].

    Returns:
        [N * K, D].
    """
    return x[token]


def gather_rows(x: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
    """`gather_rows_plain`; the gradient is K gathers and their sum."""
    if usable(x) and x.shape[0]:
        return _GatherRows.apply(x, token, inverse.view(x.shape[0], -1))
    return gather_rows_plain(x, token, inverse)


def combine_rows_plain(y: Tensor, weights: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
    """Weighted sum of what comes back for each token.

    Args:
        y: rows of the assignments [N * K, D], in the order of `token`.
        weights: [N, K].
        token, inverse: as for `gather_rows_plain`.

    Returns:
        [N, D] in the dtype of y.
    """
    rows = y[inverse].view(*weights.shape, y.shape[1])
    return (rows * weights.unsqueeze(-1).to(y.dtype)).sum(1)


def combine_rows(y: Tensor, weights: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
    """`combine_rows_plain`."""
    if usable(y, weights) and y.shape[0]:
        return _CombineRows.apply(y, weights, token, inverse.view(weights.shape))
    return combine_rows_plain(y, weights, token, inverse)


def sum_of_rows(y: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_k weights[n, k] * y[places[n, k]]; y [M, D], places and weights [N, K] -> [N, D]."""
    total = y.index_select(0, places[:, 0])
    if weights is not None:
        total.mul_(weights[:, :1])
    for k in range(1, places.shape[1]):
        rows = y.index_select(0, places[:, k])
        total = total.add_(rows) if weights is None else total.addcmul_(rows, weights[:, k : k + 1])
    return total


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return sum_of_rows(grad, places), None, None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, token: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, token, places)
        return sum_of_rows(y, places, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, weights, token, places = ctx.saved_tensors
        rows = grad.index_select(0, token)
        d_weights = (rows * y).sum(1)[places]
        own = torch.empty_like(d_weights).view(-1, 1)
        own[places.flatten()] = weights.reshape(-1, 1)
        return rows.mul_(own), d_weights, None, None
