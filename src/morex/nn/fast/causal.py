"""Causal attention of packed tokens: heads, turned or not, into frames, rows by batched products, back to flat tokens.

Queries and keys come out of their linear maps with the two channels of a pair side by side, so that the rotation is
one complex product. A permutation of channels that queries and keys share changes no score; values keep their order.
"""

from typing import Any

import torch
from torch import Tensor

from morex.nn.fast.frame import Frames
from morex.nn.fast.scratch import Scratch
from morex.nn.fast.switch import full_precision, full_precision_backward, run

BLOCK = 64
"""Queries that are taken together in long rows: fewer skip more of the upper triangle, more make larger products."""
ONE_BLOCK = 96
"""Rows up to this width are taken whole."""
LONGEST = 768
"""Wider rows go through `scaled_dot_product_attention`, which keeps no probabilities."""


def blocks_of(width: int) -> list[slice]:
    """The queries of each block."""
    size = width if width <= ONE_BLOCK else BLOCK
    return [slice(start, min(start + size, width)) for start in range(0, width, size)]


def mean_keys(width: float) -> float:
    """Keys that a query keeps the probability of, on average, in rows of about this width."""
    return width if width <= ONE_BLOCK else (width + BLOCK) / 2


def causal_rows(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> list[Tensor]:
    """Causal attention inside each row, scale 1.

    Args:
        q: queries of the S heads that share a key head [G, S * M, dim], head by head.
        k, v: [G, M, dim].
        out: takes the output, like q.

    Returns:
        The probabilities of each block of queries.
    """
    groups, width, _ = k.shape
    found = []
    for block in blocks_of(width):
        stop, size = block.stop, block.stop - block.start
        scores = torch.bmm(_queries(q, block, width), k[:, :stop].transpose(1, 2))
        never = q.new_full((size, size), -torch.inf).triu_(1)
        scores.view(groups, -1, size, stop)[..., block].add_(never)
        torch.softmax(scores, -1, out=scores)
        _bmm_into(scores, v[:, :stop], out, block, width)
        found.append(scores)
    return found


def causal_rows_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    found: list[Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
    scratch: Scratch,
) -> None:
    """Writes the `gradients` of q, k and v, from that of the output and the probabilities."""
    d_q, d_k, d_v = gradients
    width = k.shape[1]
    for block, scores in reversed(list(zip(blocks_of(width), found, strict=True))):
        stop = block.stop
        g, queries = _queries(grad, block, width), _queries(q, block, width)
        d_scores = torch.bmm(g, v[:, :stop].transpose(1, 2), out=scratch.take("d_scores", *scores.shape))
        torch.ops.aten._softmax_backward_data.out(d_scores, scores, -1, scores.dtype, grad_input=d_scores)
        if stop == width:
            torch.bmm(scores.transpose(1, 2), g, out=d_v)
            torch.bmm(d_scores.transpose(1, 2), queries, out=d_k)
        else:
            d_v[:, :stop].add_(torch.bmm(scores.transpose(1, 2), g))
            d_k[:, :stop].add_(torch.bmm(d_scores.transpose(1, 2), queries))
        _bmm_into(d_scores, k[:, :stop], d_q, block, width)


def _queries(x: Tensor, block: slice, width: int) -> Tensor:
    """A block of queries [G, S * size, dim] out of all [G, S * M, dim]."""
    if block.stop - block.start == width:
        return x
    if x.shape[1] == width:
        return x[:, block]
    return x.view(x.shape[0], -1, width, x.shape[2])[:, :, block].flatten(1, 2)


def _bmm_into(a: Tensor, b: Tensor, out: Tensor, block: slice, width: int) -> None:
    """Puts the product for a block of queries at its place in [G, S * M, dim]."""
    if block.stop - block.start == width:
        torch.bmm(a, b, out=out)
        return
    # Into a view, torch multiplies matrix by matrix.
    rows = out.view(out.shape[0], -1, width, out.shape[2])[:, :, block]
    rows.copy_(torch.bmm(a, b).view(rows.shape))


def joint_weight(q: Tensor, k: Tensor, v: Tensor, dim: int, scale: float) -> Tensor:
    """Query, key and value weights [..., C * dim, D] as one, pairs side by side, the scale inside the queries."""
    return torch.cat((_paired(q, dim) * scale, _paired(k, dim), v), -2)


def joint_weight_backward(grad: Tensor, queries: int, keys: int, dim: int, scale: float) -> list[Tensor]:
    """Gradients of the three weights, for `queries` and `keys` channels."""
    d_q, d_k, d_v = grad.split((queries, keys, keys), -2)
    return [_unpaired(d_q, dim) * scale, _unpaired(d_k, dim), d_v]


def _paired(weight: Tensor, dim: int) -> Tensor:
    """Puts channels i and i + dim / 2 of each head (the pairs of rotate-half) side by side.

    Heads of odd width, which never turn, stay as they are.
    """
    if dim % 2:
        return weight
    return weight.unflatten(-2, (-1, 2, dim // 2)).transpose(-3, -2).flatten(-4, -2)


def _unpaired(weight: Tensor, dim: int) -> Tensor:
    """The reverse of `_paired`."""
    if dim % 2:
        return weight
    return weight.unflatten(-2, (-1, dim // 2, 2)).transpose(-3, -2).flatten(-4, -2)


def fits(width: int) -> bool:
    """Whether rows of this width are better off here than in `scaled_dot_product_attention`."""
    return width <= LONGEST


def attend(projected: Tensor, frames: Frames) -> Tensor:
    """Causal attention, rotated where the frames have turns.

    Args:
        projected: x times the joint weight [N, (H + 2 KV) * dim].

    Returns:
        The heads' outputs [N, H * dim] in the dtype of `projected`. Computed in fp32 at least: on a CPU the gradient of
        bf16 attention takes several times as long as that of fp32.
    """
    wide = projected if projected.dtype == torch.float64 else projected.float()
    heads: Tensor = run(_Attend, wide, frames)
    return heads.to(projected.dtype)


class _Attend(torch.autograd.Function):
    """Saves the heads in their frames and the probabilities."""

    @staticmethod
    @full_precision
    def forward(ctx: Any, projected: Tensor, frames: Frames) -> Tensor:
        heads, saved = attend_forward(projected, frames, Scratch(projected))
        ctx.frames = frames
        ctx.save_for_backward(*saved)
        return heads

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return attend_backward(grad, list(ctx.saved_tensors), ctx.frames, Scratch(grad)), None


def attend_forward(projected: Tensor, frames: Frames, scratch: Scratch) -> tuple[Tensor, list[Tensor]]:
    """The heads' outputs [N, H * dim], and what the backward pass needs."""
    buffer = frames.load(projected)
    out = scratch.take("out", frames.places * frames.heads, frames.dim)
    saved = [buffer]
    for (q, k, v), part in zip(frames.frames(buffer), frames.outputs(out), strict=True):
        saved += causal_rows(q, k, v, part)
    return frames.collect(out), saved


def take_attended(saved: list[Tensor], frames: Frames) -> list[Tensor]:
    """Takes off the end of a list what `attend_forward` gave for its backward pass."""
    start = len(saved) - 1 - sum(len(blocks_of(width)) for _, width in frames.shapes)
    kept = saved[start:]
    del saved[start:]
    return kept


def attend_backward(grad: Tensor, saved: list[Tensor], frames: Frames, scratch: Scratch) -> Tensor:
    """Gradient of `projected` from that of the heads' outputs."""
    buffer, *found = saved
    d_buffer = scratch.take("d_buffer", *buffer.shape)
    d_out = frames.spread(grad, scratch)
    parts = zip(frames.outputs(d_out), frames.frames(buffer), frames.frames(d_buffer), strict=True)
    for g, (q, k, v), gradients in parts:
        count = len(blocks_of(k.shape[1]))
        causal_rows_backward(g, q, k, v, found[:count], gradients, scratch)
        found = found[count:]
    return frames.unload(d_buffer, scratch)
