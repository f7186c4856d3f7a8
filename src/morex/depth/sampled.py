"""`sampled` (Huginn, Geiping et al. 2025, arXiv 2502.05171, section 3.3): one depth for all tokens, drawn every step.

    r = 1 + Poisson(exp(t)),  t ~ Normal(ln R - s^2 / 2, s)

Its mean is R + 1; a curriculum lets R rise in a line from 0 (McLeish et al. 2025, arXiv 2511.07384). The draw is a
function of (seed, step): the same on all ranks and in all microbatches of a step. The gradient goes through the last k
recursions only; what is injected into these gets its gradient through them. The first state is the group's input, or
random in training and zero in eval mode, so that a trained model may start anywhere. Inference takes R recursions, any
other number, or what an exit rule says.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from morex.depth.exits import ExitRuleRouter
from morex.depth.policy import DepthPolicy
from morex.depth.random_choice import mixed
from morex.depth.router import Routing
from morex.nn.noise import noise_like
from morex.nn.packing import Packing
from morex.nn.signals import Signals

NODES = 64
"""Points of the quadrature over t."""


class SampledRouter(ExitRuleRouter):
    """No decision of its own: a depth for everybody, random in training."""

    any_depth = True
    step: Tensor

    def __init__(
        self,
        d_model: int,
        recursions: int,
        spread: float,
        gradient_recursions: int | None,
        state: str,
        state_std: float,
        seed: int,
        curriculum_steps: int = 0,
    ) -> None:
        super().__init__(d_model, recursions)
        self.spread, self.gradient_recursions, self.seed = spread, gradient_recursions, seed
        self.state, self.state_std, self.curriculum_steps = state, state_std, curriculum_steps
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64))

    def settle(self, policy: DepthPolicy) -> DepthPolicy:
        if not self.training or policy.kind != "router":
            return super().settle(policy)
        step = int(self.step)
        return replace(policy, recursions=draw(self.mean_at(step), self.spread, self.seed, step))

    def mean_at(self, step: int) -> float:
        """R in the draw after `step` optimizer steps."""
        return self.recursions * min(1.0, (step + 1) / max(1, self.curriculum_steps))

    @contextmanager
    def gradient(self, policy: DepthPolicy, r: int) -> Iterator[None]:
        kept = self.gradient_recursions
        if not self.training or kept is None or r > policy.recursions - kept:
            yield
            return
        with torch.no_grad():
            yield
        # Autocast would go on with the weights that it has cast here, which have no gradient.
        torch.clear_autocast_cache()

    def begin(self, h: Tensor, packing: Packing, policy: DepthPolicy) -> tuple[Tensor, Routing]:
        h, routing = super().begin(h, packing, policy)
        if self.state == "input":
            return h, routing
        random = self.training and self.state_std > 0
        return noise_like(h, packing).mul_(self.state_std) if random else torch.zeros_like(h), routing

    def finish(self, h: Tensor, routing: Routing) -> tuple[Tensor, Signals]:
        h, signals = super().finish(h, routing)
        if self.training:  # as many as there were, which may be more than R
            signals.stats["active"] = torch.stack([mask.sum() for mask in routing.masks])
        return h, signals

    @staticmethod
    def train_visits(taken: int | None, recursions: int, **options: Any) -> tuple[float, float]:
        # Of a curriculum, this is what comes after it.
        kept = options["gradient_recursions"]
        if taken is not None:
            return taken, taken if kept is None else min(taken, kept)
        mean = 1.0 + recursions
        return mean, mean if kept is None else mean_up_to(kept, recursions, options["spread"])

    @torch.no_grad()
    def update(self, stats: dict[str, Tensor], step: int) -> None:
        self.step.fill_(step)


def draw(mean: float, spread: float, seed: int, step: int) -> int:
    """r of one step."""
    generator = torch.Generator().manual_seed(mixed(seed, step))
    t = math.log(mean) - spread**2 / 2 + spread * torch.randn((), generator=generator, dtype=torch.float64)
    return 1 + int(torch.poisson(t.exp(), generator=generator))


def mean_up_to(most: int, mean: float, spread: float) -> float:
    """E[min(r, most)], as the sum of P(r > j) for j < most, over t by Gauss-Hermite quadrature."""
    import numpy as np

    points, weights = np.polynomial.hermite_e.hermegauss(NODES)
    rate = np.exp(math.log(mean) - spread**2 / 2 + spread * points)
    term, below, total = np.exp(-rate), np.zeros(NODES), float(most > 0)
    for j in range(1, most):  # r > j where the Poisson variable is j or more
        below = below + term
        term = term * rate / j
        total += float(weights @ (1 - below) / weights.sum())
    return total
