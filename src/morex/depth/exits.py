"""Exit rules at call time, `depth="exit:RULE[:THRESHOLD]"`: a token leaves where another recursion changes little.

After recursion r a token whose state went from h to h' leaves where

    latent     |h' - h| / |h'| is below 0.03
    cosine     1 - cos(h', h) is below 0.001
    kl         KL(p' || p) of its next-token distributions is below 0.0005
    entropy    |H(p') - H(p)| in nats is below 0.001
    argmax     the likeliest next token has stayed the same for 5 recursions

These are the zero-shot rules of Huginn (Geiping et al. 2025, arXiv 2502.05171, section 6.1) with the thresholds of its
published program. A distribution comes from a peek: the state goes through coda and head. In a peek a token sees itself
alone, so that it writes no key, reads none, and is the same whatever the batch and the cache hold. The distribution
before recursion 1 is not known: the last three rules let nobody leave there. Rules apply to every position alike.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from morex.depth.policy import DepthPolicy
from morex.depth.router import DepthRouter, Routing, Visit, put_rows
from morex.nn.packing import Packing

THRESHOLDS = {"kl": 5e-4, "entropy": 1e-3, "latent": 0.03, "argmax": 5.0, "cosine": 1e-3}


@dataclass
class Watching(Routing):
    """What an exit rule keeps of each token."""

    going: Tensor | None = None
    """Tokens that take the next recursion [N]; None for all."""
    seen: Tensor | None = None
    """Of the last peek: ln p [N, V] for `kl`, the entropy [N], or the likeliest token [N]."""
    stable: Tensor | None = None
    """Recursions for which the likeliest token has stayed the same [N]."""


class ExitRuleRouter(DepthRouter):
    """Base of the routers that take every token through all recursions, unless the caller asks for an exit rule."""

    exit_rules = tuple(THRESHOLDS)

    def takes_all(self, policy: DepthPolicy) -> bool:
        return policy.kind == "router" or super().takes_all(policy)

    def begin(self, h: Tensor, packing: Packing, policy: DepthPolicy) -> tuple[Tensor, Routing]:
        h, routing = super().begin(h, packing, policy)
        return h, Watching(packing, policy, routing.active) if policy.kind == "exit" else routing

    def decide(self, h: Tensor, routing: Routing, r: int) -> Tensor | None:
        if not isinstance(routing, Watching):
            return super().decide(h, routing, r)
        routing.scores.append(torch.full_like(routing.active, torch.nan, dtype=torch.float32))
        return routing.going

    def merge(self, h: Tensor, y: Tensor, routing: Routing, visit: Visit) -> Tensor:
        if isinstance(routing, Watching) and visit.recursion < routing.policy.recursions:
            asked, rule = routing.policy.threshold, routing.policy.rule
            assert rule is not None
            threshold = THRESHOLDS[rule] if asked is None else asked
            value = _change(visit.packing.gather(h), y, rule) if rule in ("latent", "cosine") else None
            if value is None:
                value = _change_of_peek(y, rule, routing, visit)
            stays = value < threshold if rule == "argmax" else value >= threshold
            routing.going = put_rows(torch.zeros_like(routing.active), visit.packing.index, stays)
            routing.scores[-1] = put_rows(routing.scores[-1], visit.packing.index, value)
        return super().merge(h, y, routing, visit)


def _change(before: Tensor, after: Tensor, rule: str) -> Tensor:
    """How far a recursion has moved the states [M, D] of its tokens [M]."""
    wide = torch.promote_types(after.dtype, torch.float32)
    before, after = before.to(wide), after.to(wide)
    if rule == "cosine":
        return 1 - F.cosine_similarity(after, before, dim=1)
    return (after - before).norm(dim=1) / after.norm(dim=1).clamp(min=torch.finfo(wide).tiny)


def _change_of_peek(y: Tensor, rule: str, routing: Watching, visit: Visit) -> Tensor:
    """How far a recursion has moved the next-token distributions of its tokens [M]; of `argmax`, for how long not."""
    assert routing.peek is not None
    logits, index = routing.peek(y, visit.packing), visit.packing.index
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    now = log_p
    if rule == "entropy":
        now = -(log_p.exp() * log_p).sum(1)
    elif rule == "argmax":
        now = log_p.argmax(1)
    value = log_p.new_full(y.shape[:1], 0.0 if rule == "argmax" else torch.inf)
    if routing.seen is not None:
        before = visit.packing.gather(routing.seen)
        if rule == "kl":
            value = (log_p.exp() * (log_p - before)).sum(1)
        elif rule == "entropy":
            value = (now - before).abs()
        else:
            assert routing.stable is not None
            value = (visit.packing.gather(routing.stable) + 1) * (now == before)
    if rule == "argmax":
        routing.stable = value if routing.stable is None else put_rows(routing.stable, index, value)
    routing.seen = now if routing.seen is None else put_rows(routing.seen, index, now)
    return value
