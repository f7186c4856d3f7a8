"""What the attention of a pass sees of a store, where rows may be at different recursions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morex.cache.paged import PagedLists
from morex.cache.slots import KVRule
from morex.cache.store import KVStore, Lists
from morex.depth.schedule import Slot
from morex.nn.keys import NEVER, Keys, PagedKeys, PagedSlots
from morex.nn.packing import Packing

if TYPE_CHECKING:
    from morex.infer.passes import Segment


class PassLists:
    """The lists of the rows of a pass in one stream, by the rule of the model."""

    def __init__(
        self,
        store: KVStore,
        rule: KVRule,
        block: int,
        width: int,
        segments: "Sequence[Segment]",
        recursions: Sequence[int],
        packing: Packing,
        end: int,
    ) -> None:
        """Args:
        block: the first of the stream.
        width: blocks of the stream.
        segments, recursions: of each row.
        packing: the tokens of the pass.
        end: all these tokens stand before this place of their texts.
        """
        self.store, self.rule, self.block, self.width = store, rule, block, width
        self.segments, self.recursions, self.packing, self.end = segments, recursions, packing, end
        self.sequences = [segment.sequence for segment in segments]
        self.writers = [row for row, r in enumerate(recursions) if rule != "shared_first" or r == 1]
        """Rows that write."""
        self._own: Lists | None = None
        self._index: Tensor | None = None
        """Tokens of the rows that write; None for all."""
        self._read: Lists | None = None

    def view(self, place: int) -> "PlaceViews":
        """What the block at this place of the stream sees."""
        return PlaceViews(self, place)

    def append(self, place: int, k: Tensor, v: Tensor) -> bool:
        """Adds the keys and values of the rows that write; True if no row has anything else to read."""
        own = self._writing()
        if self._index is not None:
            k, v = k[self._index], v[self._index]
        fresh = own.append(place, k, v)
        return fresh and self._index is None and (self.rule != "refresh" or set(self.recursions) == {1})

    def reserve(self, dtype: torch.dtype) -> PagedSlots | None:
        """In place of `append` and `read`: room at every place, which the caller fills.

        None, and nothing is reserved, where there are no pages of numbers of this kind, or rows that read otherwise.
        """
        if self.rule == "refresh" and max(self.recursions) > 1:
            return None
        own = self._writing().reserve(dtype) if self.writers else None
        if self.rule != "shared_first" or (self.writers and own is None):
            return own
        read = self._first()
        if not isinstance(read, PagedLists):
            return None
        where = None if own is None else own.where
        if where is not None and self._index is not None:
            everyone = where.new_full((self.width, self.packing.num_tokens), -1)
            where = everyone.index_copy_(1, self._index, where)
        return replace(read.slots(self.packing), where=where)

    def _first(self) -> Lists:
        """Lists of recursion 1, which all recursions read."""
        if self._read is None:
            first = Slot(self.block, 1)
            rows = [(sequence, first) for sequence in self.sequences]
            self._read = self.store.lists(rows, self.width, None)
        return self._read

    def _writing(self) -> Lists:
        """Lists of the rows that write, with room for their tokens."""
        if self._own is None:
            packing = self.packing
            if len(self.writers) < len(self.sequences):
                self._index, packing = packing.of_rows(self.writers)
            slots = {r: Slot(self.block, r) for r in set(self.recursions)}
            rows = [(self.sequences[row], slots[self.recursions[row]]) for row in self.writers]
            self._own = self.store.lists(rows, self.width, packing)
        return self._own

    def read(self, place: int) -> Keys | PagedKeys:
        """All that the queries of each row may see."""
        if self.rule == "refresh" and max(self.recursions) > 1:
            return self._latest(place)
        if self.rule == "shared_first":
            return self._first().read(place)
        assert self._own is not None
        return self._own.read(place)

    def _latest(self, place: int) -> Keys:
        """Of each token the latest visit up to the row's recursion; of visits that another one follows no trace."""
        deepest, starts = max(self.recursions), [0]
        rows = []
        for sequence, recursion in zip(self.sequences, self.recursions, strict=True):
            rows += [(sequence, Slot(self.block, r)) for r in range(1, recursion + 1)]
            starts.append(len(rows))
        if self._read is None:
            self._read = self.store.lists(rows, self.width, None)
        keys = self._read.gather(place)
        device = keys.time.device
        order = torch.arange(deepest, device=device)
        own, start = torch.tensor(self.recursions, device=device), torch.tensor(starts[:-1], device=device)
        index = start[:, None] + order.clamp(max=own[:, None] - 1)
        time = keys.time[index].masked_fill((order >= own[:, None])[..., None], NEVER)  # [B, R, S]
        there = time != NEVER
        width = int(time.masked_fill(~there, 0).max()) + 2
        place_of = time.clamp(max=width - 1)
        latest = torch.full((len(self.sequences), width), -1, device=device)
        for r in range(deepest):
            latest.scatter_(1, place_of[:, r], r)
        stands = there & (latest[:, None].expand(-1, deepest, -1).gather(2, place_of) == order[:, None])
        k, v = (part[index].flatten(1, 2) for part in (keys.k, keys.v))
        return Keys(k, v, time.masked_fill(~stands, NEVER).flatten(1))


class PlaceViews:
    """The slots of one step of a pass: the block's attention, and its experts'."""

    def __init__(self, lists: PassLists, place: int) -> None:
        self.lists, self.place = lists, place
        self.attention = AttentionView(lists, place)

    def expert(self, expert: int, step: int) -> "ExpertView":
        """The slots of one expert's step."""
        return ExpertView(self.lists, self.place, expert, step)


class AttentionView:
    """The slots of a block's attention."""

    def __init__(self, lists: PassLists, place: int) -> None:
        self.lists, self.place = lists, place
        self.writes = bool(lists.writers)

    def append(self, k: Tensor, v: Tensor, packing: Packing) -> bool:
        return self.lists.append(self.place, k, v)

    def read(self) -> Keys | PagedKeys:
        return self.lists.read(self.place)


class ExpertView:
    """The slots of one step of an expert: every visit has its own, by any rule."""

    writes = True

    def __init__(self, lists: PassLists, place: int, expert: int, step: int) -> None:
        self.pass_lists = lists
        self.slot = Slot(lists.block + place, 1, expert, step)

    def append(self, k: Tensor, v: Tensor, packing: Packing) -> bool:
        of = self.pass_lists
        rows = [(s, self.slot._replace(recursion=r)) for s, r in zip(of.sequences, of.recursions, strict=True)]
        self._own = of.store.lists(rows, 1, packing)
        return self._own.append(0, k, v)

    def read(self) -> Keys | PagedKeys:
        return self._own.read(0)
