"""Gated feed-forward net."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from morex.nn.fast.grouped import multiply, multiply_transposed
from morex.nn.fast.switch import full_precision, full_precision_backward, run


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As `morex.nn.mixers.swiglu`; keeps two hidden tensors for the backward pass where autograd keeps four."""
    y: Tensor = run(_SwiGLU, x, gate, up, down)
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
        hidden, d_u = torch.empty_like(g), torch.empty_like(g)
        d_g = hidden_backward(grad @ down, g, u, hidden, d_u)
        return (d_g @ gate).addmm_(d_u, up), d_g.t() @ x, d_u.t() @ x, grad.t() @ hidden


def hidden_backward(grad: Tensor, g: Tensor, u: Tensor, hidden: Tensor, d_u: Tensor) -> Tensor:
    """From the gradient of silu(g) * u (overwritten) to that of g.

    Writes silu(g) * u to `hidden` and the gradient of u to `d_u`.
    """
    torch.ops.aten.silu.out(g, out=hidden)
    torch.mul(grad, hidden, out=d_u)
    hidden.mul_(u)
    grad.mul_(u)
    d_g: Tensor = torch.ops.aten.silu_backward.grad_input(grad, g, grad_input=grad)
    return d_g


def feed_forward_experts(
    x: Tensor, counts: list[int], kind: str, up: Tensor, down: Tensor, gate: Tensor | None
) -> Tensor:
    """Each expert's feed-forward net on its own rows.

    Args:
        x: rows [N, D], expert by expert.
        counts: rows of each expert.
        kind: `swiglu`, `gelu` or `relu`.
        up, down, gate: weights of all experts, stacked [E, out, in]; `gate` for swiglu only.

    Returns:
        [N, D].
    """
    y: Tensor = run(_FeedForwardExperts, x, counts, kind, up, down, gate)
    return y


class _FeedForwardExperts(torch.autograd.Function):
    """Products land in their place; what lies between them runs over the rows of all experts together."""

    @staticmethod
    @full_precision
    def forward(
        ctx: Any, x: Tensor, counts: list[int], kind: str, up: Tensor, down: Tensor, gate: Tensor | None
    ) -> Tensor:
        u = multiply(x, up.mT, counts)
        g = None if gate is None else multiply(x, gate.mT, counts)
        hidden = F.silu(g).mul_(u) if g is not None else F.gelu(u) if kind == "gelu" else u.relu_()
        ctx.counts, ctx.kind = counts, kind
        ctx.save_for_backward(x, up, down, gate, u, g)
        return multiply(hidden, down.mT, counts)

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, gate, u, g = ctx.saved_tensors
        counts, d_gate = ctx.counts, None
        d_hidden = multiply(grad, down, counts)
        if g is not None:
            hidden, d_u = torch.empty_like(g), torch.empty_like(g)
            d_g = hidden_backward(d_hidden, g, u, hidden, d_u)
            d_gate = multiply_transposed(d_g, x, counts)
            d_x = multiply(d_u, up, counts, out=multiply(d_g, gate, counts), add=True)
        else:
            hidden = F.gelu(u) if ctx.kind == "gelu" else u
            if ctx.kind == "gelu":
                d_u = torch.ops.aten.gelu_backward(d_hidden, u)
            else:
                d_u = torch.ops.aten.threshold_backward.grad_input(d_hidden, u, 0, grad_input=d_hidden)
            d_x = multiply(d_u, up, counts)
        return d_x, None, None, multiply_transposed(d_u, x, counts), multiply_transposed(grad, hidden, counts), d_gate
