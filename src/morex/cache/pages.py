"""Pages: who holds which. Plain Python, no tensors."""

from collections import Counter
from collections.abc import Iterable

from morex.cache.store import OutOfPages


class PagePool:
    """A fixed number of pages, each free or held by as many lists as its count says."""

    def __init__(self, size: int) -> None:
        """Args:
        size: pages.
        """
        self._counts = [0] * size
        self.clear()

    def clear(self) -> None:
        """Nobody holds any."""
        self._counts = [0] * self.size
        self._free = list(range(self.size - 1, -1, -1))

    @property
    def size(self) -> int:
        """Pages, free or held."""
        return len(self._counts)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """So many free pages, each now held once.

        Raises:
            OutOfPages: there are not so many; none was taken.
        """
        if count > len(self._free):
            raise OutOfPages(f"{count} pages are needed and {len(self._free)} of {self.size} are free")
        start = len(self._free) - count
        pages = self._free[start:]
        del self._free[start:]
        for page in pages:
            self._counts[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each of these."""
        for page in pages:
            assert self._counts[page] > 0, f"page {page} is free and cannot be shared"
            self._counts[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """One holder less for each of these; those without one are free."""
        for page in pages:
            assert self._counts[page] > 0, f"page {page} is free already"
            self._counts[page] -= 1
            if not self._counts[page]:
                self._free.append(page)

    def is_shared(self, page: int) -> bool:
        """Whether several hold a page."""
        return self._counts[page] > 1

    def check(self, held: Iterable[int]) -> None:
        """Compares the counts with the pages that all holders name, each as often as it is held.

        Raises:
            AssertionError: a page is counted wrongly, or neither free nor held, or both.
        """
        found = Counter(held)
        wrong = [page for page, count in enumerate(self._counts) if count != found[page]]
        assert not wrong, f"pages {wrong[:5]} are held by others than their counts say"
        free = sorted(self._free)
        assert free == [page for page, count in enumerate(self._counts) if not count], "free pages are not those unheld"
