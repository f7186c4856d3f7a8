"""The paged store: one pool of pages of a fixed size, of which every list takes as many as it needs.

Nothing is copied as a list grows. A fork holds its parent's pages until it writes to one that is not full, which it
copies first: so prompts that begin alike are stored once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from morex.cache.pages import PagePool
from morex.cache.store import KVStore, Lists, Row
from morex.cache.tables import Claim, PageTables
from morex.depth.schedule import Slot, Stream
from morex.nn.keys import NEVER, Entries, Keys, PagedKeys, PagedSlots
from morex.nn.packing import Packing

List = tuple[PageTables, int]
"""The pages of one sequence in one stream: a list of the tables for streams of its width, by number."""


class PagedStore(KVStore):
    """For sequences that come and go within a fixed amount of memory."""

    def __init__(
        self,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Args:
        pages: of the pool.
        page_size: entries of a page.
        kv_heads, head_dim: shape of an entry's key and of its value.
        """
        super().__init__()
        self.pool, self.page_size, self.device = PagePool(pages), page_size, torch.device(device)
        # One page more, which nobody holds: what shorter lists are padded with must be finite.
        shape = (pages + 1, page_size, kv_heads, head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.time = torch.full(shape[:2], NEVER, device=device)
        """Of the entries at the first place of each stream; the others have the same."""
        self._tables: dict[int, PageTables] = {}
        """By width of a stream."""
        self._lists: dict[int, dict[Slot, List]] = {}
        self._next = 0

    @property
    def entry_bytes(self) -> int:
        """Bytes of one key and its value."""
        return 2 * self.k.shape[2] * self.k.shape[3] * self.k.element_size()

    def open(self) -> int:
        sequence, self._next = self._next, self._next + 1
        self._tokens[sequence], self._lists[sequence] = 0, {}
        return sequence

    def lists(self, rows: Sequence[Row], width: int, packing: Packing | None) -> Lists:
        if width not in self._tables:
            self._tables[width] = PageTables(width, self.pool)
        tables, numbers = self._tables[width], []
        for sequence, first in rows:
            own = self._lists[sequence]
            if first not in own:
                own[first] = tables, tables.open()
            numbers.append(own[first][1])
        return PagedLists(self, tables, numbers, packing)

    def num_pages(self, sequence: int) -> int:
        """Pages that a sequence holds, alone or with others."""
        return sum(tables.width * int(tables.counts[number]) for tables, number in self._lists[sequence].values())

    def num_entries(self, sequence: int, stream: Stream) -> int:
        own = self._lists[sequence].get(stream.first)
        return 0 if own is None else int(own[0].lengths[own[1]])

    def _cut(self, sequence: int, tokens: int) -> None:
        for tables, number in self._lists[sequence].values():
            kept = int((self._times_of(tables, number) < tokens).sum())
            self.pool.drop(tables.cut(number, kept, self._pages_for(kept)))

    def fork(self, sequence: int) -> int:
        new = self.open()
        self._tokens[new] = self._tokens[sequence]
        for first, (tables, number) in self._lists[sequence].items():
            self.pool.share(tables.all_pages(number))
            self._lists[new][first] = tables, tables.copy(number)
        return new

    def free(self, sequence: int) -> None:
        del self._tokens[sequence]
        for tables, number in self._lists.pop(sequence).values():
            self.pool.drop(tables.all_pages(number))
            tables.close(number)

    def wipe(self, sequence: int) -> None:
        """Frees a sequence, and what it alone held becomes zero: it may not be a number, and padding must be finite."""
        pages = [page for tables, number in self._lists[sequence].values() for page in tables.all_pages(number)]
        alone = [page for page in pages if not self.pool.is_shared(page)]
        self.k[alone] = 0
        self.v[alone] = 0
        self.free(sequence)

    def clear(self) -> None:
        """Forgets all sequences, whatever state a broken pass has left them in, and every number in the pages."""
        self._tokens.clear()
        self._lists.clear()
        self._tables.clear()
        self.pool.clear()
        self.k.zero_()
        self.v.zero_()

    def bytes(self) -> int:
        used: dict[int, int] = {}
        for tables, number in self._all_lists():
            length = int(tables.lengths[number])
            for i, pages in enumerate(tables.pages[number, :, : tables.counts[number]].T.tolist()):
                for page in pages:
                    used[page] = max(used.get(page, 0), min(length - i * self.page_size, self.page_size))
        return sum(used.values()) * self.entry_bytes

    def check(self) -> None:
        assert self._tokens.keys() == self._lists.keys(), "a sequence has lists and no tokens, or the other way round"
        self.pool.check(page for tables, number in self._all_lists() for page in tables.all_pages(number))
        for width, tables in self._tables.items():
            tables.check([number for own, number in self._all_lists() if own.width == width])
        for tables, number in self._all_lists():
            length, count = int(tables.lengths[number]), int(tables.counts[number])
            assert count == self._pages_for(length), f"{length} entries stand in {count} pages"
            times = self._times_of(tables, number)
            assert bool((times[:-1] < times[1:]).all()), "entries are not in the order of time"

    def _all_lists(self) -> Iterator[List]:
        for own in self._lists.values():
            yield from own.values()

    def _pages_for(self, entries: int) -> int:
        return -(-entries // self.page_size)

    def _times_of(self, tables: PageTables, number: int) -> Tensor:
        """Time of each entry of a list."""
        pages = tables.pages[number, 0, : tables.counts[number]].tolist()
        return self.time[pages].flatten()[: int(tables.lengths[number])]

    def claim(self, tables: PageTables, numbers: Sequence[int], packing: Packing) -> Claim:
        """Entries for the tokens of a packing, whose rows are these lists."""
        found = tables.claim(numbers, packing.counts, packing.time, self.time)
        if isinstance(found, list):
            self._unshare(tables, found)
            found = tables.claim(numbers, packing.counts, packing.time, self.time)
            assert isinstance(found, Claim), "their pages are their own now"
        return found

    def _unshare(self, tables: PageTables, numbers: Sequence[int]) -> None:
        """Gives each of these lists a copy of its last page if others hold that too."""
        places = [(number, int(tables.lengths[number]) // self.page_size) for number in numbers]
        shared = [(n, place) for n, place in places if self.pool.is_shared(int(tables.pages[n, 0, place]))]
        fresh = self.pool.take(tables.width * len(shared))
        for number, place in shared:
            pages = tables.pages[number, :, place].tolist()
            copies = [fresh.pop() for _ in pages]
            for part in (self.k, self.v, self.time):
                part[copies] = part[pages]
            tables.pages[number, :, place] = copies
            self.pool.drop(pages)
        tables.is_forked[list(numbers)] = False


class PagedLists(Lists):
    """Lists in pages."""

    def __init__(self, store: PagedStore, tables: PageTables, numbers: list[int], packing: Packing | None) -> None:
        """With a packing, its tokens have their entries from now on."""
        self.store, self.tables, self.numbers, self.packing = store, tables, numbers, packing
        self._claim = None if packing is None else store.claim(tables, numbers, packing)
        self._left = tables.width
        self._read: tuple[Tensor, PagedKeys] | None = None

    @torch.no_grad()
    def append(self, place: int, k: Tensor, v: Tensor) -> bool:
        assert self._claim is not None, "these lists are only read"
        store, where = self.store, self._claim.where[place]
        store.k.flatten(0, 1).index_copy_(0, where, k.to(store.k.dtype))
        store.v.flatten(0, 1).index_copy_(0, where, v.to(store.v.dtype))
        self._left -= 1
        self.tables.wrote(self.numbers, self._left)
        return self._claim.is_fresh

    def reserve(self, dtype: torch.dtype) -> PagedSlots | None:
        if dtype != self.store.k.dtype or self.store.k.device.type != "cpu":
            return None
        claim = self._claim
        assert self.packing is not None and claim is not None, "these lists are only read"
        entries = Entries(self._times)
        entries.set_seen(self.packing, claim.row, claim.start, claim.end)
        pages = self.tables.pages_as_tensor()
        return PagedSlots(self.store.k, self.store.v, claim.where, claim.numbers, pages, entries)

    def slots(self, packing: Packing) -> PagedSlots:
        """What stands in all slots, for tokens whose rows are these lists, and which write nothing."""
        row = torch.tensor(self.numbers, dtype=torch.int32)[packing.row]
        pages = self.tables.pages_as_tensor()
        return PagedSlots(self.store.k, self.store.v, None, row, pages, Entries(self._times))

    def gather(self, place: int) -> Keys:
        return self.read(place).padded()

    def read(self, place: int) -> PagedKeys:
        if self._read is None:
            table = self._page_table()
            self._read = table, PagedKeys(self.store.k, self.store.v, table[0], Entries(self._times))
        return replace(self._read[1], pages=self._read[0][place])

    def _times(self) -> Tensor:
        """Time of each entry [B, S], the same at all places; NEVER behind the last."""
        lengths = self.tables.lengths[self.numbers]
        longest = max(1, int(lengths.max()))
        times = self.store.time[self._page_table()[0]].flatten(1)[:, :longest]
        end = torch.from_numpy(lengths).to(times.device)
        return times.masked_fill_(torch.arange(longest, device=times.device) >= end[:, None], NEVER)

    def _page_table(self) -> Tensor:
        """Pages of each list, right-padded with the page that nobody holds [width, B, P]."""
        counts = self.tables.counts[self.numbers]
        longest = max(1, int(counts.max()))
        pages = self.tables.pages[self.numbers, :, :longest].transpose(1, 0, 2)
        table = np.where(np.arange(longest) < counts[:, None], pages, np.int32(self.store.pool.size))
        return torch.from_numpy(table).to(self.store.device)


def pages_within(cache_bytes: int, page_size: int, entry_bytes: int) -> int:
    """Pages that a number of bytes holds.

    Raises:
        ValueError: not one.
    """
    pages = cache_bytes // (page_size * entry_bytes)
    if pages < 1:
        raise ValueError(
            f"cache_bytes {cache_bytes} holds no page of {page_size} entries ({page_size * entry_bytes} bytes); give "
            "more bytes or a smaller page_size"
        )
    return pages
