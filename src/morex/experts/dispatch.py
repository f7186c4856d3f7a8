"""Sends each token to its experts and brings the outputs back. Dropless: no capacity, nothing is padded.

Assignments (token, choice) are sorted by expert, stable in time, so that an expert's tokens stand together in time
order: flat rows [N * K, D], expert by expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from morex.nn import fast


@dataclass(frozen=True, eq=False)
class Dispatch:
    """The assignments of N tokens to K experts each."""

    token: Tensor
    """Token of each assignment [N * K], expert by expert."""
    order: Tensor
    """Assignment n * K + k at each sorted place [N * K]."""
    inverse: Tensor
    """Sorted place of each assignment [N * K]."""
    counts: list[int]
    """Tokens of each expert."""
    top_k: int

    @property
    def places(self) -> Tensor:
        """Sorted places of each token's assignments [N, K]."""
        return self.inverse.view(-1, self.top_k)

    def gather(self, x: Tensor) -> Tensor:
        """x [N, D] -> rows of the assignments [N * K, D]."""
        if fast.usable(x):
            return fast.gather_rows(x, self.token, self.places)
        return x[self.token]

    def send(self, rows: Tensor) -> Tensor:
        """Rows of the assignments [N * K, ...] as they are: all experts are here."""
        return rows

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        """Rows y [N * K, D] and weights [N, K] -> the weighted sum per token [N, D]."""
        if fast.usable(y, weights):
            return fast.combine_rows(y, weights, self.token, self.places)
        rows = y[self.places]
        return (rows * weights.unsqueeze(-1).to(y.dtype)).sum(1)


def dispatch(chosen: Tensor, experts: int) -> Dispatch:
    """Sorts the chosen experts [N, K]."""
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    counts = torch.bincount(flat, minlength=experts).tolist()
    return Dispatch(order // chosen.shape[1], order, inverse, counts, chosen.shape[1])


def own_weights(stacks: Mapping[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    """Of weights [E, ...] those of each choice of each token [N * K, ...]: every row is an expert of its own."""
    return {name: stack[chosen.flatten()] for name, stack in stacks.items()}


def is_apart(x: Tensor, counts: list[int]) -> bool:
    """Whether every row of x [N, D] is an expert of its own."""
    return len(counts) == x.shape[0] and all(n == 1 for n in counts)


def expert_linear(x: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """Each expert's linear map on its own rows.

    Args:
        x: rows [N, in], expert by expert.
        weights: [E, out, in].
        counts: rows of each expert.

    Returns:
        [N, out].
    """
    if len(counts) == 1:
        return F.linear(x, weights[0])
    if torch.compiler.is_compiling() and is_apart(x, counts):
        return (weights * x.unsqueeze(1)).sum(-1)  # which the compiler reads where `own_weights` points
    if fast.usable(x, weights):
        return fast.expert_linear(x, weights, counts)
    parts = zip(x.split(counts), weights.unbind(0), counts, strict=True)
    # When a token is decoded alone most experts have no rows.
    made = [F.linear(rows, weight) for rows, weight, count in parts if count]
    return torch.cat(made) if made else F.linear(x, weights[0])


def expert_rows(vectors: Tensor, counts: list[int]) -> Tensor:
    """Each expert's vector of [E, D] for each of its rows [N, D]; where one expert has all rows, the vector itself."""
    if all(n == 1 for n in counts):
        return vectors
    visited = [e for e, n in enumerate(counts) if n]
    if len(visited) == 1:
        return vectors[visited[0]]
    return torch.cat([vectors[e].expand(counts[e], -1) for e in visited or [0]])
