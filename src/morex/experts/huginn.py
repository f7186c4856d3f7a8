"""`huginn`: every expert is a recurrent block with weights of its own (Mixture of Recurrent Experts, option A).

An expert's attention runs causally over the tokens of a sequence that visit it (`routed`), or over the token alone
(`token`). The branch is the weighted sum of the experts' last states.
"""

from functools import partial

import torch
from torch import Tensor, nn

from morex.experts.dispatch import dispatch, unstacked
from morex.experts.recurrent import initial_state, recur, recurrent_costs, recurrent_parameters
from morex.experts.router import ExpertRouter, expert_router_costs
from morex.nn.attention import AttentionShape
from morex.nn.costs import Costs
from morex.nn.mixers import ExpertViews
from morex.nn.packing import Packing
from morex.nn.signals import Signals


class HuginnExperts(nn.Module):
    """E recurrent blocks, K of them for each token; weights stacked by expert."""

    def __init__(
        self,
        d_model: int,
        router: ExpertRouter,
        shape: AttentionShape,
        eps: float,
        steps: int,
        d_ff: int,
        attention_scope: str,
        state_std: float,
    ) -> None:
        """Args:
        shape: of an expert's attention.
        eps: of its norms.
        steps: times S that it recurs.
        d_ff: hidden width of its swiglu.
        attention_scope: `routed` or `token`, what its attention sees.
        state_std: standard deviation of the first state in training.
        """
        super().__init__()
        self.router, self.shape, self.eps = router, shape, eps
        self.steps, self.state_std = steps, state_std
        for name, weight in recurrent_parameters(d_model, shape, d_ff, attention_scope, (router.experts,)).items():
            self.register_parameter(name, weight)

    def forward(self, x: Tensor, packing: Packing, views: ExpertViews | None = None) -> tuple[Tensor, Signals]:
        """x [N, D] -> [N, D] and the router's report. Loops over the few experts, never over tokens or the batch."""
        chosen, weights, signals = self.router(x)
        sent = dispatch(chosen, self.router.experts)
        states = initial_state(x, self.state_std, self.training)[sent.token].split(sent.counts)
        inputs, tokens = sent.gather(x).split(sent.counts), sent.token.split(sent.counts)
        outputs = []
        for e, w in enumerate(unstacked(self)):
            if not tokens[e].shape[0]:
                continue
            visitors = packing.select(tokens[e])
            view = None if views is None else partial(views.expert, e)
            outputs.append(recur(states[e], inputs[e], w, self.steps, self.shape, self.eps, visitors, view))
        return sent.combine(torch.cat(outputs), weights), signals

    @staticmethod
    def costs(
        d_model: int,
        experts: int,
        top_k: int,
        shape: AttentionShape,
        steps: int,
        d_ff: int,
        attention_scope: str,
        state_std: float,
    ) -> Costs:
        """Closed-form costs."""
        own = recurrent_costs(d_model, shape, d_ff, attention_scope, steps, experts, top_k)
        return expert_router_costs(d_model, experts) + own
