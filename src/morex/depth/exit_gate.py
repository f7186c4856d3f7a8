"""`exit_gate` (Ouro, Zhu et al. 2025, arXiv 2510.25741, section 3): each recursion may be the last one.

After recursion r a token in state h_r leaves with the probability lambda_r = sigmoid(w . h_r + b), so that it leaves at
r with p_r = lambda_r * prod_{s<r} (1 - lambda_s); the last recursion takes what is left.

In training every token takes all R recursions, and the loss is the mean over tokens of sum_r p_r CE_r - beta * H(p),
CE_r being the cross-entropy of norm and head on h_r: the entropy keeps all recursions in use. In inference a token
leaves where p_1 + ... + p_r reaches the threshold, and no later recursion computes it. The rule sees no later token.

Where the caller fixes the depth, the gate is not asked.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morex.depth.policy import DepthPolicy
from morex.depth.router import DepthRouter, Routing, ScoreNet, Visit, put_rows, score_costs
from morex.nn.costs import Costs, Kept
from morex.nn.packing import Packing
from morex.nn.signals import Exits, Signals


@dataclass
class Leaving(Routing):
    """What the gate keeps of each token."""

    log_left: Tensor | None = None
    """ln of the probability of not having left yet [N]."""
    going: Tensor | None = None
    """Tokens that take the next recursion by the rule [N]; None for all."""
    log_probabilities: list[Tensor] = field(default_factory=list)
    """ln p_r of each recursion so far [N], in training."""
    states: list[Tensor] = field(default_factory=list)
    """h_r of each recursion so far [N, D], in training."""
    taken: Tensor | None = None
    """Recursion after which the rule lets a token go, from 0 [N], in training."""


class ExitGateRouter(DepthRouter):
    """One gate for all recursions; training goes through all of them, inference leaves early."""

    any_depth = True
    exit_rules = ("gate",)
    reads_every_state = True
    scores_are = "exits"

    def __init__(
        self, d_model: int, recursions: int, threshold: float, entropy_weight: float, initial_bias: float
    ) -> None:
        super().__init__(d_model, recursions)
        self.threshold = threshold
        self.score = ScoreNet(d_model, 1, "linear")
        self.bias = nn.Parameter(torch.full((1,), initial_bias))
        self.loss_weights["exit_entropy"] = -entropy_weight

    def takes_all(self, policy: DepthPolicy) -> bool:
        return super().takes_all(policy) or (self.training and not policy.is_forced)

    def begin(self, h: Tensor, packing: Packing, policy: DepthPolicy) -> tuple[Tensor, Routing]:
        h, routing = super().begin(h, packing, policy)
        left = h.new_zeros(h.shape[0], dtype=torch.promote_types(h.dtype, torch.float32))
        leaving = Leaving(packing, policy, routing.active, routing.depths, log_left=left)
        if self.training and not policy.is_forced:
            leaving.taken = torch.full_like(routing.active, policy.recursions - 1, dtype=torch.int64)
        return h, leaving

    def decide(self, h: Tensor, routing: Routing, r: int) -> Tensor | None:
        assert isinstance(routing, Leaving) and routing.log_left is not None
        if routing.policy.is_forced:
            return super().decide(h, routing, r)
        routing.scores.append(torch.full_like(routing.log_left, torch.nan))
        return None if routing.taken is not None else routing.going

    def merge(self, h: Tensor, y: Tensor, routing: Routing, visit: Visit) -> Tensor:
        assert isinstance(routing, Leaving) and routing.log_left is not None
        index, is_last = visit.packing.index, visit.recursion == routing.policy.recursions
        before = visit.packing.gather(routing.log_left)
        if not routing.policy.is_forced and not is_last:
            logit = self.score(y).squeeze(1).to(before.dtype) + self.bias
            left = before + F.logsigmoid(-logit)
            stays = -torch.expm1(left) < self._threshold(routing)
            routing.scores[-1] = put_rows(routing.scores[-1], index, logit.sigmoid().detach())
            routing.log_left = put_rows(routing.log_left, index, left)
            routing.going = put_rows(torch.zeros_like(routing.active), index, stays)
        if routing.taken is not None:
            routing.log_probabilities.append(before if is_last else before + F.logsigmoid(logit))
            routing.states.append(y)
            if not is_last:
                assert routing.going is not None
                first = ~routing.going & (routing.taken == routing.policy.recursions - 1)
                routing.taken = routing.taken.masked_fill(first, visit.recursion - 1)
        return put_rows(h, index, y)

    def finish(self, h: Tensor, routing: Routing) -> tuple[Tensor, Signals]:
        assert isinstance(routing, Leaving)
        if routing.taken is None:
            return super().finish(h, routing)
        exits = Exits(routing.states, torch.stack(routing.log_probabilities, 1), routing.taken)
        routing.stats["exits"] = exits.log_probabilities.detach().exp().sum(0)
        place = routing.taken[None, :, None].expand(1, *h.shape)
        h, signals = super().finish(torch.stack(routing.states).gather(0, place)[0], routing)
        signals.exits = exits
        return h, signals

    def _threshold(self, routing: Routing) -> float:
        asked = routing.policy.threshold
        return self.threshold if asked is None else asked

    @staticmethod
    def costs(
        d_model: int, recursions: int, taken: int | None = None, *, shares: tuple[float, ...] = (), **options: Any
    ) -> Costs:
        unit = score_costs(d_model, 1, "linear")
        # After the last recursion nobody is asked: all leave.
        asked = 0.0 if taken is not None else sum(shares[:-1])
        kept = Kept.alike(4.0 * d_model * len(shares))  # states, of which the first norm keeps none that is scored
        return Costs(unit.parameters + 1, unit.per_token * asked, kept=kept)
