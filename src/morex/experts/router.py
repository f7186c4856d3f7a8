"""The expert router: linear, softmax, top-k; weights renormalised for K > 1 (Shazeer et al. 2017, section 2)."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morex.nn import ranks
from morex.nn.costs import Costs, Kept, linear_costs
from morex.nn.signals import Choice, Signals


class ExpertRouter(nn.Module):
    """Chooses K of E experts for each token. For K = 1 the probability is the weight, so the router keeps its gradient.

    The loss-free bias (Wang et al. 2024) counts in the choice only and moves after each optimizer step.
    """

    bias: Tensor
    warmth: Tensor
    """Share of the balance loss that counts, [1], where there is a warm-up."""

    def __init__(
        self,
        d_model: int,
        experts: int,
        top_k: int,
        balance_weight: float,
        z_weight: float,
        bias_rate: float,
        balance_warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, d_model))
        self.experts, self.top_k, self.bias_rate = experts, top_k, bias_rate
        weights = {"expert_balance": balance_weight, "expert_z": z_weight}
        self.loss_weights = {name: weight for name, weight in weights.items() if weight}
        self.register_buffer("bias", torch.zeros(experts))
        self.balance_warmup_steps = balance_warmup_steps
        self.warming = ("expert_balance",) if balance_warmup_steps else ()
        if balance_warmup_steps:
            self.register_buffer("warmth", torch.zeros(1))

    def forward(self, x: Tensor, with_stats: bool = True) -> tuple[Tensor, Tensor, Signals]:
        """x [N, D] -> chosen experts [N, K], their weights [N, K], and the report, `with_stats` statistics in it."""
        return self.route(self.logits(x), with_stats)

    def logits(self, x: Tensor) -> Tensor:
        """x [N, D] -> [N, E], never in half precision."""
        if x.dtype == self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight)

    def route(self, logits: Tensor, with_stats: bool = True) -> tuple[Tensor, Tensor, Signals]:
        """Logits [N, E] -> chosen experts [N, K], their weights [N, K], and the report."""
        if with_stats or self.training:
            # torch's softmax is slow over a few columns of many rows, and the report needs the logarithms anyway.
            log_total = logits.logsumexp(-1)
            log_probabilities = logits - log_total.unsqueeze(-1)
            probabilities = log_probabilities.exp()
            chosen = self.choose(probabilities.detach())
            signals = self._report(log_total, log_probabilities, probabilities, chosen)
        else:
            probabilities = logits.softmax(-1)
            chosen, signals = self.choose(probabilities.detach()), Signals()
        weights = probabilities.gather(1, chosen)
        if self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        signals.choices.append(Choice(chosen, logits.detach()))
        return chosen, weights, signals

    def choose(self, probabilities: Tensor) -> Tensor:
        """Experts [N, K] of tokens with these probabilities [N, E]."""
        return (probabilities + self.bias).topk(self.top_k, dim=-1).indices

    def _report(self, log_total: Tensor, log_probabilities: Tensor, probabilities: Tensor, chosen: Tensor) -> Signals:
        load = torch.bincount(chosen.flatten(), minlength=self.experts)
        squares = log_total.square()
        signals = Signals(
            stats={
                "load": load,
                "importance": probabilities.detach().sum(0),
                "z": squares.detach().sum(),
                "entropy": -(probabilities.detach() * log_probabilities.detach()).sum(),
                "tokens": torch.tensor(chosen.shape[0], device=chosen.device),
            },
        )
        if self.training:
            everyone = ranks.summed(load).to(probabilities.dtype)
            share, tokens = everyone / everyone.sum().clamp(min=1), chosen.shape[0]
            signals.losses["expert_balance"] = self.experts * (share * ranks.mean(probabilities.sum(0), tokens)).sum()
            signals.losses["expert_z"] = ranks.mean(squares.sum(), tokens)
        return signals

    @torch.no_grad()
    def update(self, stats: dict[str, Tensor], step: int) -> None:
        """Moves the loss-free bias against the load, and the warm-up, after optimizer step `step`."""
        if self.balance_warmup_steps:
            self.warmth.fill_(min(1.0, step / self.balance_warmup_steps))
        if self.bias_rate:
            share = stats["load"].to(self.bias.dtype) / stats["load"].sum().clamp(min=1)
            self.bias += self.bias_rate * (share.mean() - share).sign()


def expert_router_costs(d_model: int, experts: int) -> Costs:
    """Closed-form costs of `ExpertRouter`; its input counts as kept where others take a cast of it."""
    scores = 4.0 * (3 * experts + 1) + 12.0
    kept = Kept.alike(scores, scores + 4.0 * d_model)
    return replace(linear_costs(d_model, experts), kept=kept, cast_weights=Kept())
