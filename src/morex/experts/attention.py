"""Attention inside expert layers, on weights that the layer holds: q, k, v, o as in `nn.Linear`."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from morex.nn import fast
from morex.nn.attention import AttentionShape, KeyView, attend, attend_to, has_fast_rows, turn
from morex.nn.packing import Packing


def attend_routed(
    x: Tensor, w: Mapping[str, Tensor], shape: AttentionShape, packing: Packing, view: KeyView | None
) -> Tensor:
    """Causal attention over the tokens in hand and, with a view, those that came before; x [M, D] -> [M, D]."""
    n, rope = x.shape[0], shape.rope
    if view is None and rope is not None and has_fast_rows(packing) and x.dtype != torch.float16 and fast.available(x):
        projected = F.linear(x, fast.joint_weight(w["q"], w["k"], w["v"], shape.head_dim, shape.scale))
        frames = shape.frames(packing, rope, torch.promote_types(projected.dtype, torch.float32))
        return F.linear(fast.attend(projected, frames), w["o"])
    q = turn(F.linear(x, w["q"]).view(n, -1, shape.head_dim), packing, rope)
    k = turn(F.linear(x, w["k"]).view(n, -1, shape.head_dim), packing, rope)
    v = F.linear(x, w["v"]).view(n, -1, shape.head_dim)
    if view is None or view.append(k, v, packing):
        y = attend(q, k, v, packing, shape.scale)
    else:
        y = attend_to(q, packing, view.read(), shape.scale)
    return F.linear(y.reshape(n, -1), w["o"])


def attend_alone(x: Tensor, w: Mapping[str, Tensor], shape: AttentionShape) -> Tensor:
    """Attention of each token to itself only: softmax over one key is 1, so it is W_o W_v. x [M, D] -> [M, D]."""
    return F.linear(for_query_heads(F.linear(x, w["v"]), 1, shape), w["o"])


def for_query_heads(values: Tensor, dim: int, shape: AttentionShape) -> Tensor:
    """Repeats each value head for its group of query heads; `dim` holds KV * head_dim and becomes H * head_dim."""
    heads = values.unflatten(dim, (shape.kv_heads, shape.head_dim))
    return heads.repeat_interleave(shape.heads // shape.kv_heads, dim=dim).flatten(dim, dim + 1)
