"""A cache as the model's forward takes it: B sequences of a store."""

from collections.abc import Sequence

import torch
from torch import Tensor

from morex.cache.slots import SlotStore
from morex.cache.store import KVStore, Lists
from morex.depth.schedule import Schedule, Slot, Stream
from morex.nn.keys import Keys, PagedKeys
from morex.nn.packing import Packing


class KVCache(SlotStore):
    """Row b of a batch is sequence b of these; a cache outlives forward passes."""

    def __init__(self, store: KVStore, sequences: Sequence[int], schedule: Schedule) -> None:
        """Args:
        store: where the entries are.
        sequences: of the rows, none twice.
        schedule: of the model, which says what slots there are.
        """
        self.store, self.sequences, self.schedule = store, list(sequences), schedule
        self._in_hand: dict[Slot, tuple[Packing, Lists]] = {}
        """By stream, the lists that the pass in hand has written to."""

    @property
    def seen(self) -> Tensor:
        """Tokens of each sequence that the model has taken in [B]."""
        return torch.tensor([self.store.tokens(sequence) for sequence in self.sequences])

    @property
    def num_seen(self) -> int:
        """Their sum."""
        return sum(self.store.tokens(sequence) for sequence in self.sequences)

    def append(self, slot: Slot, k: Tensor, v: Tensor, packing: Packing) -> bool:
        stream = self.schedule.stream(slot)
        known = self._in_hand.get(stream.first)
        if known is None or known[0] is not packing:
            known = self._in_hand[stream.first] = packing, self._lists(stream, packing)
        return known[1].append(stream.place, k, v)

    def read(self, slot: Slot) -> Keys:
        lists, place = self._in(slot)
        return lists.gather(place)

    def view(self, slot: Slot) -> Keys | PagedKeys:
        lists, place = self._in(slot)
        return lists.read(place)

    def _in(self, slot: Slot) -> tuple[Lists, int]:
        """The lists of a slot's stream, those that the pass in hand has written to if it has, and its place."""
        stream = self.schedule.stream(slot)
        known = self._in_hand.get(stream.first)
        return (self._lists(stream, None) if known is None else known[1]), stream.place

    def num_entries(self, slot: Slot) -> int:
        stream = self.schedule.stream(slot)
        return sum(self.store.num_entries(sequence, stream) for sequence in self.sequences)

    def advance(self, packing: Packing) -> None:
        """Counts the tokens of a finished forward pass."""
        self._in_hand.clear()
        for sequence, count in zip(self.sequences, packing.counts, strict=True):
            self.store.advance(sequence, count)

    def bytes(self) -> int:
        """Bytes of the keys and values stored, room that is not used left out."""
        return self.store.bytes()

    def _lists(self, stream: Stream, packing: Packing | None) -> Lists:
        return self.store.lists([(sequence, stream.first) for sequence in self.sequences], stream.width, packing)
