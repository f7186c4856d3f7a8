"""`moe`: feed-forward experts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morex.experts.dispatch import dispatch
from morex.experts.router import ExpertRouter, expert_router_costs
from morex.nn import fast
from morex.nn.attention import AttentionShape
from morex.nn.costs import Costs
from morex.nn.mixers import ACTIVATIONS, GATED, ExpertViews, feed_forward_costs
from morex.nn.packing import Packing
from morex.nn.signals import Signals


class MoE(nn.Module):
    """E feed-forward nets, K of them for each token; weights stacked by expert [E, out, in]."""

    def __init__(
        self, d_model: int, router: ExpertRouter, shape: AttentionShape, eps: float, expert: str, d_ff: int
    ) -> None:
        """Args:
        expert: `swiglu`, `geglu`, `gelu` or `relu`, kind of the feed-forward nets.
        d_ff: their hidden width.
        """
        super().__init__()
        kind = expert
        self.router, self.kind = router, kind
        if kind in GATED:
            self.gate = nn.Parameter(torch.empty(router.experts, d_ff, d_model))
        self.up = nn.Parameter(torch.empty(router.experts, d_ff, d_model))
        self.down = nn.Parameter(torch.empty(router.experts, d_model, d_ff))

    def forward(
        self, x: Tensor, packing: Packing | None = None, views: ExpertViews | None = None
    ) -> tuple[Tensor, Signals]:
        """x [N, D] -> [N, D] and the router's report."""
        chosen, weights, signals = self.router(x)
        sent = dispatch(chosen, self.router.experts)
        rows, gate = sent.gather(x), self.gate if self.kind in GATED else None
        if self.kind != "geglu" and fast.usable(rows, *self.parameters(recurse=False)):
            y = fast.feed_forward_experts(rows, sent.counts, self.kind, self.up, self.down, gate)
        else:
            y = self._each(rows, sent.counts)
        return sent.combine(y, weights), signals

    def _each(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Every expert on its own rows [N * K, D] -> [N * K, D]; loops over the few experts, never over tokens."""
        gate = self.gate.unbind(0) if self.kind in GATED else self.up.unbind(0)
        outputs = []
        for z, g, u, d in zip(rows.split(counts), gate, self.up.unbind(0), self.down.unbind(0), strict=True):
            if self.kind in GATED:
                outputs.append(GATED[self.kind](z, g, u, d))
            else:
                outputs.append(F.linear(ACTIVATIONS[self.kind](F.linear(z, u)), d))
        return torch.cat(outputs)

    @staticmethod
    def costs(d_model: int, experts: int, top_k: int, shape: AttentionShape, expert: str, d_ff: int) -> Costs:
        """Closed-form costs."""
        one = feed_forward_costs(expert, d_model, d_ff)
        return expert_router_costs(d_model, experts) + Costs(experts * one.parameters, top_k * one.per_token)
