"""`moe`: feed-forward experts."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from morex.experts.attention import outlives
from morex.experts.dispatch import expert_linear, is_apart
from morex.experts.divided import ExpertLayer, unvisited
from morex.experts.router import ExpertRouter, expert_router_costs
from morex.nn import fast
from morex.nn.attention import AttentionShape
from morex.nn.costs import Costs, Kept
from morex.nn.mixers import ACTIVATIONS, GATED, OF_GATE, ExpertViews, feed_forward_costs
from morex.nn.packing import Packing
from morex.nn.signals import Reports


def expert_gated(kind: str, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    """Each expert's net of three matrices on its own rows x [N, D], expert by expert; weights stacked [E, out, in]."""
    if kind == "swiglu" and len(counts) > 1 and fast.usable(x, gate, up, down):
        return fast.feed_forward_experts(x, counts, kind, up, down, gate)
    if torch.compiler.is_compiling() and is_apart(x, counts):
        return expert_linear(OF_GATE[kind](expert_linear(x, gate, counts)) * expert_linear(x, up, counts), down, counts)
    parts = zip(x.split(counts), gate.unbind(0), up.unbind(0), down.unbind(0), strict=True)
    return torch.cat([GATED[kind](rows, g, u, d) for rows, g, u, d in parts])


class MoE(ExpertLayer):
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
        self, x: Tensor, packing: Packing, views: ExpertViews | None = None, traces: bool = False
    ) -> tuple[Tensor, Reports]:
        """x [N, D] -> [N, D] and the router's report."""
        chosen, weights, signals = self.router(x, not outlives(views))
        return self.mix(x, chosen, weights), {"router": signals}

    def mix(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sum of what the chosen experts [N, K] make of x [N, D], with these weights [N, K]."""
        sent = self.dispatch(chosen)
        rows, counts, w = sent.gather(x), sent.counts, self.stacks()
        if not rows.shape[0]:
            y = unvisited(rows, w)
        elif self.kind in GATED:
            y = expert_gated(self.kind, rows, w["gate"], w["up"], w["down"], counts)
        elif fast.usable(rows, w["up"], w["down"]):
            y = fast.feed_forward_experts(rows, counts, self.kind, w["up"], w["down"], None)
        else:
            y = expert_linear(ACTIVATIONS[self.kind](expert_linear(rows, w["up"], counts)), w["down"], counts)
        return sent.combine(y, weights)

    @staticmethod
    def costs(d_model: int, experts: int, top_k: int, shape: AttentionShape, expert: str, d_ff: int) -> Costs:
        """Closed-form costs."""
        one = feed_forward_costs(expert, d_model, d_ff)
        own = Costs(
            experts * one.parameters,
            top_k * one.per_token,
            kept=kept_rows(expert, d_model, d_ff) * top_k,
            kept_weights=one.cast_weights * experts,  # slices of stacks, which autocast casts at every visit
        )
        return expert_router_costs(d_model, experts) + own


def kept_rows(expert: str, d_model: int, d_ff: int) -> Kept:
    """What a token keeps in one feed-forward expert: its row, what the net keeps, and what the expert returns."""
    kept = feed_forward_costs(expert, d_model, d_ff).kept
    if expert in ("gelu", "relu"):
        kept = replace(kept, fast_fp32=4.0 * d_ff)
    return kept + Kept(8.0 * d_model, 2.0 * d_model, 8.0 * d_model, 2.0 * d_model) + Kept.alike(28.0)
