"""`huginn`: every expert is a recurrent block with weights of its own (Mixture of Recurrent Experts, option A).

An expert's attention runs causally over the tokens of a sequence that visit it (`routed`), or over the token alone
(`token`). The branch is the weighted sum of the experts' last states.
"""

from typing import Any

import torch
from torch import Tensor, nn

from morex.experts.attention import Attend, attend_alone, attend_routed, cache_slots
from morex.experts.dispatch import Dispatch, dispatch
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
        self.steps, self.scope, self.state_std = steps, attention_scope, state_std
        for name, weight in recurrent_parameters(router.experts, d_model, shape, d_ff, attention_scope).items():
            self.register_parameter(name, weight)

    def forward(self, x: Tensor, packing: Packing, views: ExpertViews | None = None) -> tuple[Tensor, Signals]:
        """x [N, D] -> [N, D] and the router's report."""
        chosen, weights, signals = self.router(x)
        sent = dispatch(chosen, self.router.experts)
        states = initial_state(x, self.state_std, self.training)[sent.token]
        own: dict[str, Tensor] = dict(self.named_parameters(recurse=False))
        attention = self._attention(own, packing, sent, views)
        y = recur(states, sent.gather(x), own, self.steps, attention, self.eps, sent.counts)
        return sent.combine(y, weights), signals

    def _attention(self, w: dict[str, Tensor], packing: Packing, sent: Dispatch, views: ExpertViews | None) -> Attend:
        if self.scope == "token":
            return attend_alone(w, self.shape, sent.counts)
        slots = cache_slots(views, self.router.experts, self.steps)
        if slots is None:
            return attend_routed(w, self.shape, packing.group(sent.token, sent.counts), sent.counts)
        apart = []
        for e, token in enumerate(sent.token.split(sent.counts)):
            one = {name: w[name][e : e + 1] for name in "qkvo"}
            apart.append(attend_routed(one, self.shape, packing.select(token), [token.shape[0]], slots[e]))

        def attention(x: Tensor, step: int) -> Tensor:
            rows = x.split(sent.counts)
            return torch.cat([run(own, step) for run, own in zip(apart, rows, strict=True) if own.shape[0]])

        return attention

    @staticmethod
    def costs(
        d_model: int,
        experts: int,
        top_k: int,
        shape: AttentionShape,
        steps: int,
        d_ff: int,
        attention_scope: str,
        **options: Any,
    ) -> Costs:
        """Closed-form costs; `options` are those of the constructor that cost nothing."""
        own = recurrent_costs(d_model, shape, d_ff, attention_scope, steps, experts, top_k)
        return expert_router_costs(d_model, experts) + own
