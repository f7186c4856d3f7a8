"""`recursive`: experts that are small recursive transformers (Mixture of Recursive Experts).

Expert e loops S times over its tokens, weights shared over the steps:

    z <- z + step_embedding[s];  z <- z + attention(norm(z));  z <- z + swiglu(norm(z))

and returns norm(z) (`output`) or z - x (`change`). Attention runs causally over the tokens of a sequence that visit
the same expert (`routed`), or over the token alone (`token`): softmax over one key is 1, so it is exactly W_o W_v.

A depth router may decide how many of the S steps a token takes in an expert: the step is what the router's recursion
runs, z its H. There is one for the layer; it judges each expert's tokens apart, and a step's attention is over the
tokens that take the step.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from morex.depth.fixed import FixedRouter
from morex.depth.policy import DepthPolicy
from morex.depth.router import DepthRouter, Routing
from morex.experts.attention import (
    Attend,
    ExpertRows,
    attend_alone,
    attend_alone_folded,
    attend_routed,
    cache_slots,
    fast_plan,
    outlives,
)
from morex.experts.dispatch import Dispatch, expert_rows, own_weights
from morex.experts.divided import ExpertLayer, unvisited
from morex.experts.moe import expert_gated
from morex.experts.router import ExpertRouter, expert_router_costs
from morex.nn import fast
from morex.nn.attention import AttentionShape, kept_heads
from morex.nn.costs import AttentionCosts, Costs, Kept, Rows, linear_costs
from morex.nn.mixers import ExpertViews, feed_forward_costs
from morex.nn.norm import rms_norm
from morex.nn.packing import Packing
from morex.nn.signals import Reports, Signals


class RecursiveExperts(ExpertLayer):
    """E recursive transformers, K of them for each token; weights stacked by expert."""

    def __init__(
        self,
        d_model: int,
        router: ExpertRouter,
        shape: AttentionShape,
        eps: float,
        depth: DepthRouter,
        steps: int,
        d_ff: int,
        attention_scope: str,
        branch: str,
        keep_unused_qk: bool,
    ) -> None:
        """Args:
        shape: of an expert's attention.
        eps: of its norms.
        depth: decides how many of the steps a token takes.
        steps: times S that it loops.
        d_ff: hidden width of its swiglu.
        attention_scope: `routed` or `token`, what its attention sees.
        branch: `change` (z - x) or `output` (norm(z)).
        keep_unused_qk: store the query and key weights that `token` never uses.
        """
        super().__init__()
        self.router, self.depth, self.shape, self.eps = router, depth, shape, eps
        self.steps, self.scope, self.branch = steps, attention_scope, branch
        experts, queries, keys = router.experts, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

        def stacked(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(experts, *size))

        self.step_embedding = stacked(steps, d_model)
        self.norm_attention, self.norm_mixer = stacked(d_model), stacked(d_model)
        if branch == "output":
            self.norm_out = stacked(d_model)
        if attention_scope == "routed" or keep_unused_qk:
            self.q, self.k = stacked(queries, d_model), stacked(keys, d_model)
        self.v, self.o = stacked(keys, d_model), stacked(d_model, queries)
        self.gate, self.up = stacked(d_ff, d_model), stacked(d_ff, d_model)
        self.down = stacked(d_model, d_ff)

    def forward(
        self, x: Tensor, packing: Packing, views: ExpertViews | None = None, traces: bool = False
    ) -> tuple[Tensor, Reports]:
        """x [N, D] -> [N, D] and what the routers report."""
        chosen, weights, signals = self.router(x, not outlives(views))
        y = self._alone(x, chosen, weights)
        if y is not None:
            return y, {"router": signals}
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return self._compiled(x, packing, chosen, weights), {"router": signals}
        sent = self.dispatch(chosen)
        rows = self.rows(sent, packing)
        if not isinstance(sent, Dispatch):
            own, stacks = sent.gather(x), self._used()
            y = self._loop(own, rows, None, stacks)[0] if own.shape[0] else unvisited(own, stacks)
            return sent.combine(y, weights), {"router": signals}
        if views is None and isinstance(self.depth, FixedRouter):
            stacks = self._used()
            plan = fast_plan(x, stacks, self.shape, self.eps, rows, together=False)
            if plan is not None:
                y = fast.recursive_experts(x, weights.to(x.dtype), stacks, plan, sent.token, sent.places)
                return y, {"router": signals}
        y, routing, about_steps = self._loop(sent.gather(x), rows, views, self._used())
        reports = {"router": signals}
        if not isinstance(self.depth, FixedRouter):
            reports["depth"] = about_steps
            taken = torch.stack(routing.masks).sum(0)[sent.places]
            signals.choices = [replace(choice, steps=taken) for choice in signals.choices]
        return sent.combine(y, weights), reports

    def _alone(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor | None:
        """The layer for few tokens x [N, D] that need nobody else, and no gradient; None where it is not so."""
        if self.scope != "token" or torch.is_grad_enabled() or not isinstance(self.depth, FixedRouter):
            return None
        if self.peers is not None:
            return None
        stacks = self._used()
        if fast.takes_tokens(x, stacks, self.router.top_k):
            return fast.few_tokens(x, chosen, weights, stacks, self.eps, self.shape.head_dim)
        if x.shape[0] > 1 or not fast.usable(x, self.gate):
            return None
        [experts], [shares] = chosen.tolist(), weights.tolist()
        return fast.single_token(x, experts, shares, stacks, self.eps, self.shape.head_dim)

    def _used(self) -> dict[str, Tensor]:
        """The stacked weights that are computed with."""
        unused = ("q", "k") if self.scope == "token" else ()
        return {name: weight for name, weight in self.stacks().items() if name not in unused}

    def _compiled(self, x: Tensor, packing: Packing, chosen: Tensor, weights: Tensor) -> Tensor:
        """The layer for few tokens x [N, D] -> [N, D] in a graph of tensors: nobody asks how many go to whom."""
        token = torch.arange(x.shape[0], device=x.device).repeat_interleave(self.router.top_k)
        rows = ExpertRows(packing, token, [1] * token.shape[0])
        w, x = own_weights(self._used(), chosen), x[token]
        z, attention = x, attend_alone(w, self.shape)
        for s in range(self.steps):
            z = self._step(z, s, w, rows, attention)
        y = self._branch(x, z, w, rows)
        return (y.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1)

    def _loop(
        self, x: Tensor, rows: ExpertRows, views: ExpertViews | None, w: dict[str, Tensor]
    ) -> tuple[Tensor, Routing, Signals]:
        """The experts on their own rows x [M, D] -> [M, D], and what the depth router did and reports."""
        attention = self._attention(w, x.shape, views)
        z, routing = self.depth.begin(x, rows.together.root(), DepthPolicy("router", self.steps))
        for s in range(self.steps):
            visit = self.depth.visit(z, routing, s + 1)
            if visit is not None:
                y = self._step(visit.packing.gather(z), s, w, rows.select(visit.packing.index), attention)
                z = self.depth.bring_back(z, y, routing, visit)
        z, signals = self.depth.finish(z, routing)
        return self._branch(x, z, w, rows), routing, signals

    def _branch(self, x: Tensor, z: Tensor, w: dict[str, Tensor], rows: ExpertRows) -> Tensor:
        """What the experts return, from their first states x and their last ones z [M, D]."""
        if self.branch == "output":
            return rms_norm(z, expert_rows(w["norm_out"], rows.counts), self.eps)
        return z - x

    def _step(self, z: Tensor, s: int, w: dict[str, Tensor], rows: ExpertRows, attention: Attend) -> Tensor:
        """Step s of the experts on their own rows z [M, D]."""
        counts = rows.counts
        z = z + expert_rows(w["step_embedding"][:, s], counts)
        z = z + attention(rms_norm(z, expert_rows(w["norm_attention"], counts), self.eps), rows, s)
        inner = rms_norm(z, expert_rows(w["norm_mixer"], counts), self.eps)
        return z + expert_gated("swiglu", inner, w["gate"], w["up"], w["down"], counts)

    def _attention(self, w: dict[str, Tensor], shape: torch.Size, views: ExpertViews | None) -> Attend:
        if self.scope == "routed":
            return attend_routed(w, self.shape, cache_slots(views, self.router.experts, self.steps))
        # One product W_o W_v pays once more rows pass through it than the matrices have channels.
        pays = shape[0] * self.steps > shape[1] * self.router.experts
        return (attend_alone_folded if pays else attend_alone)(w, self.shape)

    @staticmethod
    def costs(
        d_model: int,
        experts: int,
        top_k: int,
        shape: AttentionShape,
        steps: int,
        d_ff: int,
        attention_scope: str,
        branch: str,
        keep_unused_qk: bool,
        step_shares: tuple[float, ...],
        always: bool = True,
    ) -> Costs:
        """Closed-form costs without those of the depth router.

        Args:
            step_shares: share of an expert's tokens that takes each step.
            always: whether that is all of them, without a router that is asked.

        Folding W_o W_v is one matrix product an expert and a forward pass; spread over a batch's tokens it is left out.
        """
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        routed = attention_scope == "routed"
        projections = d_model * (queries + keys) * (2 if routed or keep_unused_qk else 1)
        vectors = d_model * (steps + 2 + (branch == "output"))
        parameters = experts * (projections + 3 * d_model * d_ff + vectors)
        mixing = 2 * d_model * (queries + keys) if routed else d_model * d_model
        visits = top_k * sum(step_shares)
        per_pair = 4.0 * queries * top_k * sum(share**2 for share in step_shares)

        def kept(rows: Rows) -> Kept:
            return kept_heads(shape, replace(rows, are_even=False)) * visits

        pairs = AttentionCosts(per_pair, top_k / experts, 2.0 * keys * visits, rereads=False, kept=kept)
        per_token = visits * 2.0 * (mixing + 3 * d_model * d_ff)
        alone = 0.0 if routed else visits * 2.0 * (d_model * (queries + keys) - mixing)
        # A step's norms with a row of weights for each token, its maps' inputs and its net; fast, no more than it must.
        maps, net = (3 if routed else 1) * 2.0 * d_model, feed_forward_costs("swiglu", d_model, d_ff)
        fast_step = 8.0 * d_model + 8 if always else 24.0 * d_model + 8
        step = Kept(32.0 * d_model + 8, 24.0 * d_model + 8 + maps, fast_step, 18.0 * d_model + 8) + net.kept
        once = Kept.alike(4.0 * d_model + 28)
        if branch == "output":
            once += Kept(12.0 * d_model + 4, 12.0 * d_model + 4, 4.0, 8.0 * d_model + 4)
        mapped = linear_costs(d_model, queries + keys + d_model if routed else d_model).cast_weights
        own = Costs(
            parameters,
            per_token,
            (pairs,) if routed else (),
            per_token_alone=alone,
            kept=step * visits + once * top_k,
            kept_weights=(net.cast_weights + mapped) * (experts * len(step_shares)),
        )
        return expert_router_costs(d_model, experts) + own
