"""Gated feed-forward net."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from morex.nn.fast.switch import full_precision, full_precision_backward


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As `morex.nn.mixers.swiglu`; keeps two hidden tensors for the backward pass where autograd keeps four."""
    y: Tensor = _SwiGLU.apply(x, gate, up, down)
    return y


class _SwiGLU(torch.autograd.Function):
    """Saves x and the two projections; silu is cheaper to repeat than to keep."""

    @staticmethod
    @full_precision
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        g, u = x @ gate.t(), x @ up.t()
        ctx.save_for_backward(x, g, u, gate, up, down)
        return F.silu(g).mul_(u) @ down.t()

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, g, u, gate, up, down = ctx.saved_tensors
        hidden, d_g, d_u = hidden_backward(grad @ down, g, u)
        return (d_g @ gate).addmm_(d_u, up), d_g.t() @ x, d_u.t() @ x, grad.t() @ hidden


def hidden_backward(grad: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """hidden = silu(g) * u, and the gradients of g and u from that of hidden (which is overwritten)."""
    hidden = F.silu(g)
    d_u = grad * hidden
    hidden.mul_(u)
    return hidden, torch.ops.aten.silu_backward(grad.mul_(u), g), d_u
