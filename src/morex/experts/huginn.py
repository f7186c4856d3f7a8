"""`huginn`: every expert is a recurrent block with weights of its own (Mixture of Recurrent Experts, option A).

An expert's attention runs causally over the tokens of a sequence that visit it (`routed`), or over the token alone
(`token`). The branch is the weighted sum of the experts' last states.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from morex.experts.attention import outlives
from morex.experts.dispatch import Dispatch
from morex.experts.divided import ExpertLayer, unvisited
from morex.experts.recurrent import initial_state, recur, recurrent_costs, recurrent_parameters
from morex.experts.router import ExpertRouter, expert_router_costs
from morex.nn.attention import AttentionShape
from morex.nn.costs import Costs
from morex.nn.mixers import ExpertViews
from morex.nn.moves import Watch
from morex.nn.packing import Packing
from morex.nn.signals import Reports


class HuginnExperts(ExpertLayer):
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

    def forward(
        self, x: Tensor, packing: Packing, views: ExpertViews | None = None, traces: bool = False
    ) -> tuple[Tensor, Reports]:
        """x [N, D] -> [N, D] and the router's report."""
        chosen, weights, signals = self.router(x, not outlives(views))
        sent = self.dispatch(chosen)
        own = sent if isinstance(sent, Dispatch) else sent.own
        states = sent.send(initial_state(x, packing, self.state_std, self.training).index_select(0, own.token))
        inputs, rows = sent.gather(x), self.rows(sent, packing)
        # The states of a token in its K experts count as one vector.
        watch = Watch(states, lambda s: s[own.places].flatten(1)) if traces else None
        stacks = self.stacks()
        if inputs.shape[0]:
            y = recur(states, inputs, stacks, self.steps, self.shape, self.eps, rows, views, watch)
        else:
            y = unvisited(inputs, stacks)
        if watch is not None:
            signals.choices = [replace(choice, moves=watch.moves) for choice in signals.choices]
        return sent.combine(y, weights), {"router": signals}

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
