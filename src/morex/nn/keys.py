"""Keys and values that attention reads, and where a block finds them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True)
class PagedKeys:
    """Keys and values of B lists in the pages of a pool, each list in the order of time."""

    k: Tensor
    """[P, size, KV, dim], as `v`."""
    v: Tensor
    pages: Tensor
    """Pages of each list, right-padded with any page [B, L], int32."""
    time: Tensor
    """Time of each entry of the lists [B, S], NEVER behind the last."""
    _seen: dict[tuple[Packing, int | None], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False)
    """By packing and window; shared by the slots of a stream, whose entries have the same times."""

    def padded(self) -> Keys:
        """A copy of all entries."""
        width = self.time.shape[1]
        k, v = (pool[self.pages].flatten(1, 2)[:, :width] for pool in (self.k, self.v))
        return Keys(k, v, self.time)

    def of_rows(self, rows: Sequence[int]) -> "PagedKeys":
        """Some lists alone."""
        time = self.time[rows]
        longest = max(1, int((time != NEVER).sum(1).max()))
        pages = self.pages[rows][:, : -(-longest // self.k.shape[1])]
        return replace(self, pages=pages, time=time[:, :longest], _seen={})

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
class PagedSlot:
    """Where a kernel writes the keys and values of its tokens itself, and what it reads then."""

    where: Tensor | None
    """Entry of each token in the pool [N], -1 for one that writes nothing; None: none does."""
    keys: PagedKeys


class KeyView(Protocol):
    """One slot of a KV cache, as an attention sees it."""

    writes: bool
    """False: the slot was written at another recursion, and only queries are new."""

    def append(self, k: Tensor, v: Tensor, packing: Packing) -> bool:
        """Adds keys and values [N, KV, dim] of the tokens; True if the slot was empty before."""

    def reserve(self, packing: Packing, dtype: torch.dtype) -> PagedSlot | None:
        """In place of `append` and `read`: room for the tokens' keys and values, which the caller must fill.

        None, and nothing is reserved, where they do not stand in pages, in numbers of this kind.
        """

    def read(self) -> "Keys | PagedKeys":
        """All keys of the slot."""
