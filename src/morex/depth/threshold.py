"""`threshold`: candidates with logit > b_r are active, the same causal rule in training and in inference.

After each optimizer step b_r <- m b_r + (1 - m) quantile_{1 - c_r / c_{r-1}}(candidates' logits), so that the share of
active tokens follows c_r; b_r is -inf where c_r = c_{r-1}. Moving b_r after training turns the budget.
"""

import torch
from torch import Tensor

from morex.depth.gated import LearnedGateRouter
from morex.depth.router import Routing


class ThresholdRouter(LearnedGateRouter):
    """A tracked quantile of the candidates' logits decides."""

    threshold: Tensor

    def __init__(
        self,
        d_model: int,
        recursions: int,
        capacities: tuple[float, ...],
        alpha: float,
        gate: str,
        score: str,
        router: str,
        z_weight: float,
        momentum: float,
    ) -> None:
        super().__init__(d_model, recursions, capacities, alpha, gate, score, router, z_weight)
        self.momentum = momentum
        before = (1.0, *capacities[:-1])
        self.keep = [now / last for now, last in zip(capacities, before, strict=True)]
        start = [-torch.inf if keep == 1 else 0.0 for keep in self.keep]
        self.register_buffer("threshold", torch.tensor(start))

    def choose(self, logits: Tensor, candidates: Tensor, h: Tensor, routing: Routing, r: int) -> Tensor | None:
        if self.training and self.keep[r - 1] < 1:
            routing.stats[f"samples_{r}"] = logits.detach()[candidates]
        if r == 1 and self.keep[0] == 1:
            return None
        return candidates & (logits > self.threshold[r - 1])

    @torch.no_grad()
    def update(self, stats: dict[str, Tensor], step: int) -> None:
        for r, keep in enumerate(self.keep, start=1):
            samples = stats.get(f"samples_{r}")
            if keep < 1 and samples is not None and samples.numel():
                target = quantile(samples.double(), 1 - keep).to(self.threshold.dtype)
                self.threshold[r - 1] = self.momentum * self.threshold[r - 1] + (1 - self.momentum) * target


def quantile(samples: Tensor, share: float) -> Tensor:
    """The linearly interpolated quantile of samples [N], of any size; `torch.quantile` takes at most 2^24."""
    ordered = samples.sort().values
    place = share * (samples.shape[0] - 1)
    below = int(place)
    above = min(below + 1, samples.shape[0] - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)
