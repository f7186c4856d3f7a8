"""Judges what an analysis found: one line a quantity, with the value that is worst and the range that it is held to."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from morex.analysis.measures import (
    Values,
    accuracy,
    agreement,
    confidence_rise,
    dead_experts,
    depths_by,
    depths_in_use,
    effective_experts,
    expert_entropy,
    expert_weight,
    gates,
    hot_experts,
    last_accuracy,
    last_loss,
    last_share,
    last_step_share,
    late,
    later,
    load_cv,
    mean_depth,
    mean_steps,
    of_layers,
    of_steps,
    off_capacity,
    router_entropy,
)
from morex.analysis.records import NO_DEPTHS, Analysis, Health, Missing

ROOM = 0.01
"""What may be missing where a quantity should not fall below zero: less is chance."""


@dataclass(frozen=True)
class Range:
    """Where a quantity is healthy, both ends included; None on a side without a bound."""

    low: float | None = None
    high: float | None = None

    def distance(self, value: float) -> float:
        """How far a value is outside; negative inside, by its distance to the nearer end."""
        low = -math.inf if self.low is None else self.low - value
        high = -math.inf if self.high is None else value - self.high
        return max(low, high)

    def __str__(self) -> str:
        if self.low == self.high:
            return f"healthy at {self.low:g}"
        if self.low is None:
            return f"healthy up to {self.high:g}"
        return f"healthy from {self.low:g}" + ("" if self.high is None else f" to {self.high:g}")


@dataclass(frozen=True)
class Quantity:
    """Something that is judged: its values by the place that they belong to."""

    name: str
    values: Callable[[Analysis], Values]
    healthy: Range | None = None
    """None: reported, not judged."""
    is_count: bool = False


def judge(analysis: Analysis) -> tuple[Health, ...]:
    """A line for every quantity, in a fixed order."""
    return tuple(_line(quantity, quantity.values(analysis)) for quantity in QUANTITIES)


def _line(quantity: Quantity, values: Values) -> Health:
    numbers = {where: value for where, value in values.items() if not isinstance(value, Missing)}
    reasons = list(dict.fromkeys(value.missing for value in values.values() if isinstance(value, Missing)))
    if not numbers:
        why = "; ".join(reasons) or "nothing to look at"
        return Health(quantity.name, "none", f"{quantity.name}: not computed ({why})", reason=why)

    def said(value: float) -> str:
        return f"{value:.0f}" if quantity.is_count else f"{value:.3g}"

    healthy = quantity.healthy
    if healthy is None:
        low, high = min(numbers, key=lambda w: numbers[w]), max(numbers, key=lambda w: numbers[w])
        text = f"{quantity.name} {said(numbers[high])} in {high}"
        if numbers[low] != numbers[high]:
            text = f"{quantity.name} {said(numbers[low])} in {low} to {text.removeprefix(f'{quantity.name} ')}"
        return Health(quantity.name, "info", text, value=numbers[high], where=high, places=len(numbers))
    worst = max(numbers, key=lambda w: healthy.distance(numbers[w]))
    outside = sum(healthy.distance(value) > 1e-9 for value in numbers.values())
    counted = f"; {outside} of {len(numbers)} outside" if outside else ""
    return Health(
        quantity.name,
        "warn" if outside else "ok",
        f"{quantity.name} {said(numbers[worst])} in {worst} ({healthy}{counted})",
        value=numbers[worst],
        where=worst,
        low=healthy.low,
        high=healthy.high,
        outside=outside,
        places=len(numbers),
    )


QUANTITIES = (
    Quantity("expert load CV", lambda a: of_layers(a, load_cv), Range(high=0.3)),
    Quantity("busiest expert over an even share", lambda a: of_layers(a, lambda x: max(x) * len(x)), Range(high=1.5)),
    Quantity("idlest expert over an even share", lambda a: of_layers(a, lambda x: min(x) * len(x)), Range(0.5)),
    Quantity("effective experts over E", lambda a: of_layers(a, lambda x: effective_experts(x) / len(x)), Range(0.75)),
    Quantity("dead experts", lambda a: of_layers(a, lambda x: len(dead_experts(x))), Range(0, 0), is_count=True),
    Quantity("hot experts", lambda a: of_layers(a, lambda x: len(hot_experts(x))), Range(0, 0), is_count=True),
    Quantity("expert router entropy over ln E", expert_entropy(False, lambda call: call.entropy), Range(0.72)),
    Quantity(
        "recurring expert router entropy over ln E before the floor",
        expert_entropy(True, lambda call: call.own_entropy),
        Range(0.58),
    ),
    Quantity("recurring expert router entropy over ln E", expert_entropy(True, lambda call: call.entropy)),
    Quantity("weight of the heaviest expert", expert_weight),
    Quantity("rise of confidence over expert steps", confidence_rise, Range(-ROOM, 0.3)),
    Quantity("depth router entropy over the largest", router_entropy),
    Quantity("gate", gates),
    Quantity("active share off its capacity", off_capacity, Range(high=0.1)),
    Quantity("depths in use", depths_in_use, Range(2), is_count=True),
    Quantity("mean depth", mean_depth),
    Quantity("mean depth by class", depths_by(lambda d: d.by_class)),
    Quantity("mean depth by rarity", depths_by(lambda d: d.by_rarity)),
    Quantity("mean depth by difficulty", depths_by(lambda d: d.by_difficulty)),
    Quantity("agreement of the causal rule with top-k", agreement(lambda entry: entry.accuracy), Range(0.9)),
    Quantity("precision of the causal rule", agreement(lambda entry: entry.precision)),
    Quantity("recall of the causal rule", agreement(lambda entry: entry.recall)),
    Quantity("change of the state by a later recursion", later(lambda group: group.change), Range(0.1, 2)),
    Quantity("cosine of the states around a later recursion", later(lambda group: group.cosine)),
    Quantity("last recursion's share of the path", last_share, Range(0.05, 0.5)),
    Quantity("change of the state by an expert step", of_steps(lambda step: step.change), Range(0.1, 2)),
    Quantity("cosine of the states around an expert step", of_steps(lambda step: step.cosine)),
    Quantity("last expert step's share of the path", last_step_share, Range(0.05, 0.5)),
    Quantity("mean steps inside experts", mean_steps),
    Quantity("accuracy", accuracy),
    Quantity("accuracy that the last recursion adds", last_accuracy, Range(-ROOM)),
    Quantity("loss that the last recursion takes off", last_loss(False), Range(-ROOM)),
    Quantity("loss that the last expert step takes off", last_loss(True), Range(-ROOM)),
    Quantity(
        "expert load CV late in training", late(lambda a: a.load_cv, "this model has no experts"), Range(high=0.3)
    ),
    Quantity("effective experts late in training", late(lambda a: a.effective_experts, "this model has no experts")),
    Quantity(
        "router entropy over the largest late in training",
        late(lambda a: a.entropy_share, "no router of this model has an entropy in the log"),
    ),
    Quantity("mean depth late in training", late(lambda a: a.mean_depth, NO_DEPTHS.missing)),
    Quantity(
        "mean steps inside experts late in training",
        late(lambda a: a.mean_steps, "no router decides steps inside experts"),
    ),
)
"""Everything that is judged, in the order of the report."""
