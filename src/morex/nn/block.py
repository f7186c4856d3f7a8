"""The pre-norm block, assembled from built parts. It owns weights and knows no depth."""

from typing import Protocol

from torch import Tensor, nn

from morex.nn.attention import Attention, KeyView
from morex.nn.mixers import ExpertViews
from morex.nn.norm import RMSNorm
from morex.nn.packing import Packing
from morex.nn.signals import Signals


class StepViews(ExpertViews, Protocol):
    """The cache slots of one step."""

    attention: KeyView | None


class Block(nn.Module):
    """x <- x + attention(norm(x)); x <- x + mixer(norm(x))."""

    def __init__(self, norm1: RMSNorm, attention: Attention, norm2: RMSNorm, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention = norm1, attention
        self.norm2, self.mixer = norm2, mixer

    def forward(self, x: Tensor, packing: Packing, views: StepViews | None = None) -> tuple[Tensor, Signals | None]:
        """x [N, D] -> [N, D], and what the mixer's router reports."""
        x = x + self.attention(self.norm1(x), packing, None if views is None else views.attention)
        branch, signals = self.mixer(self.norm2(x), packing, views)
        return x + branch, signals
