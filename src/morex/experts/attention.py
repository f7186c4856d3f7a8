"""Attention inside expert layers, on weights that the layer holds: q, k, v, o as in `nn.Linear`, stacked by expert."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from morex.experts.dispatch import expert_linear
from morex.nn import fast
from morex.nn.attention import AttentionShape, attend, attend_cached, has_fast_rows, turn
from morex.nn.keys import KeyView
from morex.nn.mixers import ExpertViews
from morex.nn.packing import Packing


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """Which tokens stand in the rows [M, D] that experts work on, expert by expert."""

    packing: Packing
    """All tokens of the layer."""
    token: Tensor
    """Token of each row [M], an index into the packing's list, ascending for each expert."""
    counts: list[int]
    """Rows of each expert."""

    @cached_property
    def together(self) -> Packing:
        """All rows in one frame; each expert has rows of its own."""
        if len(self.counts) == 1:
            return self.packing.select(self.token)
        return self.packing.group(self.token, self.counts)

    @cached_property
    def apart(self) -> list[Packing | None]:
        """The rows of each expert, in the rows of the batch; None for an expert without any."""
        tokens = zip(self.token.split(self.counts), self.counts, strict=True)
        return [self.packing.select(token) if count else None for token, count in tokens]

    def select(self, index: Tensor | None) -> "ExpertRows":
        """The rows at `index` [M'], ascending; None for all."""
        if index is None:
            return self
        expert = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts)).to(index.device)
        counts = torch.bincount(expert[index], minlength=len(self.counts)).tolist()
        return ExpertRows(self.packing, self.token[index], counts)


Attend = Callable[[Tensor, ExpertRows, int], Tensor]
"""Attention as a function of rows [M, D], of what stands in them, and of the step."""


def outlives(views: ExpertViews | None) -> bool:
    """Whether there is a cache that outlives the call."""
    return views is not None and views.expert(0, 0) is not None


def cache_slots(views: ExpertViews | None, experts: int, steps: int) -> list[list[KeyView | None]] | None:
    """The slots of each expert's steps, or None where no cache outlives the call."""
    if views is None or not outlives(views):
        return None
    return [[views.expert(e, s) for s in range(steps)] for e in range(experts)]


def fast_plan(
    x: Tensor, w: Mapping[str, Tensor], shape: AttentionShape, eps: float, rows: ExpertRows, together: bool
) -> fast.Plan | None:
    """How `morex.nn.fast` takes experts with these weights, without a cache; None where it cannot.

    Args:
        x: what the experts work on, [..., D].
        w: weights of the experts [E, ...]; with queries and keys where attention is over an expert's own rows.
        eps: of the norms.
        together: whether all experts' rows stand in frames in common.
    """
    routed = "q" in w
    if routed and not has_fast_rows(rows.packing):
        return None
    if not x.shape[0] or not fast.usable(x, *w.values()):
        return None
    frames = None
    if routed:
        packings = [rows.together] if together else rows.apart
        frames = [None if own is None else shape.frames(own, shape.rope, x.dtype) for own in packings]
    return fast.Plan(rows.counts, eps, shape.head_dim, shape.scale, frames, tuple(w), torch.is_grad_enabled())


def attend_routed(
    w: Mapping[str, Tensor], shape: AttentionShape, slots: list[list[KeyView | None]] | None = None
) -> Attend:
    """Causal attention of experts on their own rows, and on those that came before.

    Args:
        w: weights of the experts [E, ...].
        slots: the cache slots of each expert's steps.
    """
    dim, fast_weights = shape.head_dim, None
    if slots is None and fast.available(w["q"]):
        fast_weights = fast.joint_weight(w["q"], w["k"], w["v"], dim, shape.scale)

    def attention(x: Tensor, rows: ExpertRows, step: int) -> Tensor:
        counts = rows.counts
        if fast_weights is not None and has_fast_rows(rows.together) and x.dtype != torch.float16:
            projected = expert_linear(x, fast_weights, counts)
            wide = torch.promote_types(projected.dtype, torch.float32)
            y = fast.attend(projected, shape.frames(rows.together, shape.rope, wide))
            return expert_linear(y, w["o"], counts)
        q, k, v = (expert_linear(x, w[name], counts).view(x.shape[0], -1, dim) for name in "qkv")
        if slots is None:
            q, k = turn(q, rows.together, shape.rope), turn(k, rows.together, shape.rope)
            return expert_linear(attend(q, k, v, rows.together, shape.scale).flatten(1), w["o"], counts)
        parts = zip(q.split(counts), k.split(counts), v.split(counts), rows.apart, slots, strict=True)
        made = [_attend_cached(q, k, v, own, shape, slot[step]) for q, k, v, own, slot in parts if own is not None]
        y = torch.cat(made) if made else q
        return expert_linear(y.flatten(1), w["o"], counts)

    return attention


def _attend_cached(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, shape: AttentionShape, slot: KeyView | None
) -> Tensor:
    """Heads [N, H, dim] of one expert, which its slot takes in; returns [N, H, dim]."""
    q, k = turn(q, packing, shape.rope), turn(k, packing, shape.rope)
    if slot is None or slot.append(k, v, packing):
        return attend(q, k, v, packing, shape.scale)
    return attend_cached(q, packing, slot.read(), shape.scale)


def attend_alone(w: Mapping[str, Tensor], shape: AttentionShape) -> Attend:
    """Attention of each token to itself only: softmax over one key is 1, so it is W_o W_v."""

    def attention(x: Tensor, rows: ExpertRows, step: int) -> Tensor:
        values = expert_linear(x, w["v"], rows.counts)
        return expert_linear(for_query_heads(values, 1, shape), w["o"], rows.counts)

    return attention


def attend_alone_folded(w: Mapping[str, Tensor], shape: AttentionShape) -> Attend:
    """`attend_alone` with one product W_o W_v [D, D] for each expert, which is made once and pays for many rows."""
    folded = w["o"] @ for_query_heads(w["v"], 1, shape)

    def attention(x: Tensor, rows: ExpertRows, step: int) -> Tensor:
        return expert_linear(x, folded, rows.counts)

    return attention


def for_query_heads(values: Tensor, dim: int, shape: AttentionShape) -> Tensor:
    """Repeats each value head for its group of query heads; `dim` holds KV * head_dim and becomes H * head_dim."""
    heads = values.unflatten(dim, (shape.kv_heads, shape.head_dim))
    return heads.repeat_interleave(shape.heads // shape.kv_heads, dim=dim).flatten(dim, dim + 1)
