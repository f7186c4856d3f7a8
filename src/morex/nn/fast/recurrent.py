"""Huginn's recurrent blocks at the size of experts as one function: every step in place, few tensors kept.

What lies between matrix products runs over the rows of all blocks together. What is kept for the backward pass are the
outputs of the norms before their weights, not the stream; gradients of weights that the steps share are summed by the
matrix products themselves.
"""

from typing import Any

import torch
from torch import Tensor

from morex.nn.fast.causal import attend_backward, attend_forward, take_attended
from morex.nn.fast.feed_forward import hidden_backward
from morex.nn.fast.grouped import multiply, multiply_transposed
from morex.nn.fast.norm import inverse_rms
from morex.nn.fast.plan import Plan, Weights, attention_map, attention_map_backward
from morex.nn.fast.scratch import Scratch
from morex.nn.fast.switch import full_precision, full_precision_backward, run

NORMS = ("norm1", "norm2", "norm3", "norm4")


def recurrent_experts(s: Tensor, x: Tensor, stacks: Weights, plan: Plan, steps: int) -> Tensor:
    """As `morex.experts.recurrent.recur`.

    Args:
        s: first states [M, D], without gradient.
        x: inputs [M, D], block by block.
        stacks: weights of all blocks by name, stacked [E, ...].
        plan: where rows stand, with one frame for those of all blocks.
        steps: S.

    Returns:
        The last states [M, D].
    """
    assert not s.requires_grad
    y: Tensor = run(_Recurrent, s, x, plan, steps, *stacks.values())
    return y


class _Recurrent(torch.autograd.Function):
    """Saves for each step what the norms make, the heads and probabilities, and the two hidden tensors."""

    @staticmethod
    @full_precision
    def forward(ctx: Any, s: Tensor, x: Tensor, plan: Plan, steps: int, *stacks: Tensor) -> Tensor:
        own = dict(zip(plan.names, stacks, strict=True))
        block = _Forward(own | {"map": attention_map(own, plan)}, plan, Scratch(x))
        injected = block.multiply("injected", x, _halves(own["adapter"])[1])
        of_state, state = _halves(own["adapter"])[0], s
        z = torch.empty_like(x)
        for step in range(steps):
            multiply(state, of_state.mT, plan.counts, out=z.copy_(injected), add=True)
            block.attention(z)
            block.norm_after(z, "norm2", z)
            block.mixer(z)
            state = z if step == steps - 1 else block.scratch.take("state", *z.shape)
            block.norm_after(z, "norm4", state)
        if plan.keeps:
            ctx.plan, ctx.steps = plan, steps
            ctx.save_for_backward(s, x, block.own["map"], *stacks, *block.saved)
        return z

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        s, x, folded, *rest = ctx.saved_tensors
        own, count = dict(zip(plan.names, rest, strict=False)), len(plan.names)
        block = _Backward(own | {"map": folded}, plan, Scratch(x), rest[count:])
        of_state, of_input = _halves(own["adapter"])
        d_adapter = torch.empty_like(own["adapter"])
        d_of_state, d_of_input = _halves(d_adapter)
        dz, other = block.scratch.take("dz", *grad.shape).copy_(grad), block.scratch.take("other", *grad.shape)
        d_injected = block.scratch.take("d_injected", *grad.shape).zero_()
        for step in reversed(range(ctx.steps)):
            block.norm_after(dz, "norm4")
            block.mixer(dz)
            block.norm_after(dz, "norm2")
            block.attention(dz)
            d_injected.add_(dz)
            state = block.weighted(block.saved[-2], "norm4") if step else s
            multiply_transposed(dz, state, plan.counts, out=d_of_state, add=step < ctx.steps - 1)
            if step:
                dz, other = multiply(dz, of_state, plan.counts, out=other), dz
        multiply_transposed(d_injected, x, plan.counts, out=d_of_input)
        gradients = block.gradients() | {"adapter": d_adapter}
        return None, multiply(d_injected, of_input, plan.counts), None, None, *(gradients[name] for name in plan.names)


def _halves(adapter: Tensor) -> tuple[Tensor, ...]:
    """The adapter [E, D, 2 D] of the state, and of the input."""
    return adapter.chunk(2, -1)


class _Block:
    """The blocks' weights, and what both directions do with them."""

    def __init__(self, own: Weights, plan: Plan, scratch: Scratch) -> None:
        self.own, self.plan, self.counts, self.scratch = own, plan, plan.counts, scratch

    def multiply(self, name: str, x: Tensor, weights: Tensor) -> Tensor:
        """Rows x times each block's weight [out, in], in the scratch memory of this name."""
        return multiply(x, weights.mT, self.counts, out=self.scratch.take(name, x.shape[0], weights.shape[1]))

    def weighted(self, h: Tensor, norm: str, out: Tensor | None = None) -> Tensor:
        """Rows h [M, D] times their block's weights of a norm."""
        y = self.scratch.take("weighted", *h.shape) if out is None else out
        for rows, weight, part in zip(
            h.split(self.counts), self.own[norm].unbind(0), y.split(self.counts), strict=True
        ):
            torch.mul(rows, weight, out=part)
        return y


class _Forward(_Block):
    """The halves of a step; `saved` takes what `_Backward` needs."""

    def __init__(self, own: Weights, plan: Plan, scratch: Scratch) -> None:
        super().__init__(own, plan, scratch)
        self.saved: list[Tensor] = []

    def _keep(self, *tensors: Tensor) -> None:
        if self.plan.keeps:
            self.saved += tensors

    def _norm(self, z: Tensor) -> tuple[Tensor, Tensor]:
        inverse = inverse_rms(z, self.plan.eps)
        return z * inverse, inverse

    def norm_after(self, z: Tensor, norm: str, out: Tensor) -> None:
        """out = norm(z)."""
        h, inverse = self._norm(z)
        self.weighted(h, norm, out)
        self._keep(h, inverse)

    def attention(self, z: Tensor) -> None:
        """z += attention(norm1(z))."""
        h, inverse = self._norm(z)
        normed, frames = self.weighted(h, "norm1"), self.plan.frames
        if frames is None:
            multiply(normed, self.own["map"].mT, self.counts, out=z, add=True)
        else:
            assert frames[0] is not None
            heads, kept = attend_forward(self.multiply("projected", normed, self.own["map"]), frames[0], self.scratch)
            multiply(heads, self.own["o"].mT, self.counts, out=z, add=True)
            self._keep(*kept, heads)
        self._keep(h, inverse)

    def mixer(self, z: Tensor) -> None:
        """z += swiglu(norm3(z))."""
        h, inverse = self._norm(z)
        normed = self.weighted(h, "norm3")
        g, u = (multiply(normed, self.own[name].mT, self.counts) for name in ("gate", "up"))
        hidden = torch.ops.aten.silu.out(g, out=self.scratch.take("hidden", *g.shape)).mul_(u)
        multiply(hidden, self.own["down"].mT, self.counts, out=z, add=True)
        self._keep(u, g, h, inverse)


class _Backward(_Block):
    """The same halves from the gradient of what they made to that of z, in place; takes from the end of `saved`."""

    def __init__(self, own: Weights, plan: Plan, scratch: Scratch, saved: list[Tensor]) -> None:
        super().__init__(own, plan, scratch)
        self.saved = saved
        self.total = {norm: torch.zeros_like(own[norm]) for norm in NORMS}

    def gradients(self) -> Weights:
        """Gradients of all weights but the adapter, when all steps are done."""
        return self.total | attention_map_backward(self.own, self.total["map"], self.plan)

    def _add(self, name: str, left: Tensor, right: Tensor) -> None:
        """Adds left^T right to the gradient of a weight."""
        known = self.total.get(name)
        self.total[name] = multiply_transposed(left, right, self.counts, out=known, add=known is not None)

    def _transposed(self, name: str, grad: Tensor, weights: Tensor) -> Tensor:
        return multiply(grad, weights, self.counts, out=self.scratch.take(name, grad.shape[0], weights.shape[2]))

    def _across_norm(self, d_y: Tensor, h: Tensor, norm: str) -> Tensor:
        """From the gradient of h * weight (overwritten) to what times `inverse` is that of the norm's input."""
        product = torch.mul(d_y, h, out=self.scratch.take("product", *h.shape))
        inner = self.scratch.take("inner", h.shape[0])
        parts = (x.split(self.counts) for x in (product, inner, d_y))
        for rows, mean, d_rows, weight, total in zip(
            *parts, self.own[norm].unbind(0), self.total[norm].unbind(0), strict=True
        ):
            total += rows.sum(0)
            torch.mv(rows, weight, out=mean)
            d_rows.mul_(weight)
        return d_y.addcmul_(h, inner.unsqueeze(1), value=-1 / h.shape[1])

    def norm_after(self, dz: Tensor, norm: str) -> None:
        """Of `_Forward.norm_after`."""
        inverse, h = self.saved.pop(), self.saved.pop()
        self._across_norm(dz, h, norm).mul_(inverse)

    def mixer(self, dz: Tensor) -> None:
        """Of `_Forward.mixer`."""
        inverse, h, g, u = (self.saved.pop() for _ in range(4))
        hidden, d_u = (self.scratch.take(name, *g.shape) for name in ("hidden", "d_u"))
        d_g = hidden_backward(self._transposed("d_hidden", dz, self.own["down"]), g, u, hidden, d_u)
        normed = self.weighted(h, "norm3")
        self._add("down", dz, hidden)
        self._add("gate", d_g, normed)
        self._add("up", d_u, normed)
        d_y = self._transposed("d_normed", d_g, self.own["gate"])
        multiply(d_u, self.own["up"], self.counts, out=d_y, add=True)
        dz.addcmul_(self._across_norm(d_y, h, "norm3"), inverse)

    def attention(self, dz: Tensor) -> None:
        """Of `_Forward.attention`."""
        inverse, h = self.saved.pop(), self.saved.pop()
        d_map = dz
        if self.plan.frames is not None:
            [frames] = self.plan.frames
            assert frames is not None
            self._add("o", dz, self.saved.pop())
            d_heads = self._transposed("d_heads", dz, self.own["o"])
            d_map = attend_backward(d_heads, take_attended(self.saved, frames), frames, self.scratch)
        self._add("map", d_map, self.weighted(h, "norm1"))
        d_y = self._transposed("d_normed", d_map, self.own["map"])
        dz.addcmul_(self._across_norm(d_y, h, "norm1"), inverse)
