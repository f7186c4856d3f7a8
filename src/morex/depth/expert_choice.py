"""`expert_choice` (Mixture of Recursions, arXiv 2507.10524, eq. 2.1): each recursion picks its top tokens.

Training, and the oracle in eval mode, take the top max(1, floor(c_r T)) candidates of each sequence, which sees later
tokens. The causal rule takes candidates with logit >= 0; it is learned by a binary cross-entropy against top-k
membership, on the router's own logits (`aux_loss`) or by a second predictor (`aux_router`).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morex.depth.gated import LearnedGateRouter, nets_costs
from morex.depth.router import Routing, ScoreNet
from morex.nn import ranks
from morex.nn.costs import Costs
from morex.nn.packing import Packing


class ExpertChoiceRouter(LearnedGateRouter):
    """Top tokens per recursion in training, a causal threshold in inference."""

    capacity: Tensor

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
        causal: str,
        causal_weight: float,
        warmup_steps: int,
        hierarchical: bool,
    ) -> None:
        super().__init__(d_model, recursions, capacities, alpha, gate, score, router, z_weight)
        self.causal, self.warmup_steps, self.hierarchical = causal, warmup_steps, hierarchical
        self.is_causal, self.is_nested = causal != "none", hierarchical
        self.predictor = None
        if causal == "aux_router":
            choosing = [str(r) for r, capacity in enumerate(capacities) if capacity < 1]
            self.predictor = nn.ModuleDict({r: ScoreNet(d_model, 1, router) for r in choosing})
        if causal != "none":
            self.loss_weights["router_bce"] = causal_weight
        self.register_buffer("capacity", torch.tensor(self.capacities_at(0), dtype=torch.float64))

    def candidates(self, routing: Routing) -> Tensor:
        return routing.active if self.hierarchical else torch.ones_like(routing.active)

    def choose(self, logits: Tensor, candidates: Tensor, h: Tensor, routing: Routing, r: int) -> Tensor | None:
        if self.capacities[r - 1] == 1:
            return None
        judged = logits if self.predictor is None else self.predictor[str(r - 1)](h.detach()).squeeze(1)
        if not (self.training or routing.policy.kind == "oracle"):
            return candidates & (judged >= 0)
        top = top_tokens(logits, candidates, routing.packing, self.capacity[r - 1])
        if self.is_causal:
            target, weight = top.to(judged.dtype), candidates.to(judged.dtype)
            term = F.binary_cross_entropy_with_logits(judged, target, weight, reduction="sum")
            # As long as a warm-up lets everybody go on there is nothing to learn.
            term = term * (self.capacity[r - 1] < 1)
            routing.add_loss("router_bce", ranks.mean(term, candidates.sum()))
        return top

    def capacities_at(self, step: int) -> list[float]:
        """Capacities after `step` optimizer steps: from 1 to their value along a cosine during warm-up."""
        if step >= self.warmup_steps:
            return list(self.capacities)
        left = 0.5 * (1 + math.cos(math.pi * step / self.warmup_steps))
        return [c + (1 - c) * left for c in self.capacities]

    @staticmethod
    def costs(d_model: int, recursions: int, taken: int | None = None, **options: Any) -> Costs:
        scores = LearnedGateRouter.costs(d_model, recursions, taken, **options)
        if options["causal"] != "aux_router":
            return scores
        predictors = sum(capacity < 1 for capacity in options["capacities"])
        used = 0 if taken is not None else predictors
        first_layer = used * 2.0 * d_model * (1 if options["router"] == "linear" else 2 * d_model)
        stopped = Costs(per_token_stopped=first_layer)
        return scores + nets_costs(d_model, predictors, used, options["router"]) + stopped

    @torch.no_grad()
    def update(self, stats: dict[str, Tensor], step: int) -> None:
        self.capacity.copy_(torch.tensor(self.capacities_at(step), dtype=torch.float64))


def top_tokens(logits: Tensor, candidates: Tensor, packing: Packing, capacity: Tensor) -> Tensor:
    """The top max(1, floor(capacity * T)) candidates of each sequence [N], T its length in the packing.

    Args:
        logits: scores [N].
        candidates: who may be chosen [N].
        capacity: share of the tokens of a sequence, a scalar in float64.
    """
    # The small term undoes the rounding of shares such as 2/3: floor(2/3 * 9) is 6.
    wanted = (capacity * packing.lengths + 1e-6).floor().long().clamp(min=1)
    scores = logits.detach().masked_fill(~candidates, -torch.inf)
    frame = packing.pad(scores, -torch.inf)
    order = frame.argsort(dim=1, descending=True, stable=True)
    ahead = torch.arange(packing.width, device=logits.device) < wanted[:, None]
    top = torch.zeros_like(frame, dtype=torch.bool).scatter(1, order, ahead)
    return packing.unpad(top) & candidates
