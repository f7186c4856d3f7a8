"""The contiguous store: a tensor [S, room, KV, dim] for each slot, a row for each sequence; full rows double it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from morex.cache.store import KVStore, Lists, Row
from morex.depth.schedule import Slot, Stream
from morex.nn.keys import NEVER, Keys
from morex.nn.packing import Packing


@dataclass
class _Buffers:
    """Entries of one stream: of each place k and v [S, room, KV, dim], and how many each sequence has."""

    k: list[Tensor]
    v: list[Tensor]
    time: Tensor
    """[S, room], the same at all places; NEVER where there is no entry."""
    lengths: list[list[int]]
    """Entries of each sequence, by place."""

    def tensors(self) -> list[Tensor]:
        return [*self.k, *self.v, self.time]

    def grow(self, dim: int, size: int) -> None:
        """Makes room for so many sequences (dim 0) or entries (dim 1)."""

        def wider(x: Tensor, value: int = 0) -> Tensor:
            shape = list(x.shape)
            shape[dim] = size - shape[dim]
            return torch.cat((x, x.new_full(shape, value)), dim)

        self.k, self.v = ([wider(x) for x in parts] for parts in (self.k, self.v))
        self.time = wider(self.time, NEVER)


class ContiguousStore(KVStore):
    """For a batch that is known beforehand: simple, and read without a copy where all its sequences are read."""

    def __init__(self, sequences: int = 1, room: int = 64, device: torch.device | str = "cpu") -> None:
        """Args:
        sequences: for which room is set aside at first.
        room: entries of each that are set aside at first.
        """
        super().__init__()
        self.room, self.device = room, torch.device(device)
        self._size = max(1, sequences)
        self._free = list(range(self._size - 1, -1, -1))
        self._streams: dict[Slot, _Buffers] = {}

    def open(self) -> int:
        if not self._free:
            self._free = list(range(2 * self._size - 1, self._size - 1, -1))
            self._size *= 2
            for buffers in self._streams.values():
                buffers.grow(0, self._size)
                for lengths in buffers.lengths:
                    lengths += [0] * (self._size - len(lengths))
        sequence = self._free.pop()
        self._tokens[sequence] = 0
        return sequence

    def lists(self, rows: Sequence[Row], width: int, packing: Packing | None) -> Lists:
        return _ContiguousLists(self, rows, width, packing)

    def num_entries(self, sequence: int, stream: Stream) -> int:
        buffers = self._streams.get(stream.first)
        return 0 if buffers is None else buffers.lengths[stream.place][sequence]

    def _cut(self, sequence: int, tokens: int) -> None:
        for buffers in self._streams.values():
            times = buffers.time[sequence]
            kept = int((times < tokens).sum())
            times[kept:] = NEVER
            for lengths in buffers.lengths:
                lengths[sequence] = kept

    def fork(self, sequence: int) -> int:
        new = self.open()
        self._tokens[new] = self._tokens[sequence]
        for buffers in self._streams.values():
            for part in buffers.tensors():
                part[new] = part[sequence]
            for lengths in buffers.lengths:
                lengths[new] = lengths[sequence]
        return new

    def free(self, sequence: int) -> None:
        self.truncate(sequence, 0)
        del self._tokens[sequence]
        self._free.append(sequence)

    def bytes(self) -> int:
        total = 0
        for buffers in self._streams.values():
            for k, lengths in zip(buffers.k, buffers.lengths, strict=True):
                total += sum(lengths) * 2 * k.shape[2] * k.shape[3] * k.element_size()
        return total

    def check(self) -> None:
        assert sorted([*self._free, *self._tokens]) == list(range(self._size)), "a row is neither free nor in use"
        for first, buffers in self._streams.items():
            there = (buffers.time != NEVER).sum(1).tolist()
            assert all(lengths == there for lengths in buffers.lengths), f"lists of stream {first} differ in length"
            assert not any(there[sequence] for sequence in self._free), f"a free row has entries in stream {first}"
            earlier, later = buffers.time[:, :-1], buffers.time[:, 1:]
            assert bool(((earlier < later) | (later == NEVER)).all()), f"stream {first} is not in the order of time"

    def stream(self, first: Slot, width: int, like: Tensor | None = None) -> _Buffers | None:
        """The buffers of a stream; made for entries like these [..., KV, dim] where there are none."""
        if first not in self._streams and like is not None:
            shape = (self._size, self.room, *like.shape[1:])
            k, v = ([like.new_zeros(shape) for _ in range(width)] for _ in range(2))
            time = torch.full(shape[:2], NEVER, device=self.device)
            self._streams[first] = _Buffers(k, v, time, [[0] * self._size for _ in range(width)])
        return self._streams.get(first)

    def is_everyone(self, sequences: list[int]) -> bool:
        """Whether these are all rows, in their order."""
        return sequences == list(range(self._size))


class _Part:
    """The rows of a pass that are in one stream, and their tokens."""

    def __init__(
        self, first: Slot, members: list[int], rows: Sequence[Row], packing: Packing | None, is_everyone: bool
    ) -> None:
        self.first, self.members, self.is_everyone = first, members, is_everyone
        self.sequences = [rows[i][0] for i in members]
        self.index: Tensor | None = None
        """Which tokens of the pass these are; None for all."""
        self.counts = [0] * len(members)
        self.starts: list[int] = []
        self.found: tuple[slice, slice] | tuple[Tensor, Tensor] = slice(0), slice(0)
        """What `where` found for these."""
        self.frame: tuple[int, int] | None = None
        """Rows and columns of the area that the tokens take; None where they go to places of their own."""
        if packing is None:
            return
        self.counts = [packing.counts[i] for i in members]
        if len(members) < len(rows):
            mine = torch.zeros(len(rows), dtype=torch.bool)
            mine[members] = True
            self.index = mine.to(packing.row.device)[packing.row].nonzero().squeeze(1)

    def where(self, starts: list[int], packing: Packing) -> tuple[slice, slice] | tuple[Tensor, Tensor]:
        """Rows and entries of the tokens, where the lists have so many entries already. The same at all places."""
        if starts == self.starts:
            return self.found
        self.starts, self.frame = starts, None
        if self.is_everyone and packing.is_full and min(starts) == max(starts):
            self.frame = packing.rows, packing.width
            self.found = slice(None), slice(starts[0], starts[0] + packing.width)
        else:
            sequence, start = torch.zeros(2, packing.rows, dtype=torch.int64)
            sequence[self.members], start[self.members] = torch.tensor(self.sequences), torch.tensor(starts)
            device = packing.row.device
            row, rank = (part if self.index is None else part[self.index] for part in (packing.row, packing.rank))
            self.found = sequence.to(device)[row], start.to(device)[row] + rank
        return self.found

    def shaped(self, x: Tensor) -> Tensor:
        """Something of each token of the pass [N, ...] as it fits `where`."""
        if self.frame is not None:
            return x.reshape(*self.frame, *x.shape[1:])
        return x if self.index is None else x[self.index]


class _ContiguousLists(Lists):
    def __init__(self, store: ContiguousStore, rows: Sequence[Row], width: int, packing: Packing | None) -> None:
        self.store, self.rows, self.width, self.packing = store, rows, width, packing
        members: dict[Slot, list[int]] = {}
        for i, (_, first) in enumerate(rows):
            members.setdefault(first, []).append(i)
        everyone = store.is_everyone([sequence for sequence, _ in rows]) and len(members) == 1
        self.parts = [_Part(first, own, rows, packing, everyone) for first, own in members.items()]

    @torch.no_grad()
    def append(self, place: int, k: Tensor, v: Tensor) -> bool:
        assert self.packing is not None, "these lists are only read"
        fresh = True
        for part in self.parts:
            buffers = self.store.stream(part.first, self.width, k)
            assert buffers is not None
            lengths = buffers.lengths[place]
            starts = [lengths[sequence] for sequence in part.sequences]
            fresh &= not any(starts)
            ends = [start + count for start, count in zip(starts, part.counts, strict=True)]
            room = buffers.time.shape[1]
            if max(ends) > room:
                buffers.grow(1, max(*ends, 2 * room))
            is_known = starts == part.starts  # from an earlier place of the stream, which has written the times
            where = part.where(starts, self.packing)
            buffers.k[place][where] = part.shaped(k).to(buffers.k[place].dtype)
            buffers.v[place][where] = part.shaped(v).to(buffers.v[place].dtype)
            if not is_known:
                buffers.time[where] = part.shaped(self.packing.time)
            for sequence, end in zip(part.sequences, ends, strict=True):
                lengths[sequence] = end
        return fresh

    def gather(self, place: int) -> Keys:
        if len(self.parts) == 1:
            return self._of(self.parts[0], place)
        found = [self._of(part, place) for part in self.parts]
        longest = max(keys.time.shape[1] for keys in found)
        shape = (len(self.rows), longest)
        k, v = (found[0].k.new_zeros(*shape, *found[0].k.shape[2:]) for _ in range(2))
        time = found[0].time.new_full(shape, NEVER)
        for part, keys in zip(self.parts, found, strict=True):
            width = keys.time.shape[1]
            for whole, own in ((k, keys.k), (v, keys.v), (time, keys.time)):
                whole[part.members, :width] = own
        return Keys(k, v, time)

    def _of(self, part: _Part, place: int) -> Keys:
        buffers = self.store.stream(part.first, self.width)
        assert buffers is not None, f"nobody has come by stream {part.first}"
        lengths = buffers.lengths[place]
        ends = [lengths[sequence] for sequence in part.sequences]
        end = max(1, *ends)
        k, v, time = buffers.k[place][:, :end], buffers.v[place][:, :end], buffers.time[:, :end]
        if part.is_everyone:
            return Keys(k, v, time, is_full=min(ends) == end)
        return Keys(k[part.sequences], v[part.sequences], time[part.sequences])
