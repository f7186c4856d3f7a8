"""`random`: the control. A hash of (seed, position, recursion) decides, and the gate is the constant alpha / 2."""

import torch
from torch import Tensor

from morex.depth.gated import GatedRouter
from morex.depth.router import Routing


class RandomRouter(GatedRouter):
    """Active tokens in the given shares, nested, by position alone."""

    def __init__(
        self, d_model: int, recursions: int, capacities: tuple[float, ...], alpha: float, gate: str, seed: int
    ) -> None:
        super().__init__(d_model, recursions, capacities, alpha, gate)
        self.seed = seed
        before = (1.0, *capacities[:-1])
        self.keep = [now / last for now, last in zip(capacities, before, strict=True)]

    def decide(self, h: Tensor, routing: Routing, r: int) -> Tensor | None:
        if routing.depths is not None:
            return routing.depths >= r
        if routing.policy.is_forced or (self.keep[r - 1] == 1 and bool(routing.active.all())):
            return None
        return routing.active & (uniform_hash(self.seed, routing.packing.positions, r) < self.keep[r - 1])

    def gates(self, h: Tensor, routing: Routing, r: int) -> Tensor:
        return h.new_full((h.shape[0],), self.alpha / 2)


def uniform_hash(seed: int, position: Tensor, r: int) -> Tensor:
    """Numbers in [0, 1) from (seed, position [N], recursion): splitmix64's mixing in wrapping integer arithmetic."""
    mask = (1 << 64) - 1
    start = _signed((seed * 0x9E3779B97F4A7C15 + r * 0xD1B54A32D192ED03) & mask)
    x = position * _signed(0xBF58476D1CE4E5B9) + start
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift(x, shift)) * _signed(factor)
    return _shift(x ^ _shift(x, 31), 40).to(torch.float64) / (1 << 24)


def mixed(seed: int, count: int) -> int:
    """A seed below 2^63 for the count-th draw of a series, by the same mixing."""
    mask = (1 << 64) - 1
    x = (seed * 0x9E3779B97F4A7C15 + (count + 1) * 0xD1B54A32D192ED03) & mask
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & mask
    return (x ^ (x >> 31)) >> 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
