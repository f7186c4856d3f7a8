"""The paged store: one pool of pages of a fixed size, of which every list takes as many as it needs.

Nothing is copied as a list grows. A fork holds its parent's pages until it writes to one that is not full, which it
copies first: so prompts that begin alike are stored once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from morex.cache.pages import PagePool
from morex.cache.store import KVStore, Lists, Row
from morex.depth.schedule import Slot, Stream
from morex.nn.keys import NEVER, Entries, Keys, PagedKeys, PagedSlots
from morex.nn.packing import Packing


@dataclass
class _List:
    """The pages of one sequence in one stream."""

    pages: list[list[int]]
    """By place, in the order of time; as many at each."""
    lengths: list[int]
    """Entries at each place."""
    _table: np.ndarray | None = None

    @property
    def table(self) -> np.ndarray:
        """`pages` as an array [width, pages]."""
        if self._table is None:
            self._table = np.array(self.pages, dtype=np.int32)
        return self._table

    def have_moved(self) -> None:
        """The pages are others than before."""
        self._table = None

    @property
    def width(self) -> int:
        return len(self.pages)

    @property
    def num_pages(self) -> int:
        """Pages at each place."""
        return len(self.pages[0])

    def all_pages(self) -> Iterator[int]:
        for pages in self.pages:
            yield from pages


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
        self._lists: dict[int, dict[Slot, _List]] = {}
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
        found = []
        for sequence, first in rows:
            own = self._lists[sequence]
            if first not in own:
                own[first] = _List([[] for _ in range(width)], [0] * width)
            found.append(own[first])
        if packing is not None:
            self._reserve(found, packing.counts)
        return PagedLists(self, found, packing)

    def num_pages(self, sequence: int) -> int:
        """Pages that a sequence holds, alone or with others."""
        return sum(own.width * own.num_pages for own in self._lists[sequence].values())

    def num_entries(self, sequence: int, stream: Stream) -> int:
        own = self._lists[sequence].get(stream.first)
        return 0 if own is None else own.lengths[stream.place]

    def _cut(self, sequence: int, tokens: int) -> None:
        for own in self._lists[sequence].values():
            length = own.lengths[0]
            kept = int((self.time[own.pages[0]].flatten()[:length] < tokens).sum())
            needed = self._pages_for(kept)
            for pages in own.pages:
                self.pool.drop(pages[needed:])
                del pages[needed:]
            own.have_moved()
            own.lengths = [kept] * own.width

    def fork(self, sequence: int) -> int:
        new = self.open()
        self._tokens[new] = self._tokens[sequence]
        for first, own in self._lists[sequence].items():
            self.pool.share(own.all_pages())
            self._lists[new][first] = _List([list(pages) for pages in own.pages], list(own.lengths))
        return new

    def free(self, sequence: int) -> None:
        del self._tokens[sequence]
        for own in self._lists.pop(sequence).values():
            self.pool.drop(own.all_pages())

    def clear(self) -> None:
        """Forgets all sequences, whatever state a broken pass has left them in, and every number in the pages."""
        self._tokens.clear()
        self._lists.clear()
        self.pool.clear()
        self.k.zero_()
        self.v.zero_()

    def bytes(self) -> int:
        used: dict[int, int] = {}
        for own in self._all_lists():
            for pages, length in zip(own.pages, own.lengths, strict=True):
                for i, page in enumerate(pages):
                    used[page] = max(used.get(page, 0), min(length - i * self.page_size, self.page_size))
        return sum(used.values()) * self.entry_bytes

    def check(self) -> None:
        assert self._tokens.keys() == self._lists.keys(), "a sequence has lists and no tokens, or the other way round"
        self.pool.check(page for own in self._all_lists() for page in own.all_pages())
        for own in self._all_lists():
            assert len(set(own.lengths)) == 1, f"a stream has lists of different lengths {own.lengths}"
            needed = self._pages_for(own.lengths[0])
            assert all(len(pages) == needed for pages in own.pages), f"{own.lengths[0]} entries stand in other pages"
            times = self.time[own.pages[0]].flatten()[: own.lengths[0]]
            assert bool((times[:-1] < times[1:]).all()), "entries are not in the order of time"

    def _all_lists(self) -> Iterator[_List]:
        for own in self._lists.values():
            yield from own.values()

    def _pages_for(self, entries: int) -> int:
        return -(-entries // self.page_size)

    def _reserve(self, lists: list[_List], counts: list[int]) -> None:
        """Makes room for so many more entries in each list: new pages, and copies of those that others hold too."""
        grown: list[tuple[_List, int]] = []
        copied: list[_List] = []
        needed = 0
        for own, count in zip(lists, counts, strict=True):
            if not count:
                continue
            length = own.lengths[0]
            more = self._pages_for(length + count) - own.num_pages
            if more:
                grown.append((own, more))
            if length % self.page_size and self.pool.is_shared(own.pages[0][-1]):
                copied.append(own)
        needed = sum(own.width * more for own, more in grown) + sum(own.width for own in copied)
        if not needed:
            return
        fresh = self.pool.take(needed)
        for own in copied:
            shared = [pages[-1] for pages in own.pages]
            copies = [fresh.pop() for _ in own.pages]
            for part in (self.k, self.v, self.time):
                part[copies] = part[shared]
            for pages, copy in zip(own.pages, copies, strict=True):
                pages[-1] = copy
            own.have_moved()
            self.pool.drop(shared)
        for own, more in grown:
            for pages in own.pages:
                pages += [fresh.pop() for _ in range(more)]
            own.have_moved()
        assert not fresh


class PagedLists(Lists):
    """Lists in pages."""

    def __init__(self, store: PagedStore, lists: list[_List], packing: Packing | None) -> None:
        self.store, self.own, self.packing = store, lists, packing
        self._where: Tensor | None = None
        self._read: tuple[Tensor, PagedKeys] | None = None

    @torch.no_grad()
    def append(self, place: int, k: Tensor, v: Tensor) -> bool:
        assert self.packing is not None, "these lists are only read"
        store, where = self.store, self._places_once()[place]
        store.k.flatten(0, 1).index_copy_(0, where, k.to(store.k.dtype))
        store.v.flatten(0, 1).index_copy_(0, where, v.to(store.v.dtype))
        fresh = True
        for own, count in zip(self.own, self.packing.counts, strict=True):
            fresh &= not own.lengths[place]
            own.lengths[place] += count
        return fresh

    def reserve(self, dtype: torch.dtype) -> PagedSlots | None:
        if dtype != self.store.k.dtype:
            return None
        assert self.packing is not None, "these lists are only read"
        where, ends = self._places_once(), list[int]()
        for own, count in zip(self.own, self.packing.counts, strict=True):
            length = own.lengths[0]
            ends += range(length + 1, length + count + 1)
            own.lengths = [length + count] * own.width
        pages, keys = self.read_all()
        keys.entries.set_seen(self.packing, torch.tensor(ends, dtype=torch.int32, device=self.store.device))
        return PagedSlots(where, pages, keys)

    def _places_once(self) -> Tensor:
        """`_places` of the packing's tokens, whose time is written down with them."""
        assert self.packing is not None, "these lists are only read"
        if self._where is None:
            self._where = self._places()
            self.store.time.flatten().index_copy_(0, self._where[0], self.packing.time)
        return self._where

    def gather(self, place: int) -> Keys:
        return self.read(place).padded()

    def read(self, place: int) -> PagedKeys:
        pages, keys = self.read_all()
        return replace(keys, pages=pages[place])

    def read_all(self) -> tuple[Tensor, PagedKeys]:
        """Pages of the lists at all places [width, B, L], and what stands in those of the first."""
        if self._read is None:
            table, lengths = self._page_table(), [own.lengths[0] for own in self.own]
            self._read = (
                table,
                PagedKeys(self.store.k, self.store.v, table[0], Entries(partial(self._times, table[0], lengths))),
            )
        return self._read

    def _times(self, table: Tensor, lengths: list[int]) -> Tensor:
        """Time of each entry [B, S], the same at all places; NEVER behind the last."""
        longest = max(1, *lengths)
        times = self.store.time[table].flatten(1)[:, :longest]
        end = torch.tensor(lengths, device=times.device)
        return times.masked_fill_(torch.arange(longest, device=times.device) >= end[:, None], NEVER)

    def _places(self) -> Tensor:
        """Where each token goes, an index into all entries of the pool [width, N]."""
        assert self.packing is not None
        size, found = self.store.page_size, []
        for own, count in zip(self.own, self.packing.counts, strict=True):
            length = own.lengths[0]
            if count == 1:  # without arrays, which would cost more than they save
                page, rest = divmod(length, size)
                found.append([pages[page] * size + rest for pages in own.pages])
            elif count:
                entry = np.arange(length, length + count)
                pages = np.array([pages[length // size :] for pages in own.pages])
                found += list((pages[:, entry // size - length // size] * size + entry % size).T)
        return torch.from_numpy(np.array(found, dtype=np.int64).T.copy()).to(self.store.device)

    def _page_table(self) -> Tensor:
        """Pages of each list, right-padded with the page that nobody holds [width, B, P]."""
        width, longest = self.own[0].width, max(1, *(own.num_pages for own in self.own))
        table = np.full((width, len(self.own), longest), self.store.pool.size, dtype=np.int32)
        for row, own in enumerate(self.own):
            table[:, row, : own.num_pages] = own.table
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
