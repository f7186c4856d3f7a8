"""Rows that go to experts and come back: gathers whose gradient is a gather, never a scatter that adds up."""

from typing import Any

import torch
from torch import Tensor

from morex.nn.fast.switch import full_precision, full_precision_backward, run


def gather_rows(x: Tensor, token: Tensor, places: Tensor) -> Tensor:
    """Rows of x for each assignment of a token to an expert.

    Args:
        x: [N, D].
        token: token of each assignment [N * K], in any order; every token K times.
        places: where each token's assignments stand in that order [N, K].

    Returns:
        [N * K, D].
    """
    rows: Tensor = run(_GatherRows, x, token, places)
    return rows


def combine_rows(y: Tensor, weights: Tensor, token: Tensor, places: Tensor) -> Tensor:
    """Weighted sum [N, D] of each token's rows, for y [N * K, D] in the order of `token` and weights [N, K]."""
    total: Tensor = run(_CombineRows, y, weights, token, places)
    return total


def sum_of_rows(y: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_k weights[n, k] * y[places[n, k]]; y [M, D], places and weights [N, K] -> [N, D]."""
    total = y.index_select(0, places[:, 0])
    if weights is not None:
        total.mul_(weights[:, :1])
    for k in range(1, places.shape[1]):
        rows = y.index_select(0, places[:, k])
        total = total.add_(rows) if weights is None else total.addcmul_(rows, weights[:, k : k + 1])
    return total


def in_order(weights: Tensor, places: Tensor) -> Tensor:
    """Weights [N, K] in the order of the assignments [N * K]."""
    ordered = torch.empty_like(weights).flatten()
    ordered[places.flatten()] = weights.flatten()
    return ordered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(ctx: Any, x: Tensor, token: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, token)

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return sum_of_rows(grad, places), None, None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(ctx: Any, y: Tensor, weights: Tensor, token: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, token, places)
        return sum_of_rows(y, places, weights)

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, weights, token, places = ctx.saved_tensors
        rows = grad.index_select(0, token)
        d_weights = (rows * y).sum(1)[places]
        return rows.mul_(in_order(weights, places).unsqueeze(1)), d_weights, None, None
