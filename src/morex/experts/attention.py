"""Attention inside expert layers, on weights that the layer holds: q, k, v, o as in `nn.Linear`, stacked by expert."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from morex.experts.dispatch import expert_linear
from morex.nn import fast
from morex.nn.attention import AttentionShape, KeyView, attend, attend_to, has_fast_rows, turn
from morex.nn.mixers import ExpertViews
from morex.nn.packing import Packing

Attend = Callable[[Tensor, int], Tensor]
"""Attention as a function of rows [M, D] and step."""


def cache_slots(views: ExpertViews | None, experts: int, steps: int) -> list[list[KeyView | None]] | None:
    """The slots of each expert's steps, or None where no cache outlives the call."""
    if views is None or views.expert(0, 0) is None:
        return None
    return [[views.expert(e, s) for s in range(steps)] for e in range(experts)]


def attend_routed(
    w: Mapping[str, Tensor],
    shape: AttentionShape,
    packing: Packing,
    counts: list[int],
    slots: Sequence[KeyView | None] | None = None,
) -> Attend:
    """Causal attention of experts on their own rows, and on those that came before.

    Args:
        w: weights of the experts [E, ...].
        packing: the M rows, expert by expert; each expert has rows of its own.
        counts: rows of each expert.
        slots: the cache slot of each step, for one expert alone.
    """
    dim, joint = shape.head_dim, None
    if slots is None and shape.rope is not None and has_fast_rows(packing) and fast.available(w["q"]):
        joint = fast.joint_weight(w["q"], w["k"], w["v"], dim, shape.scale)

    def attention(x: Tensor, step: int) -> Tensor:
        if joint is not None and x.dtype != torch.float16:
            projected = expert_linear(x, joint, counts)
            frames = shape.frames(packing, shape.rope, torch.promote_types(projected.dtype, torch.float32))
            return expert_linear(fast.attend(projected, frames), w["o"], counts)
        q, k, v = (expert_linear(x, w[name], counts).view(x.shape[0], -1, dim) for name in "qkv")
        q, k = turn(q, packing, shape.rope), turn(k, packing, shape.rope)
        slot = None if slots is None else slots[step]
        if slot is None or slot.append(k, v, packing):
            y = attend(q, k, v, packing, shape.scale)
        else:
            y = attend_to(q, packing, slot.read(), shape.scale)
        return expert_linear(y.flatten(1), w["o"], counts)

    return attention


def attend_alone(w: Mapping[str, Tensor], shape: AttentionShape, counts: list[int]) -> Attend:
    """Attention of each token to itself only: softmax over one key is 1, so it is W_o W_v."""

    def attention(x: Tensor, step: int) -> Tensor:
        return expert_linear(for_query_heads(expert_linear(x, w["v"], counts), 1, shape), w["o"], counts)

    return attention


def for_query_heads(values: Tensor, dim: int, shape: AttentionShape) -> Tensor:
    """Repeats each value head for its group of query heads; `dim` holds KV * head_dim and becomes H * head_dim."""
    heads = values.unflatten(dim, (shape.kv_heads, shape.head_dim))
    return heads.repeat_interleave(shape.heads // shape.kv_heads, dim=dim).flatten(dim, dim + 1)
