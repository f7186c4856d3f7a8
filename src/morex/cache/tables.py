"""Which pages each list of a paged store has, in arrays, so that a pass looks up all its rows at once."""

from collections.abc import Iterable

import numpy as np

FIRST = 16
"""Lists, and pages of each, that there is room for at first; room doubles."""


class PageTables:
    """The lists of all streams of one width. A list has as many pages at each place of its stream."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.pages = np.zeros((FIRST, width, FIRST), dtype=np.int32)
        """By list, place and order in time; behind the last of a list stands any page."""
        self.counts = np.zeros(FIRST, dtype=np.int64)
        """Pages of each list, at each place."""
        self.lengths = np.zeros(FIRST, dtype=np.int64)
        """Entries of each list, at each place."""
        self.is_forked = np.zeros(FIRST, dtype=bool)
        """Whether others may hold the last page of a list too."""
        self.unwritten = np.zeros(FIRST, dtype=np.int64)
        """Places of each list where its newest entries have not been written yet."""
        self._free = list(range(FIRST - 1, -1, -1))

    def open(self) -> int:
        """The number of a new list."""
        if not self._free:
            size = len(self.counts)
            for name in ("pages", "counts", "lengths", "is_forked", "unwritten"):
                part = getattr(self, name)
                setattr(self, name, np.concatenate([part, np.zeros_like(part)]))
            self._free = list(range(2 * size - 1, size - 1, -1))
        return self._free.pop()

    def close(self, number: int) -> None:
        """Forgets a list."""
        self.counts[number] = self.lengths[number] = self.unwritten[number] = 0
        self.is_forked[number] = False
        self._free.append(number)

    def copy(self, number: int) -> int:
        """A new list with the same pages."""
        new = self.open()
        for part in (self.pages, self.counts, self.lengths, self.unwritten):
            part[new] = part[number]
        self.is_forked[[new, number]] = True
        return new

    def extend(self, number: int, pages: list[int]) -> None:
        """Gives a list more pages, as many at each place."""
        start, more = int(self.counts[number]), len(pages) // self.width
        while start + more > self.pages.shape[2]:
            self.pages = np.concatenate([self.pages, np.zeros_like(self.pages)], axis=2)
        self.pages[number, :, start : start + more] = np.array(pages).reshape(self.width, more)
        self.counts[number] += more

    def cut(self, number: int, length: int, count: int) -> list[int]:
        """Leaves a list so many entries and pages; the pages that it loses."""
        lost: list[int] = self.pages[number, :, count : self.counts[number]].flatten().tolist()
        self.lengths[number], self.counts[number] = length, min(count, self.counts[number])
        self.unwritten[number] = 0
        self.is_forked[number] = True  # what is its last page now may be one that others hold
        return lost

    def all_pages(self, number: int) -> list[int]:
        """Pages of a list, at all places."""
        found: list[int] = self.pages[number, :, : self.counts[number]].flatten().tolist()
        return found

    def check(self, numbers: Iterable[int]) -> None:
        """Raises AssertionError where other lists are in use, or one is longer at some places than at others."""
        assert not self.unwritten.any(), (
            f"{np.count_nonzero(self.unwritten)} lists differ in length from place to place"
        )
        assert sorted([*numbers, *self._free]) == list(range(len(self.counts))), "a list is lost, or has two owners"
