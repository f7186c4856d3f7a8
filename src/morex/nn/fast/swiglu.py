"""Gated feed-forward net."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from morex.nn.fast.switch import usable


def swiglu_plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x) (Shazeer 2020, eq. 6); x [N, D], weights as in `nn.Linear`."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`swiglu_plain`; keeps two hidden tensors for the backward pass where autograd keeps four."""
    if x.dim() == 2 and usable(x, gate, up, down):
        return _SwiGLU.apply(x, gate, up, down)
    return swiglu_plain(x, gate, up, down)


class _SwiGLU(torch.autograd.Function):
    """Saves x and the two projections; silu is cheaper to repeat than to keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        g, u = x @ gate.t(), x @ up.t()
        ctx.save_for_backward(x, g, u, gate, up, down)
        return F.silu(g).mul_(u) @ down.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, gate, up, down = ctx.saved_tensors
        hidden, d_gate, d_up = hidden_backward(grad @ down, g, u)
        d_x = (d_gate @ gate).addmm_(d_up, up)
        return d_x, d_gate.t() @ x, d_up.t() @ x, grad.t() @ hidden


def hidden_backward(grad: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For hidden = silu(g) * u and its gradient (which is overwritten): hidden, and the gradients of g and u."""
    hidden = F.silu(g)
    d_up = grad * hidden
    hidden.mul_(u)
    d_gate = torch.ops.aten.silu_backward(grad.mul_(u), g)
    return hidden, d_gate, d_up
