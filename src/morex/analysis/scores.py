"""What the scores of a depth router say: how undecided it was, and with which weight its recursions enter.

One function a kind of score (`DepthRouter.scores_are`). Arrays are [R, B, T], NaN where a token was no candidate.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from morex.analysis.records import NO_DEPTHS
from morex.analysis.trace import Array, GroupDecisions
from morex.config import ModelConfig
from morex.depth.gated import scored
from morex.depth.routers import ROUTERS
from morex.depth.token_choice import DEFAULT_ALPHA
from morex.loading import decides_depth


@dataclass(frozen=True)
class Reading:
    """Entropies and gates of one routed group, or the reason why there are none."""

    entropy: Array | None = None
    """Of each decision in nats [decisions, B, T]."""
    limit: float = math.log(2)
    """Largest possible entropy of a decision."""
    gate: Array | None = None
    """Weights of the recursions that were taken [R, B, T], NaN for all others."""
    missing: dict[int, str] | None = None
    """Why a decision has no entropy, by recursion from 1."""
    why: str = ""
    """Why there is no entropy at all."""
    why_no_gate: str = ""


def read_scores(group: GroupDecisions, config: ModelConfig, policy: str = "router") -> Reading:
    """Reads one group's scores by the kind of its router; `policy` says who decided the depth."""
    kind = ROUTERS[config.depth.kind].scores_are
    if kind is None and policy.startswith("exit"):
        why = f"the rule {policy!r} compares with a threshold, and no probability decides"
        return Reading(why=why, why_no_gate=why)
    if group.scores is None or kind is None:
        if config.schedule.resolved.recursions == 1:
            why = "there is one recursion, and nothing to decide"
        elif not decides_depth(config):
            why = NO_DEPTHS.missing
        elif group.scores is not None:
            why = f"router {config.depth.kind!r} does not say what its scores are"
        else:
            why = f"router {config.depth.kind!r} scores nothing"
        return Reading(why=why, why_no_gate=why)
    return READERS[kind](group, group.scores, config.depth, config.schedule.resolved.recursions)


def distribution_entropy(logits: Array) -> tuple[Array, Array]:
    """softmax of logits [..., E] and its entropy in nats [...]; a vanishing probability adds 0, never NaN."""
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        # Logits may be infinite in a saturated router; the largest of them then share the probability.
        below = np.where(np.isinf(top), -np.inf, wide - top)
    weights = np.exp(np.where(wide == top, 0.0, below))
    probabilities = weights / weights.sum(-1, keepdims=True)
    return probabilities, _entropy_terms(probabilities).sum(-1)


def bernoulli_entropy(p: Array) -> Array:
    """Entropy of a yes or no of probability p, in nats."""
    return _entropy_terms(p) + _entropy_terms(1 - p)


def _entropy_terms(p: Array) -> Array:
    """-p ln p, 0 where p is 0."""
    logarithms = np.log(p, out=np.zeros_like(p), where=p > 0)
    terms: Array = -p * logarithms
    return terms


def _sigmoid(x: Array) -> Array:
    wide = x.astype(np.float64)
    small = np.exp(-np.abs(wide))
    result: Array = np.where(wide >= 0, 1 / (1 + small), small / (1 + small))
    return result


def _of_logits(group: GroupDecisions, scores: Array, depth: Any, recursions: int) -> Reading:
    """One logit for each recursion; those that take everybody without a gate have none."""
    has_net = set(scored(depth.shares(recursions), depth.score))
    missing = {
        r: "the router takes every candidate here, and has no score"
        for r in range(1, len(scores) + 1)
        if r - 1 not in has_net
    }
    p = _sigmoid(scores)
    entropy = bernoulli_entropy(p)
    for r in missing:
        entropy[r - 1] = np.nan
    gate = depth.alpha * (np.tanh(scores.astype(np.float64)) if depth.score == "tanh" else p)
    if depth.score == "unweighted":
        gate = np.ones_like(p)
    return Reading(entropy=entropy, gate=np.where(group.active, gate, np.nan), missing=missing)


def _of_halting(group: GroupDecisions, scores: Array, depth: Any, recursions: int) -> Reading:
    """The probability of stopping after a recursion; the last one is not asked, and its weight is what is left."""
    p = scores.astype(np.float64)
    spent = np.nancumsum(p, axis=0)
    left = np.clip(1 - np.concatenate([np.zeros_like(p[:1]), spent[:-1]]), 0, None)
    going = np.concatenate([group.active[1:], np.zeros_like(group.active[:1])])
    gate = np.where(going, np.minimum(np.nan_to_num(p), left), left)
    last = len(scores)
    return Reading(
        entropy=bernoulli_entropy(p),
        gate=np.where(group.active, gate, np.nan),
        missing={last: "every token stops after the last recursion, and the router is not asked"},
    )


def _of_exits(group: GroupDecisions, scores: Array, depth: Any, recursions: int) -> Reading:
    """The probability of leaving after a recursion, of those who came so far; p_r, with which they leave there, is the
    weight of that exit. The last recursion is not asked, and takes what is left."""
    leaving = scores.astype(np.float64)
    left = np.cumprod(np.concatenate([np.ones_like(leaving[:1]), 1 - leaving[:-1]]), axis=0)
    last = len(scores)
    weight = left * np.concatenate([leaving[:-1], np.ones_like(leaving[:1])])
    return Reading(
        entropy=bernoulli_entropy(leaving),
        gate=np.where(group.active, weight, np.nan),
        missing={last: "every token leaves after the last recursion, and the gate is not asked"},
    )


def _of_depths(group: GroupDecisions, scores: Array, depth: Any, recursions: int) -> Reading:
    """One decision over all depths, before recursion 1."""
    wide = scores.astype(np.float64)
    total = wide.sum(0)
    probabilities = np.divide(wide, total, out=np.zeros_like(wide), where=total > 0)
    alpha = DEFAULT_ALPHA[depth.score] if depth.alpha is None else depth.alpha
    ran = len(group.active)
    gate = np.where(group.active, alpha * wide[:ran], np.nan)
    if depth.gate == "last":
        goes_on = np.concatenate([group.active[1:], np.zeros_like(group.active[:1])])
        gate = np.where(goes_on, np.nan, gate)
    entropy = _entropy_terms(probabilities).sum(0)[None]
    return Reading(entropy=entropy, limit=math.log(recursions), gate=gate)


READERS: dict[str, Callable[[GroupDecisions, Array, Any, int], Reading]] = {
    "logits": _of_logits,
    "halting": _of_halting,
    "exits": _of_exits,
    "depths": _of_depths,
}
