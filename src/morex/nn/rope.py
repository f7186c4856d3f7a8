"""Rotary position embedding, rotate-half convention as in Hugging Face's Llama: pairs are channels (i, i + dim / 2)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """Longer periods for sequences longer than `original_max_seq_len`, as in Llama 3 (Grattafiori et al. 2024)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def stretch(self, periods: Tensor) -> Tensor:
        """Periods over 2 pi [dim / 2], the short ones as they are, the long ones `factor` times as long."""
        low, high = self.low_freq_factor, self.high_freq_factor
        turns = self.original_max_seq_len / (2 * math.pi * periods)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return periods / (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class Rope:
    """How fast the pairs of channels turn: pair i by position / base^(2i / dim)."""

    base: float
    scaling: RopeScaling | None = None

    def periods(self, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Positions in which each pair turns by one radian [dim / 2]."""
        exponent = torch.arange(0, dim, 2, device=device, dtype=dtype) / dim
        periods = self.base**exponent
        return periods if self.scaling is None else self.scaling.stretch(periods)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair of channels by its angle (Su et al. 2021, eq. 34).

    Args:
        x: queries or keys [N, H, dim].
        table: cosines and sines [N, dim / 2] of the tokens' positions.

    Returns:
        [N, H, dim] in the dtype of x.
    """
    cos, sin = table[0].unsqueeze(1), table[1].unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
