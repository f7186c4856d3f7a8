"""The one primitive: some tokens visit a piece of network in time order, and come back.

Tokens travel as flat rows [N, D], sequence by sequence in time order, without padding. A `Packing` says which tokens
these are. Norms and linear maps need nothing of it; attention asks it for the right-padded frame [B, M], in which
`is_causal` is exact because padding sits after every real token and its output is dropped. Depth routers, exit rules
and experts with attention all stand on this.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from morex.nn.fast import Frames
from morex.nn.rope import Rope

SHORT = 4
"""Tokens of a short row; a longer one is worth a frame of its own in attention."""


@dataclass(frozen=True, eq=False)
class Packing:
    """N tokens of B rows, in time order, and where they stand in the frame [B, M]."""

    rows: int
    """Rows of the frame: sequences B."""
    width: int
    """Width of the frame: the longest row, M."""
    span: int
    """Width of the batch that these tokens are from: two of one row are less than this apart in time."""
    row: Tensor
    """Row of each token [N], ascending."""
    time: Tensor
    """Place of each token in its own sequence [N]; what causality goes by."""
    positions: Tensor
    """Position of each token for the position embedding [N]; the time unless the caller says otherwise."""
    documents: Tensor | None = None
    """Document of each token [N]; tokens attend only to their own."""
    place: Tensor | None = None
    """Flat index of each token in the frame [N]; None where the frame has no padding."""
    index: Tensor | None = None
    """Where each token stands in the list that these were selected from [N]; None where all were."""
    first_row: int = 0
    """Number of the first row among those of all ranks."""
    is_dummy: bool = False
    """True: the tokens stand in for nobody, so that all ranks run the same modules; they count nowhere."""
    _origin: "tuple[Packing, Tensor] | None" = field(default=None, repr=False)
    """What these were selected from, and which of it: their cosines and sines are there."""
    _tables: dict[tuple[int, Rope, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _turns: dict[tuple[int, Rope, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _frames: dict[tuple[int, int, int, Rope | None, torch.dtype], Frames] = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        """Tokens here, N."""
        return self.time.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row [B]."""
        if self.is_full:
            return torch.full((self.rows,), self.width, device=self.row.device)
        return torch.bincount(self.row, minlength=self.rows)

    @property
    def is_full(self) -> bool:
        """Whether the frame has no padding: all rows are equally long."""
        return self.place is None

    @cached_property
    def counts(self) -> list[int]:
        """`lengths` as numbers, for decisions in plain Python."""
        if self.is_full:
            return [self.width] * self.rows
        counts: list[int] = self.lengths.tolist()
        return counts

    @property
    def rank(self) -> Tensor:
        """Rank of each token within its row [N]."""
        place = torch.arange(self.num_tokens, device=self.row.device) if self.place is None else self.place
        return place - self.row * self.width

    def select(self, index: Tensor) -> "Packing":
        """The tokens at `index` [N'], ascending; an index into this packing's own list of tokens."""
        if index.shape[0] == self.num_tokens:
            return self
        return self._of_rows(index, self.row[index], self.rows)

    def group(self, index: Tensor, counts: list[int]) -> "Packing":
        """The tokens of G groups, one group after another; each group has rows of its own, G * B in all.

        Args:
            index: into this packing's list of tokens [N'], ascending within each group; groups may share tokens.
            counts: tokens of each group.
        """
        group = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(index.device)
        return self._of_rows(index, group * self.rows + self.row[index], len(counts) * self.rows)

    def _of_rows(self, index: Tensor, row: Tensor, rows: int) -> "Packing":
        """The tokens at `index`, each in this one of so many rows."""
        place = row  # of rows with one token at most
        width = 1
        if self.width > 1 or rows != self.rows or not index.shape[0]:
            rank, width = _ranks(row, rows)
            place = row * width + rank
        full, time = width * rows == index.shape[0], self.time[index]
        return replace(
            self,
            rows=rows,
            width=width,
            row=row,
            time=time,
            positions=time if self.positions is self.time else self.positions[index],
            documents=None if self.documents is None else self.documents[index],
            place=None if full else place,
            index=index if self.index is None else self.index[index],
            _origin=(self, index),
            _tables={},
            _turns={},
            _frames={},
        )

    def of_rows(self, rows: Sequence[int]) -> tuple[Tensor, "Packing"]:
        """Some rows alone, ascending, none of them empty: their tokens [N'], an index into these, and their packing."""
        if self.width == 1 and self.is_full:
            index, counts = torch.tensor(rows, device=self.row.device), [1] * len(rows)
        else:
            wanted = torch.zeros(self.rows, dtype=torch.bool)
            wanted[list(rows)] = True
            index = wanted.to(self.row.device)[self.row].nonzero().squeeze(1)
            lengths = self.counts
            counts = [lengths[row] for row in rows]
        time = self.time[index]
        positions = time if self.positions is self.time else self.positions[index]
        return index, pack_rows(counts, time, positions, self.span)

    @cached_property
    def by_length(self) -> "tuple[Tensor, tuple[list[int], Tensor, Packing] | None]":
        """Tokens of the short rows, an index; and the long rows, their tokens and their packing, if there are any."""
        long = [row for row, count in enumerate(self.counts) if count > SHORT]
        if not long:
            return torch.arange(self.num_tokens, device=self.row.device), None
        index, part = self.of_rows(long)
        is_short = torch.ones(self.num_tokens, dtype=torch.bool, device=self.row.device)
        is_short[index] = False
        return is_short.nonzero().squeeze(1), (long, index, part)

    def alone(self) -> "Packing":
        """The same tokens, each in a row of its own."""
        rows, place = self.num_tokens, torch.arange(self.num_tokens, device=self.row.device)
        return replace(self, rows=rows, width=1, span=1, row=place, place=None, index=None, _frames={})

    def root(self) -> "Packing":
        """The same tokens as a list of their own, from which others are selected."""
        return self if self.index is None else replace(self, index=None)

    def gather(self, x: Tensor) -> Tensor:
        """These tokens' rows of `x`, the list that they were selected from: [N_all, ...] -> [N, ...]."""
        return x if self.index is None else x[self.index]

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        """[N, ...] -> the frame [B, M, ...]."""
        shape = (self.rows, self.width, *x.shape[1:])
        if self.place is None:
            return x.reshape(shape)
        frame = x.new_full((self.rows * self.width, *x.shape[1:]), value)
        return frame.index_copy(0, self.place, x).view(shape)

    def unpad(self, frame: Tensor) -> Tensor:
        """The frame [B, M, ...] -> [N, ...]."""
        flat = frame.reshape(self.rows * self.width, *frame.shape[2:])
        return flat if self.place is None else flat[self.place]

    def rotary(self, dim: int, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, dim / 2] of the rotary position embedding; computed once and kept."""
        key = (dim, rope, dtype)
        if key not in self._tables and self._origin is not None:
            whole, index = self._origin
            cos, sin = whole.rotary(dim, rope, dtype)
            self._tables[key] = cos[index], sin[index]
        elif key not in self._tables:
            angle = self.positions.to(dtype)[:, None] / rope.periods(dim, self.positions.device, dtype)
            self._tables[key] = angle.cos(), angle.sin()
        return self._tables[key]

    def turns(self, dim: int, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`rotary` for both channels of each pair [N, 1, dim], as `rotate` takes it; computed once and kept."""
        key = (dim, rope, dtype)
        if key not in self._turns and self._origin is not None:
            whole, index = self._origin
            cos, sin = whole.turns(dim, rope, dtype)
            self._turns[key] = cos[index], sin[index]
        elif key not in self._turns:
            angle = self.positions.to(dtype).view(-1, 1, 1) / rope.signed_periods(dim, self.positions.device, dtype)
            self._turns[key] = angle.cos(), angle.sin()
        return self._turns[key]

    def frames(self, heads: int, kv_heads: int, dim: int, rope: Rope | None, dtype: torch.dtype) -> Frames:
        """The frames that fast attention pads these tokens into; computed once and kept. Without rope nothing turns."""
        key = (heads, kv_heads, dim, rope, dtype)
        if key not in self._frames:
            turns = None if rope is None else torch.complex(*self.rotary(dim, rope, dtype))
            self._frames[key] = Frames(self.row, self.rank, self.rows, self.width, turns, heads, kv_heads, dim)
        return self._frames[key]


def pack_batch(
    shape: tuple[int, int],
    device: torch.device,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    positions: Tensor | None = None,
    documents: Tensor | None = None,
    first_row: int = 0,
) -> Packing:
    """The real tokens of a right-padded batch.

    Args:
        shape: (B, T) of the batch.
        lengths: true lengths [B]; default: all T.
        start: tokens of each row that came before this call [B], as a cache knows.
        positions: positions [B, T] for the position embedding; default: the time.
        documents: document of each token [B, T].
        first_row: number of the first row, where other rows are elsewhere.

    Returns:
        The packing; its `index` points into the flattened batch [B * T], or is None where nothing is padding.
    """
    batch, time = shape
    row = torch.arange(batch, device=device)
    if time == 1 and start is not None and lengths is None:
        now = start.to(device)  # a new token of each sequence
    else:
        row = row.repeat_interleave(time)
        step = torch.arange(time, device=device).repeat(batch)
        now = step if start is None else step + start.to(device)[row]
    packing = Packing(
        rows=batch,
        width=time,
        span=time,
        row=row,
        time=now,
        positions=now if positions is None else positions.expand(batch, time).reshape(-1),
        documents=None if documents is None else documents.reshape(-1),
        first_row=first_row,
    )
    if lengths is None:
        return packing
    real = (step < lengths.to(device)[row]).nonzero().squeeze(1)
    return packing.select(real)


def pack_rows(
    counts: Sequence[int], time: Tensor, positions: Tensor, span: int, documents: Tensor | None = None
) -> Packing:
    """Tokens that stand row by row.

    Args:
        counts: tokens of each row.
        time, positions: of each token [N].
        span: as of a packing.
        documents: of each token [N].
    """
    rows, width = len(counts), max(counts)
    is_full = min(counts) == width
    if width == 1 and is_full:
        row = _numbers(rows, time.device)
    else:  # on the CPU, where nobody waits for the lengths
        row = torch.arange(rows).repeat_interleave(width if is_full else torch.tensor(counts)).to(time.device)
    packing = Packing(rows, width, span, row, time, positions, documents)
    if is_full:
        return packing
    return replace(packing, place=row * width + _ranks(row, rows)[0])


@lru_cache(maxsize=256)
def _numbers(rows: int, device: torch.device) -> Tensor:
    """0 .. rows - 1, which nobody changes."""
    return torch.arange(rows, device=device)


def _ranks(row: Tensor, rows: int) -> tuple[Tensor, int]:
    """Rank of each token within its row [N], and the longest row's length."""
    lengths = torch.bincount(row, minlength=rows)
    first = lengths.cumsum(0) - lengths
    rank = torch.arange(row.shape[0], device=row.device) - first[row]
    return rank, int(lengths.max()) if rows else 0
