"""Where flat tokens stand in the padded frames that attention works on."""

from collections import Counter
from operator import itemgetter

import torch
from torch import Tensor

from morex.nn.fast.scratch import Scratch

ALIGNMENT = 8
"""Widths of frames with padding are multiples of this: softmax over a ragged width takes up to twice as long."""
FRAME_COST = 30_000
"""What the calls for one more frame cost, in scores."""


class Frames:
    """The right-padded frames of N tokens: one where no row needs padding, else several, by length of row.

    The heads of all frames share a buffer [A * (H + 2 KV), dim], A the places of all frames together: the queries of
    each frame [R, H, M, dim], then its keys [R, KV, M, dim], then its values; frame by frame within each kind.
    """

    def __init__(
        self,
        row: Tensor,
        rank: Tensor,
        rows: int,
        width: int,
        turns: Tensor | None,
        heads: int,
        kv_heads: int,
        dim: int,
    ) -> None:
        """Args:
        row, rank: of each token [N], rows ascending.
        rows, width: rows R of the batch, and the longest.
        turns: exp(i * angle) of each token and pair of channels [N, dim / 2]; None where heads do not turn.
        heads, kv_heads, dim: H, KV and the width of a head.
        """
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.kinds = (heads, kv_heads, kv_heads)
        self.is_full = row.shape[0] == rows * width
        self.shapes = [(rows, width)]
        token = None if self.is_full else self._index(row, rank, rows)
        if turns is not None and token is not None:
            # torch gathers real numbers several times as fast as complex ones.
            turns = torch.view_as_complex(torch.view_as_real(turns).index_select(0, token))
        self.turns = turns
        self.turns_back = None if turns is None else turns.conj().resolve_conj()
        self._areas = [size * width * count for count in self.kinds for size, width in self.shapes]

    @property
    def places(self) -> int:
        """Places A of all frames together."""
        return sum(rows * width for rows, width in self.shapes)

    def _index(self, row: Tensor, rank: Tensor, rows: int) -> Tensor:
        """Sorts rows by length into frames, lists where the heads of each token stand; token at each place [A]."""
        lengths = torch.bincount(row, minlength=rows)
        self.shapes = widths_of(lengths.tolist(), self.heads)
        first, pitch = torch.empty_like(lengths), torch.empty_like(lengths)
        start = 0
        for members, (size, width) in zip(
            lengths.argsort().split([size for size, _ in self.shapes]), self.shapes, strict=True
        ):
            first[members] = start + torch.arange(size) * width
            pitch[members] = width
            start += size * width
        first, pitch = first[row], pitch[row].unsqueeze(1)

        def stand(heads: int, before: int) -> Tensor:
            """Row of the buffer of each head of each token [N, heads], in an area that starts after `before` rows."""
            return (first * heads + rank + before).unsqueeze(1) + pitch * torch.arange(heads)

        places, queries, keys = self.places, self.places * self.heads, self.places * self.kv_heads
        of_queries = stand(self.heads, 0)
        self._place = torch.cat((of_queries, stand(self.kv_heads, queries), stand(self.kv_heads, queries + keys)), 1)
        self._out_place = of_queries
        self._source = _holders(self._place, queries + 2 * keys).clamp_(min=0)
        self._out_source = _holders(of_queries, queries)
        self._out_padding = (self._out_source < 0).nonzero().squeeze(1)
        self._out_source.clamp_(min=0)
        return _holders(first + rank, places).clamp_(min=0)

    def load(self, x: Tensor) -> Tensor:
        """Projections [N, (H + 2 KV) * dim], pairs of channels of queries and keys side by side -> the buffer.

        Queries and keys are turned, where heads turn. Padding holds copies of some token.
        """
        if not self.is_full:
            buffer = x.reshape(-1, self.dim).index_select(0, self._source.flatten())
            self._turn(buffer, self.turns)
            return buffer
        buffer = x.new_empty(x.numel() // self.dim, self.dim)
        areas, tokens = self._only_frame(buffer), self._by_kind(x)
        turns = None if self.turns is None else self.turns.view(*self.shapes[0], 1, -1)
        for area, part, may_turn in zip(areas, tokens, (True, True, False), strict=True):
            if turns is not None and may_turn:
                torch.mul(as_pairs(part), turns, out=as_pairs(area))
            else:
                area.copy_(part)
        return buffer

    def unload(self, buffer: Tensor, scratch: Scratch) -> Tensor:
        """The gradient of `load`, from that of its buffer (overwritten)."""
        self._turn(buffer, self.turns_back)
        if not self.is_full:
            rows = scratch.take("unloaded", self._place.numel(), self.dim)
            torch.index_select(buffer, 0, self._place.flatten(), out=rows)
            return rows.view(self._place.shape[0], -1)
        x = buffer.new_empty(self.places, sum(self.kinds) * self.dim)
        for part, area in zip(self._by_kind(x), self._only_frame(buffer), strict=True):
            part.copy_(area)
        return x

    def _turn(self, buffer: Tensor, turns: Tensor | None) -> None:
        """Turns queries and keys in place."""
        if turns is None:
            return
        areas, frames = buffer.split(self._areas), len(self.shapes)
        parts = turns.split([rows * width for rows, width in self.shapes])
        for i, ((rows, width), own) in enumerate(zip(self.shapes, parts, strict=True)):
            for area in (areas[i], areas[frames + i]):
                as_pairs(area.view(rows, -1, width, self.dim)).mul_(own.view(rows, 1, width, -1))

    def _only_frame(self, buffer: Tensor) -> list[Tensor]:
        """Queries, keys and values of the only frame, as [R, M, C, dim]."""
        rows, width = self.shapes[0]
        return [area.view(rows, -1, width, self.dim).transpose(1, 2) for area in buffer.split(self._areas)]

    def _by_kind(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of flat tokens without padding, as [R, M, C, dim]."""
        return x.reshape(*self.shapes[0], -1, self.dim).split(self.kinds, 2)

    def frames(self, buffer: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Queries [G, S * M, dim], keys and values [G, M, dim] of each frame; G = R * KV, S = H / KV."""
        areas, count = buffer.split(self._areas), len(self.shapes)
        groups = [rows * self.kv_heads for rows, _ in self.shapes]
        q, k, v = (
            [area.view(size, -1, self.dim) for area, size in zip(areas[i : i + count], groups, strict=True)]
            for i in range(0, 3 * count, count)
        )
        return list(zip(q, k, v, strict=True))

    def outputs(self, buffer: Tensor) -> list[Tensor]:
        """Rows for each query head [A * H, dim] -> views [G, S * M, dim], one a frame."""
        areas = buffer.split(self._areas[: len(self.shapes)])
        return [
            area.view(rows * self.kv_heads, -1, self.dim) for area, (rows, _) in zip(areas, self.shapes, strict=True)
        ]

    def collect(self, outputs: Tensor) -> Tensor:
        """Rows for each query head [A * H, dim] -> flat heads [N, H * dim], in memory of their own."""
        if self.is_full:
            rows, width = self.shapes[0]
            heads = outputs.new_empty(rows, width, self.heads, self.dim)
            return heads.copy_(outputs.view(rows, self.heads, width, self.dim).transpose(1, 2)).view(self.places, -1)
        return outputs.index_select(0, self._out_place.flatten()).view(-1, self.heads * self.dim)

    def spread(self, grad: Tensor, scratch: Scratch) -> Tensor:
        """The gradient of `collect`: flat heads [N, H * dim] -> rows [A * H, dim], zero at padding."""
        if self.is_full:
            rows, width = self.shapes[0]
            return grad.view(rows, width, self.heads, self.dim).transpose(1, 2).reshape(-1, self.dim)
        spread = scratch.take("spread", self._out_source.numel(), self.dim)
        torch.index_select(grad.reshape(-1, self.dim), 0, self._out_source.flatten(), out=spread)
        return spread.index_fill_(0, self._out_padding, 0)


def as_pairs(x: Tensor) -> Tensor:
    """[..., dim] -> complex [..., dim / 2] in the same memory."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def widths_of(lengths: list[int], heads: int) -> list[tuple[int, int]]:
    """Rows and width of each frame, narrow ones first: the partition of the rows by length that costs least.

    A frame costs its scores and, for its calls, as much as `FRAME_COST` scores.
    """
    counts = Counter(max(1, -(-length // ALIGNMENT)) * ALIGNMENT for length in lengths)
    widths = sorted(counts)
    best: list[tuple[float, list[tuple[int, int]]]] = [(0.0, [])]
    for last, width in enumerate(widths, start=1):
        choices = []
        rows = 0
        for first in range(last - 1, -1, -1):
            rows += counts[widths[first]]
            cost, frames = best[first]
            choices.append((cost + heads * rows * width * width + FRAME_COST, [*frames, (rows, width)]))
        best.append(min(choices, key=itemgetter(0)))
    return best[-1][1]


def _holders(places: Tensor, size: int) -> Tensor:
    """Which entry of `places` stands at each of 0..size-1, or -1 for none."""
    flat = places.flatten()
    return torch.full((size,), -1).scatter_(0, flat, torch.arange(flat.shape[0]))
