"""Which pages each list of a paged store has, in arrays, so that a pass looks up all its rows at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from morex.cache.pages import PagePool
from morex.nn import fast

FIRST = 16
"""Lists, and pages of each, that there is room for at first; room doubles."""


@dataclass(frozen=True)
class Claim:
    """Entries that the tokens of a pass have been given, one after another in the lists of their rows."""

    is_fresh: bool
    """Whether all these lists were empty before."""
    where: Tensor
    """Of each place of the stream, where each token goes: an entry of the pool [width, N]."""
    numbers: Tensor
    """List of each token [N], int32."""
    row: Tensor
    """Row of each token [N], int32."""
    start: Tensor
    """First entry that each token sees: zeros [N], int32."""
    end: Tensor
    """Entries that each token sees, itself among them [N], int32."""


class PageTables:
    """The lists of all streams of one width. A list has as many pages at each place of its stream."""

    def __init__(self, width: int, pool: PagePool) -> None:
        self.width, self.pool = width, pool
        self.pages = np.zeros((FIRST, width, FIRST), dtype=np.int32)
        """By list, place and order in time; behind the last of a list stands any page."""
        self.counts = np.zeros(FIRST, dtype=np.int64)
        """Pages of each list, at each place."""
        self.lengths = np.zeros(FIRST, dtype=np.int64)
        """Entries of each list, at each place."""
        self.is_forked = np.zeros(FIRST, dtype=bool)
        """Whether others may hold the last page of a list too."""
        self.unwritten: dict[int, int] = {}
        """Lists whose newest entries have been written at some places only, and how many are left."""
        self._free = list(range(FIRST - 1, -1, -1))
        self._forget_places()

    def _forget_places(self) -> None:
        """An array has been replaced by another."""
        self._native: fast.Tables | None = None
        """Where the arrays stand."""
        self._pages_as_tensor: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has arrays of its own."""
        return {**self.__dict__, "_native": None, "_pages_as_tensor": None}

    def pages_as_tensor(self) -> Tensor:
        """`pages` as they stand; shares their memory until there is room for more."""
        if self._pages_as_tensor is None:
            self._pages_as_tensor = torch.from_numpy(self.pages)
        return self._pages_as_tensor

    def open(self) -> int:
        """The number of a new list."""
        if not self._free:
            size = len(self.counts)
            for name in ("pages", "counts", "lengths", "is_forked"):
                part = getattr(self, name)
                setattr(self, name, np.concatenate([part, np.zeros_like(part)]))
            self._forget_places()
            self._free = list(range(2 * size - 1, size - 1, -1))
        return self._free.pop()

    def close(self, number: int) -> None:
        """Forgets a list."""
        self.counts[number] = self.lengths[number] = 0
        self.is_forked[number] = False
        self.unwritten.pop(number, None)
        self._free.append(number)

    def copy(self, number: int) -> int:
        """A new list with the same pages."""
        new = self.open()
        for part in (self.pages, self.counts, self.lengths):
            part[new] = part[number]
        self.is_forked[[new, number]] = True
        return new

    def extend(self, number: int, pages: list[int]) -> None:
        """Gives a list more pages, as many at each place."""
        start, more = int(self.counts[number]), len(pages) // self.width
        while start + more > self.pages.shape[2]:
            self.pages = np.concatenate([self.pages, np.zeros_like(self.pages)], axis=2)
            self._forget_places()
        self.pages[number, :, start : start + more] = np.array(pages).reshape(self.width, more)
        self.counts[number] += more

    def claim(self, numbers: Sequence[int], added: Sequence[int], time: Tensor, times: Tensor) -> Claim | list[int]:
        """Counts tokens as entries of some lists, in pages of the pool where they lack any, and writes down their time.

        Args:
            numbers: a list for each row.
            added: tokens of each row.
            time: of each token [N], row after row.
            times: of all entries of the pool [P, size].

        Returns:
            Where others may hold the page that the first token of some list goes to, nothing is done, and those lists
            come back.

        Raises:
            OutOfPages: the pool has not enough; nothing is done.
        """
        if fast.available(time, times) and fast.is_native():
            claim = self._claim_at_once(numbers, added, time, times)
            if claim is not None:
                return claim
        size, counts = times.shape[1], np.array(added)
        lengths = self.lengths[numbers]
        shares = self.is_forked[numbers] & (counts > 0) & (lengths % size > 0)
        if shares.any():
            return [number for number, is_shared in zip(numbers, shares.tolist(), strict=True) if is_shared]
        lacking = np.maximum(0, -(-(lengths + counts) // size) - self.counts[numbers])
        fresh = iter(self.pool.take(self.width * int(lacking.sum())))
        for row in np.flatnonzero(lacking).tolist():
            self.extend(numbers[row], [next(fresh) for _ in range(self.width * lacking[row])])
        entry = np.arange(counts.sum()) + np.repeat(lengths + counts - counts.cumsum(), counts)
        number = np.repeat(numbers, counts)
        where = torch.from_numpy((self.pages[number, :, entry // size].T.astype(np.int64) * size + entry % size).copy())
        self.lengths[numbers] = lengths + counts
        where = where.to(times.device)
        times.flatten().index_copy_(0, where[0], time)
        others = number, np.repeat(np.arange(len(counts)), counts), np.zeros_like(entry), entry + 1
        each = [torch.from_numpy(part.astype(np.int32)).to(times.device) for part in others]
        return Claim(not lengths.any(), where, *each)

    def _claim_at_once(self, numbers: Sequence[int], added: Sequence[int], time: Tensor, times: Tensor) -> Claim | None:
        """In one kernel; None, and nothing is done, where it meets with anything but lists that lack pages."""
        if self._native is None:
            arrays = [getattr(self, name) for name in fast.Tables.arrays]
            self._native = fast.Tables.of(arrays, times, self.pool.free, self.pool.counts)
        self._native.num_free = self.pool.num_free
        found = fast.claim(self._native, numbers, added, time)
        self.pool.num_free = self._native.num_free
        return None if found is None else Claim(found[0], found[1], *found[2])

    def wrote(self, numbers: Sequence[int], left: int) -> None:
        """The newest entries of these lists have been written, except at so many places."""
        for number in numbers:
            if left:
                self.unwritten[number] = left
            else:
                self.unwritten.pop(number, None)

    def cut(self, number: int, length: int, count: int) -> list[int]:
        """Leaves a list so many entries and pages; the pages that it loses."""
        lost: list[int] = self.pages[number, :, count : self.counts[number]].flatten().tolist()
        self.lengths[number], self.counts[number] = length, min(count, self.counts[number])
        self.unwritten.pop(number, None)
        self.is_forked[number] = True  # what is its last page now may be one that others hold
        return lost

    def all_pages(self, number: int) -> list[int]:
        """Pages of a list, at all places."""
        found: list[int] = self.pages[number, :, : self.counts[number]].flatten().tolist()
        return found

    def check(self, numbers: Iterable[int]) -> None:
        """Raises AssertionError where other lists are in use, or one is longer at some places than at others."""
        assert not self.unwritten, f"{len(self.unwritten)} lists differ in length from place to place"
        assert sorted([*numbers, *self._free]) == list(range(len(self.counts))), "a list is lost, or has two owners"
