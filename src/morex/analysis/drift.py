"""Routing over the training, from the lines that the run logged about its own batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from morex.analysis.measures import effective_experts, load_cv
from morex.analysis.records import Drift, Missing
from morex.config import ModelConfig
from morex.loading import decides_depth
from morex.nn.signals import STEP_ROUTER
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

    def choices(name: str) -> int:
        """Among how many things the router of this path chooses."""
        if name.endswith(STEP_ROUTER):
            return getattr(mixer, "steps", 1)
        if name.endswith(".mixer.router"):
            return 1 if isinstance(mixer, FeedForwardConfig) else mixer.router.experts
        return config.schedule.resolved.recursions

    def share(name: str, entropy: float) -> float:
        return entropy / math.log(choices(name))

    taken = _series(kept, "active_share", lambda _, shares: sum(shares))
    # All tokens of a training pass go through all exits; where they would leave, the gate says.
    taken |= _series(kept, "exit_probability", lambda _, p: sum(r * each for r, each in enumerate(p, start=1)))
    routed = decides_depth(config)
    found = Drift(
        steps=tuple(line["step"] for line in kept),
        mean_depth={name: each for name, each in taken.items() if routed and not name.endswith(STEP_ROUTER)},
        mean_steps={name: each for name, each in taken.items() if name.endswith(STEP_ROUTER)},
        load_cv=_series(kept, "expert_load", lambda _, load: load_cv(load)),
        effective_experts=_series(kept, "expert_load", lambda _, load: effective_experts(load)),
        entropy_share=_series(kept, "router_entropy", share, lambda name: choices(name) > 1),
    )
    if not (found.mean_depth or found.mean_steps or found.load_cv or found.entropy_share):
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
    return value is not None and (not isinstance(value, list) or key != "expert_load" or sum(value) > 0)
