"""Where flat tokens stand in the padded frames that attention works on."""

import torch
from torch import Tensor

ALIGNMENT = 16
"""Widths of frames with padding are multiples of this: softmax over a ragged width takes up to twice as long."""


class Frames:
    """The right-padded frames of N tokens: one where no row needs padding, else one of short rows and one of long.

    The heads of all frames share a buffer [A * (H + 2 KV), dim], A the places of all frames together: the queries of
    each frame [R, H, M, dim], then its keys [R, KV, M, dim], then its values; frame by frame within each kind.
    """

    def __init__(
        self, row: Tensor, rank: Tensor, rows: int, width: int, turns: Tensor, heads: int, kv_heads: int
    ) -> None:
        """Args:
        row, rank: of each token [N], rows ascending.
        rows, width: rows R of the batch, and the longest.
        turns: exp(i * angle) of each token and pair of channels [N, dim / 2].
        heads, kv_heads: H and KV.
        """
        self.heads, self.kv_heads, self.dim = heads, kv_heads, 2 * turns.shape[1]
        self.turns = turns.unsqueeze(1)
        self.turns_back = self.turns.conj().resolve_conj()
        self.shapes, self.places = [(rows, width)], rows * width
        self.is_full = row.shape[0] == self.places
        if not self.is_full:
            self._index(row, rank, rows)
        kinds = (heads, kv_heads, kv_heads)
        self._sizes = [size * count * width for count in kinds for size, width in self.shapes]

    def _index(self, row: Tensor, rank: Tensor, rows: int) -> None:
        """Sorts rows by length into frames and lists where each head of each token stands."""
        lengths = torch.bincount(row, minlength=rows)
        order = lengths.argsort()
        first, pitch = torch.empty_like(order), torch.empty_like(order)
        self.shapes, self.places = two_frames(lengths.tolist()), 0
        for members, (size, width) in zip(order.split([size for size, _ in self.shapes]), self.shapes, strict=True):
            first[members] = self.places + torch.arange(size) * width
            pitch[members] = width
            self.places += size * width
        first, pitch = first[row], pitch[row].unsqueeze(1)

        def stand(heads: int, before: int) -> Tensor:
            """Row of the buffer of each head of each token [N, heads], in an area that starts after `before` rows."""
            return (first * heads + rank + before).unsqueeze(1) + pitch * torch.arange(heads)

        queries, keys = self.places * self.heads, self.places * self.kv_heads
        of_queries = stand(self.heads, 0)
        of_all = torch.cat((of_queries, stand(self.kv_heads, queries), stand(self.kv_heads, queries + keys)), 1)
        self._out_place = of_queries.flatten().int()
        self._out_source = _inverted(self._out_place, queries)
        self._place = of_all.flatten().int()
        self._source = _inverted(self._place, queries + 2 * keys).clamp_(min=0)
        self._padding = (self._out_source < 0).nonzero().squeeze(1)
        self._out_source.clamp_(min=0)

    def load(self, x: Tensor) -> Tensor:
        """Projections [N, (H + 2 KV) * dim], pairs of channels of queries and keys side by side (overwritten).

        Returns:
            The buffer, queries and keys turned; padding holds copies of some token.
        """
        heads, turned = x.view(x.shape[0], -1, self.dim), self.heads + self.kv_heads
        if not self.is_full:
            as_pairs(heads[:, :turned]).mul_(self.turns)
            return heads.view(-1, self.dim).index_select(0, self._source)
        buffer = x.new_empty(heads.shape[0] * heads.shape[1], self.dim)
        areas, flat, turns = self._areas(buffer), self._by_kind(heads), self.turns.view(*self.shapes[0], 1, -1)
        for area, part in zip(areas[:2], flat[:2], strict=True):
            torch.mul(as_pairs(part), turns, out=as_pairs(area))
        areas[2].copy_(flat[2])
        return buffer

    def unload(self, buffer: Tensor) -> Tensor:
        """The gradient of `load`, from that of its buffer."""
        if self.is_full:
            heads = buffer.new_empty(self.places, self.heads + 2 * self.kv_heads, self.dim)
            for area, part in zip(self._areas(buffer), self._by_kind(heads), strict=True):
                part.copy_(area)
        else:
            heads = buffer.index_select(0, self._place).view(-1, self.heads + 2 * self.kv_heads, self.dim)
        as_pairs(heads[:, : self.heads + self.kv_heads]).mul_(self.turns_back)
        return heads.flatten(1)

    def _areas(self, buffer: Tensor) -> list[Tensor]:
        """Queries, keys and values of the only frame, as [R, M, C, dim]."""
        rows, width = self.shapes[0]
        return [area.view(rows, -1, width, self.dim).transpose(1, 2) for area in buffer.split(self._sizes)]

    def _by_kind(self, heads: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of flat tokens, as [R, M, C, dim]."""
        rows = heads.view(*self.shapes[0], -1, self.dim)
        return rows.split((self.heads, self.kv_heads, self.kv_heads), 2)

    def kinds(self, buffer: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Queries [G, S * M, dim], keys and values [G, M, dim] of each frame; G = R * KV, S = H / KV."""
        parts, count = buffer.split(self._sizes), len(self.shapes)
        found = []
        for i, (rows, _) in enumerate(self.shapes):
            groups = rows * self.kv_heads
            q, k, v = (parts[kind * count + i].view(groups, -1, self.dim) for kind in range(3))
            found.append((q, k, v))
        return found

    def outputs(self, buffer: Tensor) -> list[Tensor]:
        """Rows for each query head [A * H, dim] -> views [G, S * M, dim], one a frame."""
        parts = buffer.split(self._sizes[: len(self.shapes)])
        return [
            part.view(rows * self.kv_heads, -1, self.dim) for part, (rows, _) in zip(parts, self.shapes, strict=True)
        ]

    def collect(self, outputs: Tensor) -> Tensor:
        """Rows for each query head [A * H, dim] -> flat heads [N, H * dim]."""
        if self.is_full:
            rows, width = self.shapes[0]
            return outputs.view(rows, self.heads, width, self.dim).transpose(1, 2).reshape(self.places, -1)
        return outputs.index_select(0, self._out_place).view(-1, self.heads * self.dim)

    def spread(self, grad: Tensor) -> Tensor:
        """The gradient of `collect`: flat heads [N, H * dim] -> rows [A * H, dim], zero at padding."""
        if self.is_full:
            rows, width = self.shapes[0]
            return grad.view(rows, width, self.heads, self.dim).transpose(1, 2).reshape(-1, self.dim)
        return grad.view(-1, self.dim).index_select(0, self._out_source).index_fill_(0, self._padding, 0)


def as_pairs(x: Tensor) -> Tensor:
    """[..., dim] -> complex [..., dim / 2] in the same memory."""
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


def _inverted(places: Tensor, size: int) -> Tensor:
    """Which entry of `places` holds each of 0..size-1, or -1."""
    source = torch.full((size,), -1, dtype=torch.int32)
    source[places] = torch.arange(places.shape[0], dtype=torch.int32)
    return source


def two_frames(lengths: list[int]) -> list[tuple[int, int]]:
    """Rows and width of a frame for the shorter rows and of one for the longer, so that scores take the least room."""
    rows, widest = len(lengths), _aligned(max(lengths))
    best = [(rows, widest)]
    for width in range(ALIGNMENT, widest, ALIGNMENT):
        short = sum(length <= width for length in lengths)
        split = [(short, width), (rows - short, widest)]
        if short and _area(split) < _area(best):
            best = split
    return best


def _aligned(width: int) -> int:
    return max(1, -(-width // ALIGNMENT)) * ALIGNMENT


def _area(shapes: list[tuple[int, int]]) -> int:
    """Scores of all rows."""
    return sum(rows * width * width for rows, width in shapes)
