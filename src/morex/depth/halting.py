"""`halting` (Adaptive Computation Time, Graves 2016, arXiv 1603.08983): a token recurs until its probability is spent.

After recursion r an active token, now in state h_r, has the halting probability p_r = sigmoid(w . h_r + b). It stops at
N = min{r: p_1 + ... + p_r >= 1 - epsilon, or r = R}, and no later recursion computes it. Its output is the mean of its
states, sum_{r<N} p_r h_r + remainder * h_N with remainder = 1 - sum_{r<N} p_r, through which the halting unit learns.
The ponder cost, the mean of N + remainder, asks for fewer recursions; its gradient is that of the remainder.

Where the caller fixes the depth, N is the caller's, the weights are the same, and there is no ponder cost. Beyond its
own N a token has at most epsilon left to spend: p_r is cut to what is left, so the weights still sum to 1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from morex.depth.policy import DepthPolicy
from morex.depth.router import DepthRouter, Routing, ScoreNet, Visit, add_rows, put_rows, score_costs
from morex.nn import ranks
from morex.nn.costs import Costs, Kept
from morex.nn.packing import Packing
from morex.nn.signals import Signals


@dataclass
class Halting(Routing):
    """What the router keeps of each token beside the state it has reached."""

    spent: Tensor | None = None
    """Halting probabilities so far, summed [N]."""
    going: Tensor | None = None
    """Tokens that take the next recursion [N]; None for all."""
    output: Tensor | None = None
    """States so far, weighted and summed [N, D]."""
    remainder: Tensor | float = 0.0
    """Remainders of the tokens that have halted, summed."""
    has_dummy: bool = False


class HaltingRouter(DepthRouter):
    """One halting unit for all recursions; the same causal rule in training and in inference."""

    scores_are = "halting"

    def __init__(
        self, d_model: int, recursions: int, epsilon: float, ponder_weight: float, initial_bias: float
    ) -> None:
        super().__init__(d_model, recursions)
        self.epsilon = epsilon
        self.score = ScoreNet(d_model, 1, "linear")
        self.bias = nn.Parameter(torch.full((1,), initial_bias))
        self.loss_weights["ponder"] = ponder_weight

    def begin(self, h: Tensor, packing: Packing, policy: DepthPolicy) -> tuple[Tensor, Routing]:
        h, routing = super().begin(h, packing, policy)
        spent = h.new_zeros(h.shape[0], dtype=torch.promote_types(h.dtype, torch.float32))
        return h, Halting(packing, policy, routing.active, routing.depths, spent=spent)

    def packed(self, h: Tensor, routing: Routing, r: int) -> Visit | None:
        assert isinstance(routing, Halting)
        visit = super().packed(h, routing, r)
        routing.has_dummy |= visit is not None and visit.is_dummy
        return visit

    def decide(self, h: Tensor, routing: Routing, r: int) -> Tensor | None:
        assert isinstance(routing, Halting) and routing.spent is not None
        routing.scores.append(torch.full_like(routing.spent, torch.nan))
        return routing.going

    def merge(self, h: Tensor, y: Tensor, routing: Routing, visit: Visit) -> Tensor:
        assert isinstance(routing, Halting) and routing.spent is not None
        index, spent = visit.packing.index, visit.packing.gather(routing.spent)
        left = (1 - spent).clamp(min=0)
        weight, halted = left, left  # as it is at the last recursion, where all stop
        if visit.recursion < routing.policy.recursions:
            p = torch.sigmoid(self.score(y).squeeze(1).to(spent.dtype) + self.bias)
            going = self._goes_on(spent + p, routing, visit)
            weight, halted = torch.where(going, torch.minimum(p, left), left), left.masked_fill(going, 0)
            routing.spent = put_rows(routing.spent, index, spent + p)
            routing.going = put_rows(torch.zeros_like(routing.active), index, going)
            routing.scores[-1] = put_rows(routing.scores[-1], index, p.detach())
        routing.remainder = routing.remainder + halted.sum()
        part = weight.to(y.dtype).unsqueeze(1) * y
        if routing.output is None:
            routing.output = part
        else:
            routing.output = routing.output + part if index is None else add_rows(routing.output, index, part)
        return put_rows(h, index, y)

    def finish(self, h: Tensor, routing: Routing) -> tuple[Tensor, Signals]:
        assert isinstance(routing, Halting) and routing.output is not None
        output, remainder = routing.output, torch.as_tensor(routing.remainder)
        if routing.has_dummy:  # it hangs on the states, which the output does not read
            output = output + 0.0 * h[:1].sum()
        routing.stats["remainder"] = remainder.detach()
        if self.training and not routing.policy.is_forced:
            updates = torch.stack(routing.masks).sum()
            routing.add_loss("ponder", ranks.mean(updates + remainder, h.shape[0]))
        return super().finish(output, routing)

    def _goes_on(self, spent: Tensor, routing: Routing, visit: Visit) -> Tensor:
        """Tokens of the visit that take the next recursion [M], from what they have spent by now [M]."""
        if routing.depths is not None:
            return visit.packing.gather(routing.depths) > visit.recursion
        if routing.policy.is_forced:
            return torch.ones_like(spent, dtype=torch.bool)
        return spent < 1 - self.epsilon

    @staticmethod
    def costs(
        d_model: int, recursions: int, taken: int | None = None, *, shares: tuple[float, ...] = (), **options: Any
    ) -> Costs:
        unit = score_costs(d_model, 1, "linear")
        # The tokens of the last recursion are not asked: they stop in any case.
        kept = Kept.alike(4.0 * d_model * sum(shares))  # the states that are scored and weighted
        return Costs(unit.parameters + 1, unit.per_token * sum(shares[:-1]), kept=kept)
