"""Low-rank changes of linear maps, by which a shared block may do otherwise at each of its steps."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """What is added to a linear map W x: alpha / rank * B A x (Hu et al. 2021, arXiv 2106.09685, section 4.1)."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(rank, inputs)), nn.Parameter(torch.empty(outputs, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """x [N, inputs] -> [N, outputs]. Both products are thin; W + B A would be as large as W at every step."""
        return F.linear(F.linear(x, self.a), self.b) * self.scale


Changes = Mapping[str, nn.Module]
"""Changes of a block's linear maps, by their names."""


def changed(linear: nn.Linear, x: Tensor, change: nn.Module | None) -> Tensor:
    """A linear map with its change, where there is one; x [N, inputs] -> [N, outputs]."""
    y: Tensor = linear(x)
    return y if change is None else y + change(x)
