"""`kv: refresh`: at recursion r a query reads, for each token, the entry of its latest visit up to r.

The slots are those of `per_recursion`: every visit is kept, because a query at recursion 1 still reads the first ones.
What a query of recursion r reads is put together by time, one recursion on top of the others: slot 1, over it what slot
2 has, and so on. A token that skipped recursions is found where it was last; one that has not come by at all is absent.
"""

import torch
from torch import Tensor

from morex.cache.batch import KVCache
from morex.cache.slots import SlotStore
from morex.depth.schedule import Slot
from morex.nn.keys import NEVER, Keys
from morex.nn.packing import Packing


class LatestVisits(SlotStore):
    """The latest visits to each block, over a store that keeps all; serves one forward pass."""

    def __init__(self, store: SlotStore, batch: Packing) -> None:
        """Args:
        store: the cache, or the store of this pass.
        batch: all tokens of the pass.
        """
        self.store, self.batch = store, batch
        before = store.num_seen if isinstance(store, KVCache) else 0
        self.total = before + batch.num_tokens
        self._read: dict[int, tuple[int, Keys | None]] = {}
        """Of each block, how many recursions have been read, and what they add up to."""

    def append(self, slot: Slot, k: Tensor, v: Tensor, packing: Packing) -> bool:
        """Adds a visit; True if its own tokens are all that its queries read."""
        fresh = self.store.append(slot, k, v, packing)
        earlier = (self.num_entries(slot._replace(recursion=r)) for r in range(1, slot.recursion))
        return fresh and (self.num_entries(slot) == self.total or not any(earlier))

    def read(self, slot: Slot) -> Keys:
        """The latest visits up to the slot's recursion, in the order of time."""
        done, keys = self._read.get(slot.block, (0, None))
        for r in range(done + 1, slot.recursion + 1):
            visited = slot._replace(recursion=r)
            entries = self.num_entries(visited)
            if entries == self.total:
                keys = self.store.read(visited)
            elif entries:
                keys = self._over(keys, self.store.read(visited))
                if not any(self.num_entries(slot._replace(recursion=s)) == self.total for s in range(1, r)):
                    keys = _without_gaps(keys)
        self._read[slot.block] = slot.recursion, keys
        assert keys is not None, f"nobody has come by slot {slot}"
        return keys

    def num_entries(self, slot: Slot) -> int:
        return self.store.num_entries(slot)

    def _over(self, below: Keys | None, above: Keys) -> Keys:
        """Keys by time: those above, and where there are none, those below."""
        width = int(self.batch.time.max()) + 1
        if below is None:
            return above
        # Padding, and what only rows without a query have, goes to a column of its own, which nobody reads.
        size = (above.time.shape[0], width + 1)
        rows = torch.arange(size[0], device=above.time.device)[:, None]
        k, v = (part.new_zeros(*size, *part.shape[2:]) for part in (above.k, above.v))
        time = above.time.new_full(size, NEVER)
        documents = None if above.documents is None else above.documents.new_full(size, -1)
        for keys in (below, above):
            place = (rows, keys.time.clamp(max=width))
            k, v, time = k.index_put(place, keys.k), v.index_put(place, keys.v), time.index_put(place, keys.time)
            if documents is not None and keys.documents is not None:
                documents = documents.index_put(place, keys.documents)
        return Keys(k[:, :width], v[:, :width], time[:, :width], None if documents is None else documents[:, :width])


def _without_gaps(keys: Keys) -> Keys:
    """The same keys, those that are there in front: what is absent costs no arithmetic."""
    longest = int((keys.time != NEVER).sum(1).max())
    order = keys.time.argsort(1)[:, :longest]
    rows = torch.arange(order.shape[0], device=order.device)[:, None]
    documents = None if keys.documents is None else keys.documents[rows, order]
    return Keys(keys.k[rows, order], keys.v[rows, order], keys.time[rows, order], documents)
