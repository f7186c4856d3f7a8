"""Judges what an analysis found: one line a quantity, with the value that is worst and the range that it is held to."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from morex.analysis.records import (
    NO_DEPTHS,
    Analysis,
    ClassDepth,
    DepthReport,
    Drift,
    GroupReport,
    Health,
    LayerReport,
    Missing,
    Spread,
)

DEAD = 0.01
"""An expert below this share of an even load is dead."""
HOT = 2.0
"""An expert above so many even loads is hot."""
ROOM = 0.01
"""What may be missing where a quantity should not fall below zero: less is chance."""
Values = Mapping[str, float | Missing]


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


def load_cv(load: tuple[float, ...]) -> float:
    """Standard deviation of the experts' loads over their mean; 0 where all are even."""
    mean = sum(load) / len(load)
    return math.sqrt(sum((share - mean) ** 2 for share in load) / len(load)) / mean


def effective_experts(load: tuple[float, ...]) -> float:
    """1 / sum of squared loads: E where all are even, 1 where one expert gets everything."""
    return sum(load) ** 2 / sum(share**2 for share in load)


def dead_experts(load: tuple[float, ...]) -> list[int]:
    """Experts with less than `DEAD` of an even share."""
    return [e for e, share in enumerate(load) if share * len(load) < DEAD]


def hot_experts(load: tuple[float, ...], times: float = HOT) -> list[int]:
    """Experts with more than so many even shares."""
    return [e for e, share in enumerate(load) if share * len(load) > times]


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


def _of_layers(analysis: Analysis, measure: Callable[[tuple[float, ...]], float]) -> Values:
    """A measure of the load of every choice of every expert layer."""
    if not analysis.layers:
        return {"": Missing("this model has no experts")}
    found: dict[str, float | Missing] = {}
    for layer in analysis.layers:
        for call in layer.calls:
            where = place(layer, call.recursion, call.step)
            if layer.experts == 1:
                found[where] = Missing("there is one expert, and nothing to choose")
            else:
                found[where] = Missing("no token came by") if call.load is None else measure(call.load)
    return found


def place(layer: LayerReport, recursion: int, step: int) -> str:
    """`core.blocks.0`, and where a layer chooses several times, when."""
    name = short(layer.name)
    if max(call.recursion for call in layer.calls) > 1:
        name += f" recursion {recursion}"
    return f"{name} step {step}" if max(call.step for call in layer.calls) > 1 else name


def short(name: str) -> str:
    """A module path without what all of them share."""
    return name.removeprefix("stack.").removesuffix(".mixer.router").replace(".mixer.depth", " steps")


def _expert_entropy(kind_recurs: bool) -> Callable[[Analysis], Values]:
    """Entropy over ln E, of layers that route once or of those that route again on their own state."""

    def values(analysis: Analysis) -> Values:
        if not analysis.layers:
            return {"": Missing("this model has no experts")}
        if (analysis.model["mixer"]["kind"] == "layer_recurrent") != kind_recurs:
            other = "choose once" if kind_recurs else "choose again at every step"
            return {"": Missing(f"the expert layers of this model {other}")}
        found: dict[str, float | Missing] = {}
        for layer in analysis.layers:
            for call in layer.calls:
                where, entropy = place(layer, call.recursion, call.step), call.entropy
                if layer.experts == 1:
                    found[where] = Missing("there is one expert, and nothing to choose")
                else:
                    found[where] = entropy if isinstance(entropy, Missing) else entropy.mean / math.log(layer.experts)
        return found

    return values


def _expert_weight(analysis: Analysis) -> Values:
    """Mean weight of the expert that counts most."""
    if not analysis.layers:
        return {"": Missing("this model has no experts")}
    return {
        place(layer, call.recursion, call.step): call.weight.mean if isinstance(call.weight, Spread) else call.weight
        for layer in analysis.layers
        for call in layer.calls
    }


def _late(series: Callable[[Drift], dict[str, tuple[float, ...]]], why: str) -> Callable[[Analysis], Values]:
    """Mean of a logged series over the last quarter of the training; `why` it may be empty."""

    def values(analysis: Analysis) -> Values:
        course = analysis.drift
        if isinstance(course, Missing):
            return {"": course}
        size = -(-len(course.steps) // 4)
        found: dict[str, float | Missing] = {
            short(name).removesuffix(".router"): sum(each[-size:]) / size for name, each in series(course).items()
        }
        return found or {"": Missing(why)}

    return values


def _confidence_rise(analysis: Analysis) -> Values:
    """Mean largest probability at a layer's last step minus that at its first."""
    if not analysis.layers:
        return {"": Missing("this model has no experts")}
    found: dict[str, float | Missing] = {}
    for layer in analysis.layers:
        last, several = max(call.step for call in layer.calls), max(call.recursion for call in layer.calls) > 1
        for r in sorted({call.recursion for call in layer.calls}):
            own = [call.confidence for call in layer.calls if call.recursion == r]
            first, end = own[0], own[-1]
            if last == 1:
                found[short(layer.name)] = Missing("its layers choose once")
            elif isinstance(first, Spread) and isinstance(end, Spread):
                found[short(layer.name) + (f" recursion {r}" if several else "")] = end.mean - first.mean
    return found or {"": Missing("no token came by")}


def _recursions(group: GroupReport, values: tuple[Spread | Missing, ...]) -> Iterator[tuple[str, float | Missing]]:
    for r, value in enumerate(values, start=1):
        yield f"{short(group.name)} recursion {r}", value.mean if isinstance(value, Spread) else value


def _router_entropy(analysis: Analysis) -> Values:
    found: dict[str, float | Missing] = {}
    for group in analysis.groups:
        if isinstance(group.entropy, Missing):
            found[short(group.name)] = group.entropy
        elif len(group.entropy) == 1 and len(group.active_share) > 1:
            (one,) = group.entropy
            found[short(group.name)] = one.mean / group.entropy_limit if isinstance(one, Spread) else one
        else:
            for where, value in _recursions(group, group.entropy):
                found[where] = value if isinstance(value, Missing) else value / group.entropy_limit
    return found


def _gates(analysis: Analysis) -> Values:
    found: dict[str, float | Missing] = {}
    for group in analysis.groups:
        if isinstance(group.gate, Missing):
            found[short(group.name)] = group.gate
        else:
            found |= dict(_recursions(group, group.gate))
    return found


def _off_capacity(analysis: Analysis) -> Values:
    found: dict[str, float | Missing] = {}
    for group in analysis.groups:
        if group.wanted_share is None:
            found[short(group.name)] = Missing(f"router {analysis.model['depth']['kind']!r} has no capacities")
        elif analysis.policy not in ("router", "oracle"):
            found[short(group.name)] = Missing("the caller decides the depth")
        else:
            for r, (share, wanted) in enumerate(zip(group.active_share, group.wanted_share, strict=True), start=1):
                found[f"{short(group.name)} recursion {r}"] = abs(share - wanted)
    return found


def _depths_in_use(analysis: Analysis) -> Values:
    if isinstance(analysis.depth, Missing):
        return {"": analysis.depth}
    counts = analysis.depth.histogram
    return {"all groups": float(sum(count >= 0.01 * sum(counts) for count in counts))}


def _mean_depth(analysis: Analysis) -> Values:
    return {"": analysis.depth} if isinstance(analysis.depth, Missing) else {"all groups": analysis.depth.mean}


def _depths_by(classes: Callable[[DepthReport], Mapping[Any, ClassDepth] | Missing]) -> Callable[[Analysis], Values]:
    """Mean depths of one way to tell tokens apart."""

    def values(analysis: Analysis) -> Values:
        if isinstance(analysis.depth, Missing):
            return {"": analysis.depth}
        found = classes(analysis.depth)
        if isinstance(found, Missing):
            return {"": found}
        return {f"difficulty {kind}" if isinstance(kind, int) else kind: one.mean for kind, one in found.items()}

    return values


def _agreement(analysis: Analysis) -> Values:
    if isinstance(analysis.agreement, Missing):
        return {"": analysis.agreement}
    return {
        f"{short(name)} recursion {r}": entry.accuracy
        for name, entries in analysis.agreement.items()
        for r, entry in enumerate(entries, start=1)
    }


def _change(analysis: Analysis) -> Values:
    found: dict[str, float | Missing] = {}
    for group in analysis.groups:
        if len(group.change) == 1:
            found[short(group.name)] = Missing("there is one recursion")
        else:
            # What recursion 1 changes depends on the scale of the embeddings where there is no prelude.
            found |= dict(list(_recursions(group, group.change))[1:])
    return found


def _step_change(analysis: Analysis) -> Values:
    if not analysis.layers:
        return {"": Missing("this model has no experts")}
    return {
        place(layer, call.recursion, call.step): call.change.mean if isinstance(call.change, Spread) else call.change
        for layer in analysis.layers
        for call in layer.calls
    }


def _steps(analysis: Analysis) -> Values:
    """Mean steps inside the experts of each choice."""
    if not analysis.layers:
        return {"": Missing("this model has no experts")}
    return {
        place(layer, call.recursion, call.step): (
            call.mean_steps.mean if isinstance(call.mean_steps, Spread) else call.mean_steps
        )
        for layer in analysis.layers
        for call in layer.calls
    }


def _last_share(analysis: Analysis) -> Values:
    return {
        short(group.name): group.last_share.mean if isinstance(group.last_share, Spread) else group.last_share
        for group in analysis.groups
    }


def _last_loss(steps: bool) -> Callable[[Analysis], Values]:
    """Fall of the loss by the last recursion, or by the last expert step."""

    def values(analysis: Analysis) -> Values:
        if isinstance(analysis.losses, Missing):
            return {"": analysis.losses}
        losses = analysis.losses.by_steps if steps else analysis.losses.by_depth
        if isinstance(losses, Missing):
            return {"": losses}
        *_, before, last = sorted(losses)
        return {f"{'step' if steps else 'recursion'} {last}": losses[before] - losses[last]}

    return values


def _accuracy(analysis: Analysis) -> Values:
    if isinstance(analysis.accuracy, Missing):
        return {"": analysis.accuracy}
    return {f"difficulty {level}": value for level, value in analysis.accuracy.by_difficulty.items()}


def _last_accuracy(analysis: Analysis) -> Values:
    """Rise of the accuracy by the last recursion."""
    found = analysis.accuracy if isinstance(analysis.accuracy, Missing) else analysis.accuracy.by_depth
    if isinstance(found, Missing):
        return {"": found}
    *_, before, last = sorted(found)
    return {f"recursion {last}": found[last] - found[before]}


QUANTITIES = (
    Quantity("expert load CV", lambda a: _of_layers(a, load_cv), Range(high=0.3)),
    Quantity("busiest expert over an even share", lambda a: _of_layers(a, lambda x: max(x) * len(x)), Range(high=1.5)),
    Quantity("idlest expert over an even share", lambda a: _of_layers(a, lambda x: min(x) * len(x)), Range(0.5)),
    Quantity("effective experts over E", lambda a: _of_layers(a, lambda x: effective_experts(x) / len(x)), Range(0.75)),
    Quantity("dead experts", lambda a: _of_layers(a, lambda x: len(dead_experts(x))), Range(0, 0), is_count=True),
    Quantity("hot experts", lambda a: _of_layers(a, lambda x: len(hot_experts(x))), Range(0, 0), is_count=True),
    Quantity("expert router entropy over ln E", _expert_entropy(False), Range(0.72)),
    Quantity("recurring expert router entropy over ln E", _expert_entropy(True), Range(0.58)),
    Quantity("weight of the heaviest expert", _expert_weight),
    Quantity("rise of confidence over expert steps", _confidence_rise, Range(-ROOM, 0.3)),
    Quantity("depth router entropy over the largest", _router_entropy),
    Quantity("gate", _gates),
    Quantity("active share off its capacity", _off_capacity, Range(high=0.1)),
    Quantity("depths in use", _depths_in_use, Range(2), is_count=True),
    Quantity("mean depth", _mean_depth),
    Quantity("mean depth by class", _depths_by(lambda d: d.by_class)),
    Quantity("mean depth by rarity", _depths_by(lambda d: d.by_rarity)),
    Quantity("mean depth by difficulty", _depths_by(lambda d: d.by_difficulty)),
    Quantity("agreement of the causal rule with top-k", _agreement, Range(0.9)),
    Quantity("change of the state by a later recursion", _change, Range(0.1, 2)),
    Quantity("change of the state by an expert step", _step_change, Range(0.1, 2)),
    Quantity("last recursion's share of the path", _last_share, Range(0.05, 0.5)),
    Quantity("mean steps inside experts", _steps),
    Quantity("accuracy", _accuracy),
    Quantity("accuracy that the last recursion adds", _last_accuracy, Range(-ROOM)),
    Quantity("loss that the last recursion takes off", _last_loss(False), Range(-ROOM)),
    Quantity("loss that the last expert step takes off", _last_loss(True), Range(-ROOM)),
    Quantity(
        "expert load CV late in training", _late(lambda a: a.load_cv, "this model has no experts"), Range(high=0.3)
    ),
    Quantity(
        "mean depth late in training",
        _late(lambda a: a.mean_depth, NO_DEPTHS.missing),
    ),
)
"""Everything that is judged, in the order of the report."""
