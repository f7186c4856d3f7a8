"""`shared_recurrent`: light experts first, then one recurrent block for all (Mixture of Recurrent Experts, option B).

The input of the block is the weighted sum of what the token's experts return; the branch is its last state. Its
attention is causal over all tokens, and has the place of the first expert in a cache.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from morex.experts.attention import ExpertRows
from morex.experts.moe import MoE
from morex.experts.recurrent import initial_state, recur, recurrent_costs, recurrent_parameters
from morex.experts.router import ExpertRouter
from morex.nn.attention import AttentionShape
from morex.nn.costs import Costs
from morex.nn.mixers import ExpertViews
from morex.nn.moves import Watch
from morex.nn.packing import Packing
from morex.nn.signals import Reports


class SharedRecurrentExperts(MoE):
    """E two-matrix gelu nets, K of them for each token, before one recurrent block that every token passes."""

    def __init__(
        self,
        d_model: int,
        router: ExpertRouter,
        shape: AttentionShape,
        eps: float,
        expert: str,
        expert_d_ff: int,
        steps: int,
        d_ff: int,
        state_std: float,
    ) -> None:
        """Args:
        shape: of the shared block's attention, over all tokens.
        eps: of its norms.
        expert: kind of the light nets.
        expert_d_ff: their hidden width.
        steps: times S that the block recurs.
        d_ff: hidden width of the block's swiglu.
        state_std: standard deviation of the first state in training.
        """
        super().__init__(d_model, router, shape, eps, expert, expert_d_ff)
        self.shape, self.eps, self.steps, self.state_std = shape, eps, steps, state_std
        self.shared = nn.ParameterDict(recurrent_parameters(1, d_model, shape, d_ff, "routed"))

    def forward(
        self, x: Tensor, packing: Packing, views: ExpertViews | None = None, traces: bool = False
    ) -> tuple[Tensor, Reports]:
        """x [N, D] -> [N, D] and the router's report."""
        mixed, reports = super().forward(x, packing)
        state, shared = initial_state(mixed, packing, self.state_std, self.training), dict(self.shared.items())
        everyone = ExpertRows(packing, torch.arange(x.shape[0], device=x.device), [x.shape[0]])
        watch = Watch(state) if traces else None
        y = recur(state, mixed, shared, self.steps, self.shape, self.eps, everyone, views, watch)
        if watch is not None:
            signals = reports["router"]
            signals.choices = [replace(choice, moves=watch.moves) for choice in signals.choices]
        return y, reports

    @staticmethod
    def costs(  # type: ignore[override]
        d_model: int,
        experts: int,
        top_k: int,
        shape: AttentionShape,
        expert: str,
        expert_d_ff: int,
        steps: int,
        d_ff: int,
        **options: Any,
    ) -> Costs:
        """Closed-form costs; `options` are those of the constructor that cost nothing."""
        light = MoE.costs(d_model, experts, top_k, shape, expert, expert_d_ff)
        return light + recurrent_costs(d_model, shape, d_ff, "routed", steps)
