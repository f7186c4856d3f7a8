"""The contiguous store: one tensor [B, room, KV, dim] a slot, which doubles when a row is full."""

from dataclasses import dataclass

import torch
from torch import Tensor

from morex.cache.slots import KVCache, lengths_of
from morex.depth.schedule import Slot
from morex.nn.attention import NEVER, Keys
from morex.nn.packing import Packing


@dataclass
class _Rows:
    """Entries of one slot: k and v [B, room, KV, dim], time [B, room], and how many each row has [B]."""

    k: Tensor
    v: Tensor
    time: Tensor
    lengths: Tensor
    longest: int = 0
    count: int = 0


class ContiguousCache(KVCache):
    """Keys and values of B sequences; a slot has one entry per visit, so its rows are as long as they were visited."""

    def __init__(self, batch_size: int, device: torch.device | str = "cpu", room: int = 64) -> None:
        """Args:
        batch_size: sequences B.
        room: entries a row that are set aside at first.
        """
        self.batch_size, self.room = batch_size, room
        self.seen = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.num_seen = 0
        self._slots: dict[Slot, _Rows] = {}

    @torch.no_grad()
    def append(self, slot: Slot, k: Tensor, v: Tensor, packing: Packing) -> bool:
        fresh = slot not in self._slots
        if fresh:
            self._slots[slot] = self._new_rows(k)
        rows = self._slots[slot]
        entry = rows.lengths[packing.row] + packing.rank
        lengths = lengths_of(rows.lengths, packing)
        longest = int(lengths.max())
        if longest > rows.k.shape[1]:
            self._grow(rows, longest)
        rows.k[packing.row, entry] = k.to(rows.k.dtype)
        rows.v[packing.row, entry] = v.to(rows.v.dtype)
        rows.time[packing.row, entry] = packing.time
        rows.lengths, rows.longest = lengths, longest
        rows.count += packing.num_tokens
        return fresh

    def read(self, slot: Slot) -> Keys:
        rows = self._slots[slot]
        end = max(rows.longest, 1)
        return Keys(rows.k[:, :end], rows.v[:, :end], rows.time[:, :end])

    def num_entries(self, slot: Slot) -> int:
        return self._slots[slot].count if slot in self._slots else 0

    def advance(self, packing: Packing) -> None:
        self.num_seen += packing.num_tokens
        self.seen = lengths_of(self.seen, packing)

    def bytes(self) -> int:
        total = 0
        for rows in self._slots.values():
            entry = 2 * rows.k.shape[2] * rows.k.shape[3] * rows.k.element_size()
            total += int(rows.lengths.sum()) * entry
        return total

    def _new_rows(self, k: Tensor) -> _Rows:
        shape = (self.batch_size, self.room, *k.shape[1:])
        time = torch.full(shape[:2], NEVER, dtype=torch.int64, device=k.device)
        return _Rows(k.new_zeros(shape), k.new_zeros(shape), time, torch.zeros_like(self.seen))

    def _grow(self, rows: _Rows, needed: int) -> None:
        more = max(needed, 2 * rows.k.shape[1]) - rows.k.shape[1]
        rows.k = torch.cat((rows.k, rows.k.new_zeros(self.batch_size, more, *rows.k.shape[2:])), 1)
        rows.v = torch.cat((rows.v, rows.v.new_zeros(self.batch_size, more, *rows.v.shape[2:])), 1)
        rows.time = torch.cat((rows.time, rows.time.new_full((self.batch_size, more), NEVER)), 1)
