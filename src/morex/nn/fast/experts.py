"""A layer of recursive experts as one function: every expert's loop in place, few tensors kept.

The residual stream of an expert is updated in place, which autograd cannot do: what it keeps are the normed inputs, not
the stream. Norm weights are folded into the linear maps that follow, and gradients of weights that the steps share are
summed by the matrix products themselves.
"""

from typing import Any

import torch
from torch import Tensor

from morex.nn.fast.causal import attend_backward, attend_forward, take_attended
from morex.nn.fast.feed_forward import hidden_backward
from morex.nn.fast.norm import inverse_rms
from morex.nn.fast.plan import Plan, Weights, attention_map, attention_map_backward
from morex.nn.fast.rows import in_order, sum_of_rows
from morex.nn.fast.scratch import Scratch
from morex.nn.fast.switch import full_precision, full_precision_backward, run


def recursive_experts(x: Tensor, weights: Tensor, stacks: Weights, plan: Plan, token: Tensor, places: Tensor) -> Tensor:
    """What `morex.experts.recursive` does behind its router.

    Args:
        x: [N, D].
        weights: of the assignments [N, K].
        stacks: weights of all experts by name, stacked [E, ...]; those of queries and keys only with frames.
        plan: where rows stand, with frames for each expert.
        token: token of each row, expert by expert [N * K].
        places: row of each assignment [N, K].

    Returns:
        The branch [N, D].
    """
    y: Tensor = run(_Experts, x, weights, plan, token, places, *stacks.values())
    return y


class _Experts(torch.autograd.Function):
    """Saves for each expert and step: both normed inputs, the heads and probabilities, and the two hidden tensors."""

    @staticmethod
    @full_precision
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, plan: Plan, token: Tensor, places: Tensor, *stacks: Tensor
    ) -> Tensor:
        own = dict(zip(plan.names, stacks, strict=True))
        folded = fold(own, plan)
        y = x.new_empty(token.shape[0], x.shape[1])
        kept = torch.empty_like(y) if "norm_out" in own else y
        saved: list[Tensor] = []
        scratch = Scratch(x)
        for e, span in plan.visited:
            rows = x.index_select(0, token[span])
            z = loop(e, rows, folded, plan, saved, scratch)
            if "norm_out" in own:
                inverse = inverse_rms(z, plan.eps)
                torch.mul(torch.mul(z, inverse, out=kept[span]), own["norm_out"][e], out=y[span])
                saved.append(inverse)
            else:
                torch.sub(z, rows, out=y[span])
        if plan.keeps:
            ctx.plan = plan
            ctx.save_for_backward(weights, token, places, kept, *stacks, *saved)
        return sum_of_rows(y, places, weights)

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        weights, token, places, kept, *rest = ctx.saved_tensors
        own = dict(zip(plan.names, rest, strict=False))
        saved = rest[len(own) :]
        folded = fold(own, plan)
        sums = {name: torch.zeros_like(weight) for name, weight in folded.items()}
        shares = in_order(weights, places)
        d_shares, d_rows = torch.empty_like(shares), torch.empty_like(kept)
        d_norm_out = torch.zeros_like(own["norm_out"]) if "norm_out" in own else None
        scratch = Scratch(kept)
        for e, span in reversed(plan.visited):
            share, y = shares[span], kept[span]
            dz = torch.index_select(grad, 0, token[span], out=d_rows[span])
            product = dz * y
            if d_norm_out is None:
                torch.sum(product, 1, out=d_shares[span])
                direct = torch.mul(dz, share.unsqueeze(1), out=product)
                dz.copy_(direct)
                loop_backward(e, dz, folded, sums, plan, saved, scratch)
                dz.sub_(direct)
            else:
                # d norm = inverse * (g - normed * mean(g * normed)) with g = dz * norm_out * share
                norm, inverse = own["norm_out"][e], saved.pop()
                torch.mv(product, norm, out=d_shares[span])
                torch.mv(product.t(), share, out=d_norm_out[e])
                scale = share.unsqueeze(1) * inverse
                inner = (d_shares[span].unsqueeze(1) * scale).div_(-y.shape[1])
                dz.mul_(norm).mul_(scale).addcmul_(y, inner)
                loop_backward(e, dz, folded, sums, plan, saved, scratch)
        gradients = unfold(own, sums, plan)
        if d_norm_out is not None:
            gradients["norm_out"] = d_norm_out
        d_stacks = [gradients[name] for name in plan.names]
        return sum_of_rows(d_rows, places), d_shares[places], None, None, None, *d_stacks


def fold(own: Weights, plan: Plan) -> Weights:
    """The stacked weights as the loop multiplies by them: norms inside."""
    folded = {name: own[name] for name in ("step_embedding", "down")}
    folded |= {name: own[name] * own["norm_mixer"].unsqueeze(1) for name in ("gate", "up")}
    folded["map"] = attention_map(own, plan).mul_(own["norm_attention"].unsqueeze(1))
    return folded if plan.frames is None else folded | {"o": own["o"]}


def unfold(own: Weights, sums: Weights, plan: Plan) -> Weights:
    """From gradients of the folded weights (overwritten) to those of the weights."""
    norm_mixer, norm = own["norm_mixer"].unsqueeze(1), own["norm_attention"].unsqueeze(1)
    grads = {name: sums[name] for name in sums if name in ("step_embedding", "down", "o")}
    grads["norm_mixer"] = (sums["gate"] * own["gate"]).sum(1) + (sums["up"] * own["up"]).sum(1)
    grads |= {name: sums[name].mul_(norm_mixer) for name in ("gate", "up")}
    grads["norm_attention"] = (sums["map"] * attention_map(own, plan)).sum(1)
    return grads | attention_map_backward(own, sums["map"].mul_(norm), plan)


def loop(e: int, rows: Tensor, folded: Weights, plan: Plan, saved: list[Tensor], scratch: Scratch) -> Tensor:
    """Expert e on its tokens' rows [n, D] -> z [n, D]; adds what the backward pass needs to `saved`."""
    own = {name: weight[e] for name, weight in folded.items()}
    frames = None if plan.frames is None else plan.frames[e]
    steps = own["step_embedding"].unbind(0)
    z = rows + steps[0]
    for s, step in enumerate(steps):
        if s:
            z.add_(step)
        inverse = inverse_rms(z, plan.eps)
        h = z * inverse
        if frames is None:
            z.addmm_(h, own["map"].t())
            kept = [h, inverse]
        else:
            joint = own["map"]
            projected = torch.mm(h, joint.t(), out=scratch.take("projected", h.shape[0], joint.shape[0]))
            heads, kept = attend_forward(projected, frames, scratch)
            z.addmm_(heads, own["o"].t())
            kept += [heads, h, inverse]
        inverse = inverse_rms(z, plan.eps)
        h = z * inverse
        g, u = h @ own["gate"].t(), h @ own["up"].t()
        hidden = torch.ops.aten.silu.out(g, out=scratch.take("hidden", *g.shape)).mul_(u)
        z.addmm_(hidden, own["down"].t())
        if plan.keeps:
            saved += [*kept, u, g, h, inverse]
    return z


def loop_backward(
    e: int, dz: Tensor, folded: Weights, sums: Weights, plan: Plan, saved: list[Tensor], scratch: Scratch
) -> None:
    """Turns the gradient of z into that of the rows, in place; takes what it needs off the end of `saved`."""
    own = {name: weight[e] for name, weight in folded.items()}
    total = {name: weight[e] for name, weight in sums.items()}
    frames = None if plan.frames is None else plan.frames[e]
    d_h = scratch.take("d_h", *dz.shape)
    d_hidden, hidden, d_u = (
        scratch.take(name, len(dz), own["gate"].shape[0]) for name in ("d_hidden", "hidden", "d_u")
    )
    for s in reversed(range(own["step_embedding"].shape[0])):
        inverse, h, g, u = (saved.pop() for _ in range(4))
        torch.mm(dz, own["down"], out=d_hidden)
        d_g = hidden_backward(d_hidden, g, u, hidden, d_u)
        total["down"].addmm_(dz.t(), hidden)
        total["gate"].addmm_(d_g.t(), h)
        total["up"].addmm_(d_u.t(), h)
        _add_norm_backward(dz, torch.mm(d_g, own["gate"], out=d_h).addmm_(d_u, own["up"]), h, inverse, scratch)

        inverse, h = saved.pop(), saved.pop()
        if frames is None:
            total["map"].addmm_(dz.t(), h)
            torch.mm(dz, own["map"], out=d_h)
        else:
            total["o"].addmm_(dz.t(), saved.pop())
            kept = take_attended(saved, frames)
            d_heads = torch.mm(dz, own["o"], out=scratch.take("d_heads", len(dz), own["o"].shape[1]))
            projected = attend_backward(d_heads, kept, frames, scratch)
            total["map"].addmm_(projected.t(), h)
            torch.mm(projected, own["map"], out=d_h)
        _add_norm_backward(dz, d_h, h, inverse, scratch)
        torch.sum(dz, 0, out=total["step_embedding"][s])


def _add_norm_backward(dz: Tensor, d_h: Tensor, h: Tensor, inverse: Tensor, scratch: Scratch) -> None:
    """dz += gradient of the norm's input, from that of h = z * inverse (overwritten)."""
    product = torch.mul(d_h, h, out=scratch.take("product", *h.shape))
    inner = product.mean(1, keepdim=True).neg_()
    dz.addcmul_(d_h.addcmul_(h, inner), inverse)
