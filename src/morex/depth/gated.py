"""What routers with one gated decision per recursion share: capacities and the gated update.

For active tokens H <- H + g * core(H), core's own residual included, or H <- H + g * (core(H) - H) with gate `delta`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from morex.depth.router import DepthRouter, Routing, ScoreNet, Visit, add_rows, score_costs
from morex.nn import ranks
from morex.nn.costs import Costs, Kept


class GatedRouter(DepthRouter):
    """Base of the routers that let a token go on or not at each recursion."""

    def __init__(self, d_model: int, recursions: int, capacities: tuple[float, ...], alpha: float, gate: str) -> None:
        super().__init__(d_model, recursions)
        self.capacities, self.alpha, self.gate = capacities, alpha, gate

    @staticmethod
    def shares(recursions: int, **options: Any) -> tuple[float, ...]:
        return tuple(options["capacities"])

    def gates(self, h: Tensor, routing: Routing, r: int) -> Tensor | float:
        """g of every token at recursion r [N], or one for all."""
        raise NotImplementedError

    def packed(self, h: Tensor, routing: Routing, r: int) -> Visit | None:
        visit = super().packed(h, routing, r)
        if visit is not None:
            gates = self.gates(h, routing, r)
            visit.gate = visit.packing.gather(gates) if isinstance(gates, Tensor) else gates
        return visit

    def merge(self, h: Tensor, y: Tensor, routing: Routing, visit: Visit) -> Tensor:
        assert visit.gate is not None
        if self.gate == "delta":
            y = y - visit.packing.gather(h)
        update = y * (visit.gate.unsqueeze(1) if isinstance(visit.gate, Tensor) else visit.gate)
        if visit.packing.index is None:
            return h + update
        return add_rows(h, visit.packing.index, update)


class LearnedGateRouter(GatedRouter):
    """Base of the routers that score tokens; each recursion that needs scores has a net of its own."""

    scores_are = "logits"

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
    ) -> None:
        super().__init__(d_model, recursions, capacities, alpha, gate)
        self.activation = score
        self.score = nn.ModuleDict({str(r): ScoreNet(d_model, 1, router) for r in scored(capacities, score)})
        if z_weight:
            self.loss_weights["router_z"] = z_weight

    def decide(self, h: Tensor, routing: Routing, r: int) -> Tensor | None:
        name = str(r - 1)
        logits = self.score[name](h).squeeze(1) if name in self.score else h.new_zeros(h.shape[0])
        candidates = self.candidates(routing)
        routing.gates = logits
        routing.scores.append(logits.detach().masked_fill(~candidates, torch.nan))
        if self.loss_weights.get("router_z") and self.training:
            chosen = candidates.to(logits.dtype)
            routing.add_loss("router_z", ranks.mean((logits.square() * chosen).sum(), chosen.sum()))
        if routing.depths is not None:
            return routing.depths >= r
        if routing.policy.is_forced:
            return None
        return self.choose(logits, candidates, h, routing, r)

    def candidates(self, routing: Routing) -> Tensor:
        """Tokens that may take the recursion in hand [N]."""
        return routing.active

    def choose(self, logits: Tensor, candidates: Tensor, h: Tensor, routing: Routing, r: int) -> Tensor | None:
        """Active tokens of recursion r [N] by the router's own rule, or None for all."""
        raise NotImplementedError

    def gates(self, h: Tensor, routing: Routing, r: int) -> Tensor:
        assert routing.gates is not None
        logits = routing.gates
        if self.activation == "unweighted":
            return torch.ones_like(logits)
        return self.alpha * (torch.tanh(logits) if self.activation == "tanh" else torch.sigmoid(logits))

    @staticmethod
    def costs(d_model: int, recursions: int, taken: int | None = None, **options: Any) -> Costs:
        nets = scored(options["capacities"], options["score"])
        used = len(nets) if taken is None else sum(r < taken for r in nets)
        # The states that are scored, at recursion 1 those of the first norm; what the core makes of those that go on.
        states = sum(r > 0 for r in nets) * (5 if options["router"] == "mlp" else 1)
        weighted = sum(options["shares"]) if options["score"] != "unweighted" else 0.0
        kept = Costs(kept=Kept.alike(4.0 * d_model * (states + weighted)))
        return nets_costs(d_model, len(nets), used, options["router"]) + kept


def scored(capacities: tuple[float, ...], score: str) -> list[int]:
    """Recursions, from 0, that need scores: without a gate only those that leave tokens out."""
    return [r for r, capacity in enumerate(capacities) if score != "unweighted" or capacity < 1]


def nets_costs(d_model: int, nets: int, used: int, kind: str) -> Costs:
    """Closed-form costs of score nets with one output each, some of which are used."""
    one = score_costs(d_model, 1, kind)
    return Costs(nets * one.parameters, used * one.per_token)
