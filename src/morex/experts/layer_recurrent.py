"""`layer_recurrent`: the whole expert layer recurs on its own output (Mixture of Recurrent Experts, Synthesis II).

    s_0 = x
    S times:  l <- router(s);  l' <- ema l' + (1 - ema) l;  s <- s + scale * MoE(s) with the weights of l' / temperature

The branch is s - x. l' starts as the first step's logits; it belongs to a token and a call, and nothing outlives a
call. The temperature of a token is 1, or as much more as its router's entropy needs to reach the floor.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from morex.experts.attention import outlives
from morex.experts.moe import MoE, kept_rows
from morex.experts.router import ExpertRouter, expert_router_costs
from morex.nn.attention import AttentionShape
from morex.nn.costs import Costs, Kept
from morex.nn.mixers import ExpertViews, feed_forward_costs
from morex.nn.moves import move
from morex.nn.packing import Packing
from morex.nn.signals import Reports, Signals

REACHABLE = 0.9
"""The floor is at most this share of ln E, the entropy of a router without preference."""
HALVINGS = 40
"""Steps at most of the search for a temperature; ten are rarely needed."""


class LayerRecurrentExperts(MoE):
    """`MoE` S times, routed anew on the moving state."""

    def __init__(
        self,
        d_model: int,
        router: ExpertRouter,
        shape: AttentionShape,
        eps: float,
        expert: str,
        d_ff: int,
        steps: int,
        scale: float,
        ema: float,
        entropy_floor: float,
    ) -> None:
        """Args:
        steps: times S.
        scale: of what each step adds.
        ema: share of the earlier steps' logits that is kept; 0 routes on each step's own.
        entropy_floor: least entropy of a token's router in nats; 0 leaves it free.
        """
        super().__init__(d_model, router, shape, eps, expert, d_ff)
        self.steps, self.scale, self.ema = steps, scale, ema
        self.entropy_floor = min(entropy_floor, REACHABLE * math.log(router.experts))

    def forward(
        self, x: Tensor, packing: Packing, views: ExpertViews | None = None, traces: bool = False
    ) -> tuple[Tensor, Reports]:
        """x [N, D] -> [N, D] and the router's report over all steps."""
        state, average, reports = x, None, []
        with_stats = not outlives(views)
        for _ in range(self.steps):
            logits = self.router.logits(state)
            average = logits if average is None else self.ema * average + (1 - self.ema) * logits
            warm = average / temperature(average, self.entropy_floor).unsqueeze(1)
            chosen, weights, signals = self.router.route(warm, with_stats)
            before, state = state, state + self.scale * self.mix(state, chosen, weights)
            if traces:
                about = {
                    "state": state.detach(),
                    "moves": move(before.detach(), state.detach()).unsqueeze(1),
                    "entropy": _entropy(average.detach()),
                }
                signals.choices = [replace(choice, **about) for choice in signals.choices]
            reports.append(signals)
        return state - x, {"router": Signals.join(reports)}

    @staticmethod
    def costs(  # type: ignore[override]
        d_model: int,
        experts: int,
        top_k: int,
        shape: AttentionShape,
        expert: str,
        d_ff: int,
        steps: int,
        **options: Any,
    ) -> Costs:
        """Closed-form costs; `options` are those of the constructor that cost nothing."""
        router, one = expert_router_costs(d_model, experts), feed_forward_costs(expert, d_model, d_ff)
        per_token = steps * (router.per_token + top_k * one.per_token)
        # The state of a step, which the router takes as it is; before the first step that is the layer's input.
        kept = router.kept + kept_rows(expert, d_model, d_ff) * top_k + Kept(4.0 * d_model, 0.0, 4.0 * d_model, 0.0)
        return Costs(
            router.parameters + experts * one.parameters,
            per_token,
            kept=kept * steps,
            kept_weights=one.cast_weights * (experts * steps),
        )


def temperature(logits: Tensor, floor: float) -> Tensor:
    """The least temperature >= 1 at which softmax(logits / temperature) has an entropy of at least `floor`.

    Args:
        logits: [N, E].
        floor: in nats, at most `REACHABLE` * ln E.

    Returns:
        [N], with the gradient of the implicit function.
    """
    found = logits.new_ones(logits.shape[0])
    low = (_entropy(logits.detach()) < floor).nonzero().squeeze(1)
    if not low.shape[0]:
        return found
    peaked = logits[low]
    inverse = _inverse_temperature(peaked.detach(), floor).unsqueeze(1)
    # A Newton step has the value that was found and the gradient that halving an interval has not:
    # d entropy / d inverse = -inverse * variance of the logits.
    probabilities = (inverse * peaked.detach()).softmax(-1)
    mean = (probabilities * peaked.detach()).sum(1, keepdim=True)
    slope = -inverse.squeeze(1) * (probabilities * (peaked.detach() - mean).square()).sum(1)
    inverse = inverse.squeeze(1) - (_entropy(inverse * peaked) - floor) / slope
    return found.index_copy(0, low, 1 / inverse)


def _inverse_temperature(logits: Tensor, floor: float) -> Tensor:
    """1 / temperature at which the entropy of these logits [N, E], which is lower at 1, is `floor`; [N].

    Newton's method on its logarithm u inside an interval that holds the root, which is halved where a Newton step
    leaves it or does not halve the step before: d entropy / d u = -variance of the scaled logits.
    """
    # Sums over few columns are slow: tokens run along the last dimension.
    logits = (logits - logits.amax(1, keepdim=True)).t().contiguous()
    # Logits within 0.1 of one another have all but the highest entropy.
    below, near = -(-10 * logits.amin(0)).clamp(min=1).log(), torch.finfo(logits.dtype).eps ** 0.75
    above, u, moved = torch.zeros_like(below), below / 2, -below
    for _ in range(HALVINGS):
        scaled = logits * u.exp()
        weights = scaled.exp()
        total = weights.sum(0)
        weights /= total
        mean = (weights * scaled).sum(0)
        excess = total.log() - mean - floor
        found = excess.abs() <= near
        if found.all():
            break
        below, above = torch.where(excess >= 0, u, below), torch.where(excess >= 0, above, u)
        newton = u + excess / (weights * (scaled - mean).square()).sum(0)
        good = (newton > below) & (newton < above) & ((newton - u).abs() < moved.abs() / 2)
        following = torch.where(good, newton, (below + above) / 2)
        moved, u = following - u, torch.where(found, u, following)
    return u.exp()


def _entropy(logits: Tensor) -> Tensor:
    """Of softmax(logits) [N, E], in nats [N]; 0 and not NaN where a probability vanishes, and so its gradient."""
    logarithms = logits.log_softmax(-1)
    return -(logarithms.exp() * logarithms).sum(-1)
