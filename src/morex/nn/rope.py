"""Rotary position embedding, rotate-half convention as in Hugging Face's Llama: pairs are channels (i, i + dim / 2)."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


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
        return self.signed_periods(dim, device, dtype)[dim // 2 :]

    def signed_periods(self, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """`periods` for both channels of each pair, those of the first with a minus [dim]."""
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():  # which have no tensors to keep
            return self._signed(dim, device, dtype)
        return _kept_periods(self, dim, device, dtype)

    def _signed(self, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        exponent = torch.arange(0, dim, 2, device=device, dtype=dtype) / dim
        periods = self.base**exponent
        periods = periods if self.scaling is None else self.scaling.stretch(periods)
        return torch.cat((-periods, periods))


@lru_cache(maxsize=32)
def _kept_periods(rope: Rope, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return rope._signed(dim, device, dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair of channels by its angle (Su et al. 2021, eq. 34).

    Args:
        x: queries or keys [N, H, dim].
        table: of the tokens' positions, for both channels of each pair [N, 1, dim] cosines, and sines, of the first
            channel with a minus.

    Returns:
        [N, H, dim] in the dtype of x.
    """
    cos, sin = table
    turned = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
    return turned if turned.dtype == x.dtype else turned.to(x.dtype)
