"""Routing over the training, from the lines that the run logged about its own batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from morex.analysis.health import effective_experts, load_cv
from morex.analysis.records import Drift, Missing
from morex.config import ModelConfig
from morex.sections.mixers import FeedForwardConfig

MOST_POINTS = 200


def drift(lines: Sequence[Mapping[str, Any]], config: ModelConfig) -> Drift | Missing:
    """The series in the training lines of metrics.jsonl, at most `MOST_POINTS` of them, evenly spaced.

    Args:
        lines: training lines in order.
        config: of the model.
    """
    if len(lines) < 2:
        return Missing(f"metrics.jsonl has {len(lines)} training lines, and a course needs two")
    stride = -(-len(lines) // MOST_POINTS)
    kept = list(lines[::-1][::stride])[::-1]
    mixer = config.mixer
    experts = 1 if isinstance(mixer, FeedForwardConfig) else mixer.router.experts
    recursions = config.schedule.resolved.recursions

    def share(name: str, entropy: float) -> float:
        return entropy / math.log(experts if name.endswith(".mixer.router") else recursions)

    def has_choice(name: str) -> bool:
        return (experts if name.endswith(".mixer.router") else recursions) > 1

    routed = config.depth.kind != "fixed"
    found = Drift(
        steps=tuple(line["step"] for line in kept),
        mean_depth=_series(kept, "active_share", lambda _, shares: sum(shares)) if routed else {},
        load_cv=_series(kept, "expert_load", lambda _, load: load_cv(load)),
        effective_experts=_series(kept, "expert_load", lambda _, load: effective_experts(load)),
        entropy_share=_series(kept, "router_entropy", share, has_choice),
    )
    if not (found.mean_depth or found.load_cv or found.entropy_share):
        return Missing("no router decides anything in this model")
    return found


def _series(
    lines: Sequence[Mapping[str, Any]],
    key: str,
    measure: Callable[[str, Any], float],
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, tuple[float, ...]]:
    """A measure of one field by router, for the routers that every line has."""
    names = [
        name for name in lines[-1].get(key, {}) if wanted(name) and all(_usable(line, key, name) for line in lines)
    ]
    return {name: tuple(float(measure(name, line[key][name])) for line in lines) for name in names}


def _usable(line: Mapping[str, Any], key: str, name: str) -> bool:
    """Whether a line has the field, and not for a step in which no token came by."""
    value = line.get(key, {}).get(name)
    return value is not None and (not isinstance(value, list) or key == "active_share" or sum(value) > 0)
