"""`token_choice` (Mixture of Recursions, arXiv 2507.10524, eq. 2.2): each token chooses its depth once.

Before recursion 1 a token scores R depths and takes the best, i; it passes recursions 1..i with ungated intermediate
states, then H <- H1 + g_i * core^i(H1). With gate `each` every recursion is gated, the paper's equation. Depths are
kept in use by the loss R * sum f_i P_i or, loss-free, by a bias on the choice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from morex.depth.policy import DepthPolicy
from morex.depth.router import DepthRouter, Routing, ScoreNet, Visit, replace_rows, score_costs
from morex.nn import ranks
from morex.nn.costs import Costs, Kept
from morex.nn.packing import Packing
from morex.nn.signals import Signals

DEFAULT_ALPHA = {"softmax": 1.0, "sigmoid": 0.1}


class TokenChoiceRouter(DepthRouter):
    """One decision per token, each depth computed once for the tokens still active."""

    scores_are = "depths"
    bias: Tensor

    def __init__(
        self,
        d_model: int,
        recursions: int,
        score: str,
        alpha: float | None,
        temperature: float,
        gate: str,
        balance: str,
        balance_weight: float,
        bias_rate: float,
        router: str,
        z_weight: float,
        balance_warmup_steps: int = 0,
    ) -> None:
        super().__init__(d_model, recursions)
        self.activation, self.temperature, self.gate = score, temperature, gate
        self.alpha = alpha if alpha is not None else DEFAULT_ALPHA[score]
        self.bias_rate = bias_rate if balance == "loss_free" else 0.0
        self.score = ScoreNet(d_model, recursions, router)
        if balance == "loss":
            self.loss_weights["depth_balance"] = balance_weight
        self.balance_warmup_steps = balance_warmup_steps
        if balance_warmup_steps:
            self.warming = ("depth_balance",)
            self.register_buffer("warmth", torch.zeros(1))
        if z_weight:
            self.loss_weights["router_z"] = z_weight
        self.register_buffer("bias", torch.zeros(recursions))

    def begin(self, h: Tensor, packing: Packing, policy: DepthPolicy) -> tuple[Tensor, Routing]:
        h, routing = super().begin(h, packing, policy)
        logits = self.score(h) / self.temperature
        scores = logits.softmax(-1) if self.activation == "softmax" else logits.sigmoid()
        routing.scores = list(scores.detach().unbind(1))
        choice = (scores.detach() + self.bias).argmax(-1)
        if routing.depths is None:
            routing.depths = torch.full_like(choice, policy.recursions) if policy.is_forced else choice + 1
        routing.start, routing.gates = h, self.alpha * scores
        if self.training:
            self._balance(logits, scores, choice, routing)
        return h, routing

    def packed(self, h: Tensor, routing: Routing, r: int) -> Visit | None:
        visit = super().packed(h, routing, r)
        if visit is not None and self.gate == "each":
            assert routing.gates is not None
            visit.gate = visit.packing.gather(routing.gates[:, r - 1])
        return visit

    def decide(self, h: Tensor, routing: Routing, r: int) -> Tensor | None:
        assert routing.depths is not None
        return None if r == 1 else routing.depths >= r

    def merge(self, h: Tensor, y: Tensor, routing: Routing, visit: Visit) -> Tensor:
        if isinstance(visit.gate, Tensor):
            y = visit.gate.unsqueeze(1) * y
        return y if visit.packing.index is None else replace_rows(h, visit.packing.index, y)

    def finish(self, h: Tensor, routing: Routing) -> tuple[Tensor, Signals]:
        assert routing.start is not None and routing.gates is not None and routing.depths is not None
        if self.gate == "each":
            out = routing.start + h
        else:
            out = routing.start + routing.gates.gather(1, routing.depths[:, None] - 1) * h
        return super().finish(out, routing)

    def _balance(self, logits: Tensor, scores: Tensor, choice: Tensor, routing: Routing) -> None:
        counts = torch.bincount(choice, minlength=self.recursions)
        # Sigmoid scores of a token do not sum to 1 by themselves; their logarithms are finite where all of them vanish.
        probabilities = scores if self.activation == "softmax" else F.logsigmoid(logits).softmax(-1)
        routing.stats["chosen"] = counts
        routing.stats["entropy"] = torch.special.entr(probabilities.detach()).sum()
        if "depth_balance" in self.loss_weights:
            everyone = ranks.summed(counts).to(scores.dtype)
            share = everyone / everyone.sum().clamp(min=1)
            mean = ranks.mean(probabilities.sum(0), choice.shape[0])
            routing.add_loss("depth_balance", self.recursions * (share * mean).sum())
        if "router_z" in self.loss_weights:
            routing.add_loss("router_z", ranks.mean(logits.logsumexp(-1).square().sum(), choice.shape[0]))

    @staticmethod
    def shares(recursions: int, **options: Any) -> tuple[float, ...]:
        """At balance: depths 1..R are equally frequent."""
        return tuple((recursions - r) / recursions for r in range(recursions))

    @staticmethod
    def costs(d_model: int, recursions: int, taken: int | None = None, **options: Any) -> Costs:
        # The last state and its gate; what the core makes, where it is weighted or put into the rows of some tokens.
        made = sum(share for share in options["shares"] if share < 1 or options["gate"] == "each")
        weighted = made + (options["gate"] != "each")
        kept = 4.0 * d_model * (weighted + (4 if options["router"] == "mlp" else 0))
        return score_costs(d_model, recursions, options["router"]) + Costs(kept=Kept.alike(kept))

    @torch.no_grad()
    def update(self, stats: dict[str, Tensor], step: int) -> None:
        if self.balance_warmup_steps:
            self.warmth.fill_(min(1.0, step / self.balance_warmup_steps))
        if self.bias_rate and "chosen" in stats:
            share = stats["chosen"].to(self.bias.dtype) / stats["chosen"].sum().clamp(min=1)
            self.bias += self.bias_rate * (share.mean() - share).sign()
