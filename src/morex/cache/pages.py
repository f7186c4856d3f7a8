"""Pages: who holds which. Plain Python, no tensors."""

from array import array
from collections import Counter
from collections.abc import Iterable

from morex.cache.store import OutOfPages


class PagePool:
    """A fixed number of pages, each free or held by as many lists as its count says."""

    def __init__(self, size: int) -> None:
        """Args:
        size: pages.
        """
        self.counts = array("i", bytes(4 * size))
        """How many hold each page."""
        self.free = array("i", bytes(4 * size))
        """The first `num_free` are held by nobody, the next one to be taken last. Both arrays stay where they are."""
        self.clear()

    def clear(self) -> None:
        """Nobody holds any."""
        self.counts[:] = array("i", bytes(4 * self.size))
        self.free[:] = array("i", range(self.size - 1, -1, -1))
        self.num_free = self.size
        """Pages that nobody holds."""

    @property
    def size(self) -> int:
        """Pages, free or held."""
        return len(self.counts)

    def take(self, count: int) -> list[int]:
        """So many free pages, each now held once.

        Raises:
            OutOfPages: there are not so many; none was taken.
        """
        if count > self.num_free:
            raise OutOfPages(f"{count} pages are needed and {self.num_free} of {self.size} are free")
        start = self.num_free - count
        pages = self.free[start : self.num_free].tolist()
        self.num_free = start
        for page in pages:
            self.counts[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each of these."""
        for page in pages:
            assert self.counts[page] > 0, f"page {page} is free and cannot be shared"
            self.counts[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """One holder less for each of these; those without one are free."""
        for page in pages:
            assert self.counts[page] > 0, f"page {page} is free already"
            self.counts[page] -= 1
            if not self.counts[page]:
                self.free[self.num_free] = page
                self.num_free += 1

    def is_shared(self, page: int) -> bool:
        """Whether several hold a page."""
        return self.counts[page] > 1

    def check(self, held: Iterable[int]) -> None:
        """Compares the counts with the pages that all holders name, each as often as it is held.

        Raises:
            AssertionError: a page is counted wrongly, or neither free nor held, or both.
        """
        found = Counter(held)
        wrong = [page for page, count in enumerate(self.counts) if count != found[page]]
        assert not wrong, f"pages {wrong[:5]} are held by others than their counts say"
        free = sorted(self.free[: self.num_free])
        assert free == [page for page, count in enumerate(self.counts) if not count], "free pages are not those unheld"
