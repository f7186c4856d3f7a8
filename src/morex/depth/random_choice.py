"""`random`: the control. A hash of (seed, position, recursion) decides, and the gate is the constant alpha / 2."""

import torch
from torch import Tensor

from morex.depth.gated import GatedRouter
from morex.depth.policy import DepthPolicy
from morex.depth.router import Routing
from morex.nn.fast import available
from morex.nn.packing import Packing

KNOWN = 2**14
"""Positions whose depths are worked out once and kept."""


class RandomRouter(GatedRouter):
    """Active tokens in the given shares, nested, by position alone."""

    def __init__(
        self, d_model: int, recursions: int, capacities: tuple[float, ...], alpha: float, gate: str, seed: int
    ) -> None:
        super().__init__(d_model, recursions, capacities, alpha, gate)
        self.seed = seed
        before = (1.0, *capacities[:-1])
        self.keep = [now / last for now, last in zip(capacities, before, strict=True)]
        self.full = next((r for r, share in enumerate(self.keep) if share < 1), recursions)
        """Recursions that everybody takes."""
        self._known: Tensor | None = None
        """Recursions of the tokens at the first `KNOWN` positions."""

    def begin(self, h: Tensor, packing: Packing, policy: DepthPolicy) -> tuple[Tensor, Routing]:
        h, routing = super().begin(h, packing, policy)
        if not policy.is_forced and self.full < self.recursions:
            routing.depths = self._depths(packing.positions)
        return h, routing

    def _depths(self, positions: Tensor) -> Tensor:
        """Recursions that the tokens at these positions take [N]."""
        if positions.numel() and available(positions):  # elsewhere, a look at the positions would cost a wait
            low, high = (int(end) for end in positions.aminmax())
            if low >= 0 and high < KNOWN:
                if self._known is None:
                    self._known = self._computed(torch.arange(KNOWN))
                return self._known[positions]
        return self._computed(positions)

    def _computed(self, positions: Tensor) -> Tensor:
        starts = [_start(self.seed, r) for r in range(1, self.recursions + 1)]
        keep = positions.new_tensor(self.keep, dtype=torch.float64)
        kept = _uniform(positions, positions.new_tensor(starts)[:, None]) < keep[:, None]
        return kept.long().cumprod(0).sum(0)

    def decide(self, h: Tensor, routing: Routing, r: int) -> Tensor | None:
        return None if not routing.policy.is_forced and r <= self.full else super().decide(h, routing, r)

    def gates(self, h: Tensor, routing: Routing, r: int) -> float:
        return self.alpha / 2


def uniform_hash(seed: int, position: Tensor, r: int) -> Tensor:
    """Numbers in [0, 1) from (seed, position [N], recursion): splitmix64's mixing in wrapping integer arithmetic."""
    return _uniform(position, _start(seed, r))


def _start(seed: int, r: int) -> int:
    return _signed((seed * 0x9E3779B97F4A7C15 + r * 0xD1B54A32D192ED03) & ((1 << 64) - 1))


def _uniform(position: Tensor, start: int | Tensor) -> Tensor:
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
