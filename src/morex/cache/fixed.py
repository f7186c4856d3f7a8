"""A cache of fixed size, for a compiled decoding step: every token visits every slot, and its time is its place."""

import torch
from torch import Tensor

from morex.cache.slots import SlotStore
from morex.depth.schedule import Schedule, Slot
from morex.nn.attention import Keys
from morex.nn.packing import Packing


class FixedCache(SlotStore):
    """Keys and values [B, room, KV, dim] of each slot; a graph that was compiled for them stays valid."""

    def __init__(self, schedule: Schedule, shape: tuple[int, int, int, int], like: Tensor) -> None:
        """Args:
        schedule: of the model, whose slots these are.
        shape: (B, room, KV, dim).
        like: has the device and the dtype of the entries.
        """
        self.sequences, self.num_seen, slots = range(shape[0]), 0, [step.slot for step in schedule.steps]
        self.seen = torch.zeros(shape[0], dtype=torch.int64, device=like.device)
        self.keys, self.values = ({slot: like.new_zeros(shape) for slot in slots} for _ in range(2))
        self.time = torch.arange(shape[1], device=like.device).expand(shape[:2])

    @torch.no_grad()
    def append(self, slot: Slot, k: Tensor, v: Tensor, packing: Packing) -> bool:
        self.keys[slot][packing.row, packing.time] = k
        self.values[slot][packing.row, packing.time] = v
        return False

    def read(self, slot: Slot) -> Keys:
        return Keys(self.keys[slot], self.values[slot], self.time)  # entries that are not there yet are later

    def num_entries(self, slot: Slot) -> int:
        return self.num_seen

    def advance(self, packing: Packing) -> None:
        """Counts the tokens of a finished forward pass."""
        self.seen += packing.lengths
        self.num_seen += packing.num_tokens
