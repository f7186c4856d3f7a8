"""`recursive`: experts that are small recursive transformers (Mixture of Recursive Experts).

Expert e loops S times over its tokens, weights shared over the steps:

    z <- z + step_embedding[s];  z <- z + attention(norm(z));  z <- z + swiglu(norm(z))

and returns norm(z) (`output`) or z - x (`change`). Attention runs causally over the tokens of a sequence that visit
the same expert (`routed`), or over the token alone (`token`): softmax over one key is 1, so it is exactly W_o W_v.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morex.experts.attention import attend_alone, attend_routed, cache_slots, for_query_heads
from morex.experts.dispatch import Dispatch, dispatch
from morex.experts.router import ExpertRouter, expert_router_costs
from morex.nn import fast
from morex.nn.attention import AttentionShape, has_fast_rows
from morex.nn.costs import AttentionCosts, Costs
from morex.nn.mixers import ExpertViews, swiglu
from morex.nn.norm import rms_norm
from morex.nn.packing import Packing
from morex.nn.signals import Signals


class RecursiveExperts(nn.Module):
    """E recursive transformers, K of them for each token; weights stacked by expert."""

    def __init__(
        self,
        d_model: int,
        router: ExpertRouter,
        shape: AttentionShape,
        eps: float,
        steps: int,
        d_ff: int,
        attention_scope: str,
        branch: str,
        keep_unused_qk: bool,
    ) -> None:
        """Args:
        shape: of an expert's attention.
        eps: of its norms.
        steps: times S that it loops.
        d_ff: hidden width of its swiglu.
        attention_scope: `routed` or `token`, what its attention sees.
        branch: `change` (z - x) or `output` (norm(z)).
        keep_unused_qk: store the query and key weights that `token` never uses.
        """
        super().__init__()
        self.router, self.shape, self.eps = router, shape, eps
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

    def forward(self, x: Tensor, packing: Packing, views: ExpertViews | None = None) -> tuple[Tensor, Signals]:
        """x [N, D] -> [N, D] and the router's report. Loops over the few experts, never over tokens or the batch."""
        chosen, weights, signals = self.router(x)
        sent = dispatch(chosen, self.router.experts)
        if views is None and self._has_fast_path(x, packing):
            return self._fast(x, weights, packing, sent), signals
        rows, tokens = sent.gather(x).split(sent.counts), sent.token.split(sent.counts)
        own = {name: stack.unbind(0) for name, stack in self.named_parameters(recurse=False)}
        outputs = []
        for e, (z, token) in enumerate(zip(rows, tokens, strict=True)):
            parts = {name: stack[e] for name, stack in own.items()}
            outputs.append(self._expert(e, z, parts, packing.select(token), views) if z.shape[0] else z)
        return sent.combine(torch.cat(outputs), weights), signals

    def _has_fast_path(self, x: Tensor, packing: Packing) -> bool:
        rows = self.scope == "token" or (self.shape.rope is not None and has_fast_rows(packing))
        return rows and x.shape[0] > 0 and fast.usable(x, *self.parameters(recurse=False))

    def _fast(self, x: Tensor, weights: Tensor, packing: Packing, sent: Dispatch) -> Tensor:
        frames: list[fast.Frames | None] | None = None
        stacks: dict[str, Tensor] = dict(self.named_parameters(recurse=False))
        if self.scope == "routed":
            tokens = sent.token.split(sent.counts)
            frames = [
                self.shape.frames(packing.select(own), self.shape.rope, x.dtype) if own.numel() else None
                for own in tokens
            ]
        else:
            stacks.pop("q", None), stacks.pop("k", None)
        keeps = torch.is_grad_enabled()
        shape, names = self.shape, tuple(stacks)
        plan = fast.Plan(
            sent.token, sent.places, sent.counts, self.eps, shape.head_dim, shape.scale, frames, names, keeps
        )
        return fast.recursive_experts(x, weights.to(x.dtype), stacks, plan)

    def _expert(self, e: int, x: Tensor, w: dict[str, Tensor], packing: Packing, views: ExpertViews | None) -> Tensor:
        """One expert on its own tokens x [M, D]."""
        eps, z = self.eps, x
        # One product W_o W_v pays once more rows pass through it than the matrices have channels.
        token_only = self.scope == "token"
        folded = self._folded(w) if token_only and x.shape[0] * self.steps > x.shape[1] else None
        one, counts = {name: w[name].unsqueeze(0) for name in "qkvo" if name in w}, [x.shape[0]]
        if token_only:
            attention = attend_alone(one, self.shape, counts)
        else:
            slots = cache_slots(views, self.router.experts, self.steps)
            attention = attend_routed(one, self.shape, packing, counts, None if slots is None else slots[e])
        for s in range(self.steps):
            z = z + w["step_embedding"][s]
            inner = rms_norm(z, w["norm_attention"], eps)
            z = z + (attention(inner, s) if folded is None else F.linear(inner, folded))
            z = z + swiglu(rms_norm(z, w["norm_mixer"], eps), w["gate"], w["up"], w["down"])
        return rms_norm(z, w["norm_out"], eps) if self.branch == "output" else z - x

    def _folded(self, w: dict[str, Tensor]) -> Tensor:
        """W_o W_v [D, D]: query heads of one group read the same value head."""
        return w["o"] @ for_query_heads(w["v"], 0, self.shape)

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
    ) -> Costs:
        """Closed-form costs.

        Folding W_o W_v is one matrix product an expert and a forward pass; spread over a batch's tokens it is left out.
        """
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        routed = attention_scope == "routed"
        projections = d_model * (queries + keys) * (2 if routed or keep_unused_qk else 1)
        vectors = d_model * (steps + 2 + (branch == "output"))
        parameters = experts * (projections + 3 * d_model * d_ff + vectors)
        mixing = 2 * d_model * (queries + keys) if routed else d_model * d_model
        visits = top_k * steps
        pairs = AttentionCosts(4.0 * queries * visits, top_k / experts, 2.0 * keys * visits, rereads=False)
        per_token = visits * 2.0 * (mixing + 3 * d_model * d_ff)
        alone = 0.0 if routed else visits * 2.0 * (d_model * (queries + keys) - mixing)
        own = Costs(parameters, per_token, (pairs,) if routed else (), per_token_alone=alone)
        return expert_router_costs(d_model, experts) + own
