"""Causal attention with grouped key/value heads over flat tokens, with or without cached keys."""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morex.nn import fast
from morex.nn.costs import AttentionCosts, Costs, Kept, Rows, linear_costs
from morex.nn.keys import NEVER, Keys, KeyView, PagedKeys
from morex.nn.linear import Linear
from morex.nn.low_rank import Changes, changed
from morex.nn.packing import Packing
from morex.nn.rope import Rope, rotate


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of each token over its row of the packing.

    Args:
        q: [N, H, dim]; k and v: [N, KV, dim], KV dividing H.
        scale: factor on the scores.
        window: how far back a query sees in time, its own token included; None: to the first token.
        dropout: share of the probabilities to drop.

    Returns:
        [N, H, dim].
    """
    mask = None
    if packing.documents is not None:
        documents = packing.pad(packing.documents, -1)
        time = torch.arange(packing.width, device=q.device)
        mask = (documents[:, :, None] == documents[:, None, :]) & (time[:, None] >= time)
    if window is not None and window < packing.span:
        rank = torch.arange(packing.width, device=q.device)
        time = packing.pad(packing.time)
        near = (time[:, :, None] - time[:, None, :] < window) & (rank[:, None] >= rank)
        mask = near if mask is None else mask & near
    frame = _sdpa(packing.pad(q), packing.pad(k), packing.pad(v), mask, scale, dropout)
    return packing.unpad(frame)


def attend_to(
    q: Tensor,
    packing: Packing,
    keys: Keys | PagedKeys,
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of queries [N, H, dim] to stored keys that are not later than they. Returns [N, H, dim].

    With a window, only to keys that are less than so many tokens earlier in time. `dropout`: as in `attend`.
    """
    if isinstance(keys, PagedKeys):
        if fast.reads_pages(q, keys.k) and not dropout:
            return _attend_to_pages(q, packing, keys, scale, window)
        keys = keys.padded()
    query_time = packing.pad(packing.time, NEVER)
    mask = keys.time[:, None, :] <= query_time[:, :, None]
    if packing.documents is not None and keys.documents is not None:
        mask &= packing.pad(packing.documents, -1)[:, :, None] == keys.documents[:, None, :]
    if window is not None:
        mask &= keys.time[:, None, :] > query_time[:, :, None] - window
    # Padding may look at the first key: its output is dropped, but an empty row would be NaN and poison gradients.
    mask[:, :, 0] |= query_time == NEVER
    return packing.unpad(_sdpa(packing.pad(q), keys.k, keys.v, mask, scale, dropout))


def _attend_to_pages(q: Tensor, packing: Packing, keys: PagedKeys, scale: float, window: int | None) -> Tensor:
    """`attend_to` where the keys stand: short rows read them in their pages, long ones from a copy."""
    short, long = packing.by_length
    if long is None:
        return fast.attend_pages(q, keys.k, keys.v, keys.pages, *keys.entries.seen_by(packing, window), scale)
    y = torch.empty_like(q)
    rows, index, part = long
    y[index] = attend_to(q[index], part, keys.of_rows(rows).padded(), scale, window)
    if short.shape[0]:
        row, start, end = (of_query[short] for of_query in keys.entries.seen_by(packing, window))
        y[short] = fast.attend_pages(q[short], keys.k, keys.v, keys.pages, row, start, end, scale)
    return y


def attend_cached(
    q: Tensor, packing: Packing, keys: Keys | PagedKeys, scale: float, window: int | None = None, dropout: float = 0.0
) -> Tensor:
    """`attend_to`, without a mask where each row has its newest token alone and this sees all keys of its row."""
    is_newest = packing.span == 1 and packing.is_full
    if not (is_newest and isinstance(keys, Keys) and keys.is_full and _all_near(packing, keys, window)):
        return attend_to(q, packing, keys, scale, window, dropout)
    if fast.reads_pages(q, keys.k) and not dropout:
        return fast.attend_rows(q, keys.k, keys.v, scale)
    k, v = keys.k.transpose(1, 2), keys.v.transpose(1, 2)
    gqa = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q[:, :, None], k, v, dropout_p=dropout, scale=scale, enable_gqa=gqa)
    return y[:, :, 0]


def _all_near(packing: Packing, keys: Keys, window: int | None) -> bool:
    """Whether the newest token of each row sees all its keys; few keys may reach far back where others left earlier."""
    if window is None:
        return True
    return keys.k.shape[1] <= window and bool((keys.time[:, 0] > packing.time - window).all())


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    """q [B, M, H, dim], k and v [B, S, KV, dim], mask [B, M, S] or None for causal -> [B, M, H, dim]."""
    frame = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None],
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return frame.transpose(1, 2)


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention: of a block's, and of the experts' inside it."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    """How queries and keys turn where a step does not say otherwise; None: not at all."""
    bias: bool = False
    """Whether queries, keys and values have biases."""
    output_bias: bool = False

    def frames(self, packing: Packing, rope: Rope | None, dtype: torch.dtype) -> fast.Frames:
        """Where the fast path puts heads of this shape."""
        return packing.frames(self.heads, self.kv_heads, self.head_dim, rope, dtype)


@dataclass(frozen=True)
class Local:
    """What a step with a sliding window does otherwise."""

    window: int
    """Keys that a query may see, its own included."""
    rope: Rope | None


def turn(heads: Tensor, packing: Packing, rope: Rope | None) -> Tensor:
    """Queries or keys [N, H, dim] of the packing's tokens, turned by their positions."""
    turns = _turns(heads, packing, heads.shape[-1], rope)
    return heads if turns is None else rotate(heads, turns)


def _turns(x: Tensor, packing: Packing, dim: int, rope: Rope | None) -> tuple[Tensor, Tensor] | None:
    """By what heads of the packing's tokens turn, for states x; None: not at all."""
    return None if rope is None else packing.turns(dim, rope, torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Projection:
    """Which heads an attention makes of its tokens at one step."""

    is_joint: bool = False
    """Whether queries, keys and values are one product, as `fast.attend` takes it."""
    turns: tuple[Tensor, Tensor] | None = None
    """By what queries and keys turn, as `rotate` takes it."""
    writes: bool = True
    """Whether there are keys and values, or queries alone."""


class Attention(nn.Module):
    """Grouped-query causal attention, with rotary positions or without (Ainslie et al. 2023; Su et al. 2021)."""

    def __init__(
        self,
        d_model: int,
        shape: AttentionShape,
        norm_q: nn.Module | None = None,
        norm_k: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        """Args:
        norm_q, norm_k: norms of each head of queries and keys, over head_dim channels (Henry et al. 2020).
        dropout: share of the probabilities that training drops.
        """
        super().__init__()
        heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.q = Linear(d_model, heads * head_dim, bias=shape.bias)
        self.k = Linear(d_model, kv_heads * head_dim, bias=shape.bias)
        self.v = Linear(d_model, kv_heads * head_dim, bias=shape.bias)
        self.o = Linear(heads * head_dim, d_model, bias=shape.output_bias)
        self.norm_q, self.norm_k = norm_q, norm_k
        self.shape, self.dropout = shape, dropout

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        view: KeyView | None = None,
        local: Local | None = None,
        changes: Changes | None = None,
    ) -> Tensor:
        """x [N, D] -> [N, D]; with a view, keys are added to its slot and read from it.

        Args:
            local: of a local step.
            changes: of the maps `q`, `k`, `v` and `o` at this step.
        """
        projection = self.projection(x, packing, view, local, changes)
        projected = self.project(x, projection, changes)
        return self.output(self.mix(projected, projection, packing, view, local), changes)

    def projection(
        self,
        x: Tensor,
        packing: Packing,
        view: KeyView | None = None,
        local: Local | None = None,
        changes: Changes | None = None,
    ) -> Projection:
        """Which heads `project` makes for `mix`; arguments as of `forward`."""
        rope, window = self._sight(local)
        if view is None and not changes and self._has_fast_path(x, packing, window):
            return Projection(is_joint=True)
        turns = _turns(x, packing, self.shape.head_dim, rope)
        return Projection(turns=turns, writes=view is None or view.writes)

    def project(self, x: Tensor, projection: Projection, changes: Changes | None = None) -> list[Tensor]:
        """From x [N, D] queries [N, H, dim], and maybe keys and values [N, KV, dim]; or all in one [N, C * dim]."""
        own, dim = changes or {}, self.shape.head_dim
        if projection.is_joint:
            weight = fast.joint_weight(self.q.weight, self.k.weight, self.v.weight, dim, self.shape.scale)
            return [F.linear(x, weight)]
        maps, turns = (self.q, self.k, self.v) if projection.writes else (self.q,), projection.turns
        is_known = not own and not self.shape.bias and self.norm_q is None
        if is_known and fast.takes_rows(x, *[linear.weight for linear in maps]):
            return fast.project(x, [linear.weight for linear in maps], turns, dim)
        made = [
            changed(linear, x, own.get(name)).view(x.shape[0], -1, dim)
            for name, linear in zip("qkv", maps, strict=False)
        ]
        normed = [_normed(heads, norm) for heads, norm in zip(made, (self.norm_q, self.norm_k), strict=False)]
        return [heads if turns is None else rotate(heads, turns) for heads in normed] + made[2:]

    def mix(
        self,
        projected: list[Tensor],
        projection: Projection,
        packing: Packing,
        view: KeyView | None = None,
        local: Local | None = None,
    ) -> Tensor:
        """From what `project` made, what each token's queries find [N, H * dim]; other arguments as of `forward`."""
        rope, window = self._sight(local)
        q, *written = projected
        if projection.is_joint:
            return fast.attend(q, self.shape.frames(packing, rope, torch.promote_types(q.dtype, torch.float32)))
        dropout = self.dropout if self.training else 0.0
        if written:
            k, v = written
            if view is None or view.append(k, v, packing):
                return attend(q, k, v, packing, self.shape.scale, window, dropout).flatten(1)
        assert view is not None
        return attend_cached(q, packing, view.read(), self.shape.scale, window, dropout).flatten(1)

    def output(self, heads: Tensor, changes: Changes | None = None) -> Tensor:
        """Heads [N, H * dim] -> [N, D]."""
        return changed(self.o, heads, (changes or {}).get("o"))

    def _sight(self, local: Local | None) -> tuple[Rope | None, int | None]:
        """How heads turn at a step, and how far they see."""
        return (self.shape.rope, None) if local is None else (local.rope, local.window)

    def _has_fast_path(self, x: Tensor, packing: Packing, window: int | None) -> bool:
        # fp16 stays where it is: its range is too small for sums in another order.
        drops = self.training and self.dropout > 0
        is_known = not self.shape.bias and self.norm_q is None and not drops
        sees_all = window is None or window >= packing.span
        return is_known and sees_all and has_fast_rows(packing) and x.dtype != torch.float16 and fast.available(x)


def _normed(heads: Tensor, norm: nn.Module | None) -> Tensor:
    """Heads [N, H, dim], each through the norm where there is one."""
    if norm is None:
        return heads
    normed: Tensor = norm(heads)
    return normed.to(heads.dtype)


def has_fast_rows(packing: Packing) -> bool:
    """Whether `morex.nn.fast` knows rows like these: some tokens, none of them hidden by documents, not too wide."""
    return packing.documents is None and packing.num_tokens > 0 and fast.fits(packing.width)


def attention_maps(d_model: int, shape: AttentionShape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear maps of `Attention`, by name."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {"q": (d_model, queries), "k": (d_model, keys), "v": (d_model, keys), "o": (queries, d_model)}


def attention_costs(d_model: int, shape: AttentionShape) -> Costs:
    """Closed-form costs of `Attention`, its norms left out; its input counts as kept where it is cast."""
    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    queries, keys = linear_costs(d_model, heads * head_dim), linear_costs(d_model, 2 * kv_heads * head_dim)
    output = linear_costs(heads * head_dim, d_model)
    kept = partial(kept_heads, shape)
    pairs = AttentionCosts(4.0 * heads * head_dim, key_values=2 * kv_heads * head_dim, kept=kept)
    biases = shape.bias * (heads + 2 * kv_heads) * head_dim + shape.output_bias * d_model
    joined = replace(queries + keys, cast_weights=Kept(0.0, 2.0 * (queries.parameters + keys.parameters)))
    return joined + output + Costs(biases, 0.0, (pairs,), keys.per_token)


def kept_heads(shape: AttentionShape, rows: Rows) -> Kept:
    """What a token's heads keep: queries, keys, values, outputs and one number a head.

    The fast path for short rows keeps the probabilities too. The plain one keeps what stands in frames with padding as
    it was before as well, and a mask as it is and as numbers.
    """
    queries, keys = shape.heads * shape.head_dim, 2 * shape.kv_heads * shape.head_dim * rows.makes_keys
    once = 2 * queries + keys
    values, mask = once if rows.are_even else 2 * once, 5.0 * rows.masked
    plain, cast = (size * values + 4.0 * shape.heads + mask for size in (4, 2))
    if not has_fast_heads(shape, rows):
        return Kept.alike(plain, cast)
    fast_heads = 4.0 * (queries + keys) + 4.0 * shape.heads * fast.mean_keys(rows.width)
    return Kept(plain, cast, fast_heads + 4.0 * queries, fast_heads + 2.0 * queries)


def kept_beside_heads(d_model: int, shape: AttentionShape, rows: Rows) -> Costs:
    """What a visit of `Attention` keeps beside its heads: its input where it is cast, and joint or cast weights."""
    queries, keys = shape.heads * shape.head_dim, 2 * shape.kv_heads * shape.head_dim * rows.makes_keys
    maps = 3 if rows.makes_keys else 1
    copies = Kept.alike(0.0, 2.0 * maps * d_model)
    if not has_fast_heads(shape, rows):
        return Costs(kept=copies)
    joint = d_model * (queries + keys)  # one map of three
    return Costs(kept=replace(copies, fast_bf16=2.0 * d_model), kept_weights=Kept(0.0, 0.0, 4.0 * joint, 2.0 * joint))


def has_fast_heads(shape: AttentionShape, rows: Rows) -> bool:
    """Whether a CPU takes such rows by the fast path."""
    return not (shape.bias or rows.is_plain or rows.masked) and fast.fits(math.ceil(rows.width))
