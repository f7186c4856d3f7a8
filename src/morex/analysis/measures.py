"""The quantities that health judges, each by the place that it belongs to: a layer or group, a recursion, a step."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from morex.analysis.records import (
    Agreement,
    Analysis,
    CallReport,
    ClassDepth,
    DepthReport,
    Drift,
    Found,
    GroupReport,
    LayerReport,
    Missing,
    Spread,
    StepReport,
)

DEAD = 0.01
"""An expert below this share of an even load is dead."""
HOT = 2.0
"""An expert above so many even loads is hot."""
Values = Mapping[str, float | Missing]


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


def of_layers(analysis: Analysis, measure: Callable[[tuple[float, ...]], float]) -> Values:
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


def _mean(found: Found) -> float | Missing:
    return found.mean if isinstance(found, Spread) else found


def place(layer: LayerReport, recursion: int, step: int) -> str:
    """`core.blocks.0`, and where a layer chooses several times, when."""
    name = short(layer.name)
    if max(call.recursion for call in layer.calls) > 1:
        name += f" recursion {recursion}"
    return f"{name} step {step}" if max(call.step for call in layer.calls) > 1 else name


def step_place(layer: LayerReport, step: StepReport) -> str:
    """Likewise of a step of a layer with a state."""
    recurs = not isinstance(layer.last_share, Missing) and len(layer.last_share) > 1
    return f"{short(layer.name)}{f' recursion {step.recursion}' if recurs else ''} step {step.step}"


def short(name: str) -> str:
    """A module path without what all of them share."""
    return name.removeprefix("stack.").removesuffix(".mixer.router").replace(".mixer.depth", " steps")


def expert_entropy(kind_recurs: bool, measure: Callable[[CallReport], Found]) -> Callable[[Analysis], Values]:
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
                where, entropy = place(layer, call.recursion, call.step), measure(call)
                if layer.experts == 1:
                    found[where] = Missing("there is one expert, and nothing to choose")
                else:
                    found[where] = entropy if isinstance(entropy, Missing) else entropy.mean / math.log(layer.experts)
        return found

    return values


def expert_weight(analysis: Analysis) -> Values:
    """Mean weight of the expert that counts most."""
    if not analysis.layers:
        return {"": Missing("this model has no experts")}
    return {
        place(layer, call.recursion, call.step): call.weight.mean if isinstance(call.weight, Spread) else call.weight
        for layer in analysis.layers
        for call in layer.calls
    }


def late(series: Callable[[Drift], dict[str, tuple[float, ...]]], why: str) -> Callable[[Analysis], Values]:
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


def confidence_rise(analysis: Analysis) -> Values:
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


def router_entropy(analysis: Analysis) -> Values:
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


def gates(analysis: Analysis) -> Values:
    found: dict[str, float | Missing] = {}
    for group in analysis.groups:
        if isinstance(group.gate, Missing):
            found[short(group.name)] = group.gate
        else:
            found |= dict(_recursions(group, group.gate))
    return found


def off_capacity(analysis: Analysis) -> Values:
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


def depths_in_use(analysis: Analysis) -> Values:
    if isinstance(analysis.depth, Missing):
        return {"": analysis.depth}
    counts = analysis.depth.histogram
    return {"all groups": float(sum(count >= 0.01 * sum(counts) for count in counts))}


def mean_depth(analysis: Analysis) -> Values:
    return {"": analysis.depth} if isinstance(analysis.depth, Missing) else {"all groups": analysis.depth.mean}


def depths_by(classes: Callable[[DepthReport], Mapping[Any, ClassDepth] | Missing]) -> Callable[[Analysis], Values]:
    """Mean depths of one way to tell tokens apart."""

    def values(analysis: Analysis) -> Values:
        if isinstance(analysis.depth, Missing):
            return {"": analysis.depth}
        found = classes(analysis.depth)
        if isinstance(found, Missing):
            return {"": found}
        return {f"difficulty {kind}" if isinstance(kind, int) else kind: one.mean for kind, one in found.items()}

    return values


def agreement(measure: Callable[[Agreement], float | Missing]) -> Callable[[Analysis], Values]:
    """A measure of how the causal rule agrees with top-k."""

    def values(analysis: Analysis) -> Values:
        if isinstance(analysis.agreement, Missing):
            return {"": analysis.agreement}
        return {
            f"{short(name)} recursion {r}": measure(entry)
            for name, entries in analysis.agreement.items()
            for r, entry in enumerate(entries, start=1)
        }

    return values


def later(measure: Callable[[GroupReport], tuple[Found, ...]]) -> Callable[[Analysis], Values]:
    """A measure of every recursion but the first: without a prelude that depends on the scale of the embeddings."""

    def values(analysis: Analysis) -> Values:
        found: dict[str, float | Missing] = {}
        for group in analysis.groups:
            if len(group.change) == 1:
                found[short(group.name)] = Missing("there is one recursion")
            else:
                found |= dict(list(_recursions(group, measure(group)))[1:])
        return found

    return values


def of_steps(measure: Callable[[StepReport], Found]) -> Callable[[Analysis], Values]:
    """A measure of each step of the expert layers with a state."""

    def values(analysis: Analysis) -> Values:
        if not analysis.layers:
            return {"": Missing("this model has no experts")}
        found: dict[str, float | Missing] = {}
        for layer in analysis.layers:
            if isinstance(layer.moves, Missing):
                found[short(layer.name)] = layer.moves
                continue
            for step in layer.moves:
                found[step_place(layer, step)] = _mean(measure(step))
        return found

    return values


def last_step_share(analysis: Analysis) -> Values:
    if not analysis.layers:
        return {"": Missing("this model has no experts")}
    found: dict[str, float | Missing] = {}
    for layer in analysis.layers:
        name = short(layer.name)
        if isinstance(layer.last_share, Missing):
            found[name] = layer.last_share
        else:
            several = len(layer.last_share) > 1
            for r, share in enumerate(layer.last_share, start=1):
                found[f"{name} recursion {r}" if several else name] = _mean(share)
    return found


def mean_steps(analysis: Analysis) -> Values:
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


def last_share(analysis: Analysis) -> Values:
    return {
        short(group.name): group.last_share.mean if isinstance(group.last_share, Spread) else group.last_share
        for group in analysis.groups
    }


def last_loss(steps: bool) -> Callable[[Analysis], Values]:
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


def accuracy(analysis: Analysis) -> Values:
    if isinstance(analysis.accuracy, Missing):
        return {"": analysis.accuracy}
    return {f"difficulty {level}": value for level, value in analysis.accuracy.by_difficulty.items()}


def last_accuracy(analysis: Analysis) -> Values:
    """Rise of the accuracy by the last recursion."""
    found = analysis.accuracy if isinstance(analysis.accuracy, Missing) else analysis.accuracy.by_depth
    if isinstance(found, Missing):
        return {"": found}
    *_, before, last = sorted(found)
    return {f"recursion {last}": found[last] - found[before]}
