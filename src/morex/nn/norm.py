"""Normalisation."""

import torch
from torch import Tensor, nn

from morex.nn import fast
from morex.nn.costs import Costs, Kept


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, eq. 4)."""
    if fast.takes_norm(x, weight):
        return fast.few_norms(x, weight, eps)
    if fast.usable(x, weight, under_autocast=True):
        return fast.rms_norm(x, weight, eps)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight per channel."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class RMSNormPlusOne(RMSNorm):
    """RMSNorm that multiplies by 1 + weight, as in Gemma: weight decay, where there is any, pulls towards 1."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__(d_model, eps)
        self.weight = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1 + self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension (Ba et al. 2016)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__(d_model, eps=eps)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {
    "rms": RMSNorm,
    "rms_plus_one": RMSNormPlusOne,
    "layer": LayerNorm,
}


def norm_costs(kind: str, channels: int) -> Costs:
    """Closed-form costs of a norm; its few FLOPs a channel are left out.

    It keeps its input and its output, which without autocast is the input of the maps behind it; the plain RMSNorm also
    the input times what normalises it.
    """
    if kind == "layer":
        return Costs(2 * channels, kept=Kept.alike(8 * channels + 8, 4 * channels + 8))
    own = 4 * channels
    return Costs(channels, kept=Kept(3 * own + 4, 2 * own + 4, 2 * own + 4, own + 4))
