"""Keys and values that attention reads, and where a block finds them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from morex.nn.packing import Packing

NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Keys:
    """Keys and values that queries may read, right-padded: k and v [B, S, KV, dim]; time and documents [B, S]."""

    k: Tensor
    v: Tensor
    time: Tensor
    """Time of each key; NEVER where there is none."""
    documents: Tensor | None = None
    is_full: bool = False
    """Whether all rows are known to have S keys, none of them later than the tokens in hand."""


class Entries:
    """The entries of B lists: when they were, and which of them a query sees. The same in all slots of a stream."""

    def __init__(self, time: Callable[[], Tensor]) -> None:
        """`time`: that of each entry [B, S], NEVER behind the last; asked for once, if anybody needs it."""
        self._time = time
        self._seen: dict[tuple[Packing, int | None], tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def time(self) -> Tensor:
        return self._time()

    def set_seen(self, packing: Packing, row: Tensor, start: Tensor, end: Tensor) -> None:
        """What is known without asking of the tokens of a packing, where there is no window, as `seen_by` says it."""
        self._seen[packing, None] = row, start, end

    def seen_by(self, packing: Packing, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """List of each token of the packing, and the entries that it sees: row, start and end [N], int32."""
        key = packing, window
        if key not in self._seen:
            now, time = packing.time[:, None], self.time[packing.row]
            end = (time <= now).sum(1, dtype=torch.int32)
            start = torch.zeros_like(end) if window is None else (time <= now - window).sum(1, dtype=torch.int32)
            self._seen[key] = packing.row.int(), start, end
        return self._seen[key]


@dataclass(frozen=True)
class PagedKeys:
    """Keys and values of B lists in the pages of a pool, each list in the order of time."""

    k: Tensor
    """[P, size, KV, dim], as `v`."""
    v: Tensor
    pages: Tensor
    """Pages of each list, right-padded with any page [B, L], int32."""
    entries: Entries

    def padded(self) -> Keys:
        """A copy of all entries."""
        time = self.entries.time
        k, v = (pool[self.pages].flatten(1, 2)[:, : time.shape[1]] for pool in (self.k, self.v))
        return Keys(k, v, time)

    def of_rows(self, rows: Sequence[int]) -> "PagedKeys":
        """Some lists alone."""
        time = self.entries.time[rows]
        longest = max(1, int((time != NEVER).sum(1).max()))
        pages = self.pages[rows][:, : -(-longest // self.k.shape[1])]
        return replace(self, pages=pages, entries=Entries(lambda: time[:, :longest]))


@dataclass(frozen=True)
class PagedSlots:
    """Where a kernel writes its tokens' keys and values itself, in S slots of a stream, and what it reads then."""

    k: Tensor
    """[P, size, KV, dim], as `v`."""
    v: Tensor
    where: Tensor | None
    """Entry of each token in the pool [S, N], -1 for one that writes nothing; None: none does."""
    row: Tensor
    """List of each token [N], int32."""
    pages: Tensor
    """Of all lists, by slot [lists, S, L], int32; behind the last of a list stands any page."""
    entries: Entries


class KeyView(Protocol):
    """One slot of a KV cache, as an attention sees it."""

    writes: bool
    """False: the slot was written at another recursion, and only queries are new."""

    def append(self, k: Tensor, v: Tensor, packing: Packing) -> bool:
        """Adds keys and values [N, KV, dim] of the tokens; True if the slot was empty before."""

    def read(self) -> "Keys | PagedKeys":
        """All keys of the slot."""
