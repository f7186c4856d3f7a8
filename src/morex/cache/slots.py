"""What a forward pass sees of a cache, and the store that lives for one pass.

There is one entry per visit: slot (block, recursion), or (block, recursion, expert, step) inside an expert. Under
`per_recursion` a token writes and reads the slot of each recursion that it takes; under `shared_first` only
recursion 1 writes, and later recursions read its slot; under `refresh` a token writes as under `per_recursion`, and a
query reads each token's latest visit (`morex.cache.latest`). The stack asks for a view per step and hands it to the
block.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from morex.depth.schedule import Slot, Step
from morex.nn.keys import NEVER, Keys, KeyView, PagedKeys
from morex.nn.packing import Packing

KVRule = Literal["per_recursion", "shared_first", "refresh"]


class SlotStore(ABC):
    """Holds the keys and values of slots."""

    @abstractmethod
    def append(self, slot: Slot, k: Tensor, v: Tensor, packing: Packing) -> bool:
        """Adds k, v [N, KV, dim] of the packing's tokens to their rows; True if the slot was empty before."""

    @abstractmethod
    def read(self, slot: Slot) -> Keys:
        """All keys and values of a slot, right-padded."""

    def view(self, slot: Slot) -> Keys | PagedKeys:
        """The same where they stand, if attention can read them there."""
        return self.read(slot)

    @abstractmethod
    def num_entries(self, slot: Slot) -> int:
        """Entries of a slot, over all rows; 0 where nobody came by."""


@dataclass
class SlotView:
    """One slot, as an attention sees it."""

    store: SlotStore
    slot: Slot
    writes: bool = True

    def append(self, k: Tensor, v: Tensor, packing: Packing) -> bool:
        return self.store.append(self.slot, k, v, packing)

    def read(self) -> Keys | PagedKeys:
        return self.store.view(self.slot)


@dataclass
class StepViews:
    """The slots of one step: the block's attention, and the experts' where a cache outlives the call."""

    attention: KeyView | None
    store: SlotStore | None
    slot: Slot

    def expert(self, expert: int, step: int) -> KeyView | None:
        if self.store is None:
            return None
        return SlotView(self.store, self.slot._replace(expert=expert, step=step))


def views_of(step: Step, rule: KVRule, cache: SlotStore | None, call: SlotStore) -> StepViews | None:
    """The slots that a step writes and reads.

    Args:
        step: entry of the schedule.
        rule: how recursions share keys.
        cache: the cache that outlives the call, if any.
        call: store of this forward pass: what `shared_first` uses where there is no cache, and `refresh` always.

    Returns:
        None where attention needs nothing but the tokens in hand.
    """
    if rule == "per_recursion" and cache is None:
        return None
    store = call if cache is None or rule == "refresh" else cache
    if rule != "shared_first":
        return StepViews(SlotView(store, step.slot), cache, step.slot)
    first = SlotView(store, Slot(step.block, 1), writes=step.recursion == 1)
    return StepViews(first, cache, step.slot)


class CallStore(SlotStore):
    """Keys and values of one forward pass, with their gradients. What a slot is written first stays."""

    def __init__(self) -> None:
        self._slots: dict[Slot, tuple[Keys, Packing]] = {}

    def append(self, slot: Slot, k: Tensor, v: Tensor, packing: Packing) -> bool:
        # A step that is computed again for its gradient does all of this again, and finds what it wrote there already.
        documents = None if packing.documents is None else packing.pad(packing.documents, -1)
        keys = Keys(packing.pad(k), packing.pad(v), packing.pad(packing.time, NEVER), documents)
        known = self._slots.setdefault(slot, (keys, packing))
        assert known[1] is packing, f"slot {slot} is written twice in one call"
        return True

    def read(self, slot: Slot) -> Keys:
        return self._slots[slot][0]

    def num_entries(self, slot: Slot) -> int:
        return self._slots[slot][1].num_tokens if slot in self._slots else 0
