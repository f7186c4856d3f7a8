"""Root-mean-square norm."""

from typing import Any

import torch
from torch import Tensor

from morex.nn.fast.switch import full_precision, full_precision_backward, run


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `morex.nn.norm.rms_norm`."""
    if torch.is_grad_enabled() or x.numel() != x.shape[-1] or torch.is_autocast_enabled("cpu"):
        y: Tensor = run(_RMSNorm, x, weight, eps)
        return y
    # For one token a number stands in for the tensor of one number: one call where `inverse_rms` makes five.
    norm: float = torch.linalg.vector_norm(x).item()
    return torch.mul(x, weight).mul_((norm * norm / x.shape[-1] + eps) ** -0.5)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which is kept. One pass over x."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """Saves x, which the residual stream often keeps alive anyway, and one number a row."""

    @staticmethod
    @full_precision
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = inverse_rms(x, eps)
        ctx.save_for_backward(x, inverse, weight)
        return torch.mul(x, inverse).mul_(weight)

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, inverse, weight = ctx.saved_tensors
        # With n = x * inverse: d x = inverse * (grad * weight - n * mean(grad * weight * n)).
        scaled = grad * inverse
        product = scaled * x
        d_weight = product.sum_to_size(weight.shape)
        weighted = product.mul_(weight) if weight.dim() == 1 else product * weight  # d_weight may be `product` itself
        inner = weighted.mean(-1, keepdim=True).mul_(inverse.square()).neg_()
        return scaled.mul_(weight).addcmul_(x, inner), d_weight, None
