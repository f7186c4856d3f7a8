"""Dynamic loss scaling, which training in fp16 needs (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).

Gradients below 6e-8 are zero in fp16. So the loss is multiplied before the backward pass and gradients are divided
before the update. A factor that was too large makes some gradient overflow: that update is left out and the factor is
halved; after 2,000 updates in a row it is doubled.
"""

import math
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1.0
"""A gradient that overflows at this scale does so by itself."""


class LossScale:
    """The factor of a training; without fp16 it is 1 and changes nothing."""

    def __init__(self, device: str, is_needed: bool) -> None:
        """Args:
        device: type of the device that computes.
        is_needed: whether the training computes in fp16.
        """
        # What is too large on one rank is so on all: torch exchanges that where gradients are divided over ranks.
        self._scaler = torch.amp.GradScaler(device, enabled=is_needed)
        self.skipped = 0
        """Updates that were left out."""

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss as the backward pass takes it."""
        found: Tensor = self._scaler.scale(loss)
        return found

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients again, once a step and before anything looks at them."""
        self._scaler.unscale_(optimizer)

    def explains(self, grad_norm: float) -> bool:
        """Whether a gradient norm that is not finite may be due to the scale alone."""
        return self._scaler.is_enabled() and not math.isfinite(grad_norm) and self._scaler.get_scale() > SMALLEST

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the update, or leaves it out where a gradient has overflowed, and moves the scale."""
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        self.skipped += self._scaler.get_scale() < before

    def pass_over(self) -> None:
        """Ends a step whose update is not made for other reasons."""
        if self._scaler.is_enabled():
            self._scaler.update()

    def report(self) -> dict[str, float]:
        """What metrics say about it; nothing where nothing is scaled."""
        if not self._scaler.is_enabled():
            return {}
        return {"loss_scale": self._scaler.get_scale(), "skipped_updates": self.skipped}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; nothing where nothing is scaled."""
        state = self._scaler.state_dict()
        return state and {**state, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`; from nothing it begins anew."""
        if state and self._scaler.is_enabled():
            self.skipped = state["skipped"]
            self._scaler.load_state_dict({name: value for name, value in state.items() if name != "skipped"})
