"""The figures of an analysis whose axis is the recursion, the expert step or the choice of a layer."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from morex.analysis.measures import short
from morex.analysis.records import Analysis, Found, Missing, Spread
from morex.study.canvas import new_figure
from morex.study.pictures import DASHES, MARKERS
from morex.study.series import FAINT, HUES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = dict[str, Sequence[float | None]]
Panel = tuple[Mapping[str, Sequence[float | None]], str, str, str]
"""Lines, title, and what stands at the upright and at the level axis."""
MOST_LINES = 10
"""Lines in a panel with a legend; more are drawn thin, without one."""
CHOICE = "choice of the layer, in order"


def state_change(analysis: Analysis) -> "Figure | None":
    """How far each recursion, or expert step, moves the state, and how much it turns it."""
    changes: Series = {}
    cosines: Series = {}
    for group in analysis.groups:
        if len(group.change) > 1:
            changes[short(group.name)], cosines[short(group.name)] = means(group.change), means(group.cosine)
    for layer in analysis.layers:
        if not isinstance(layer.moves, Missing):
            changes[short(layer.name)] = means([step.change for step in layer.moves])
            cosines[short(layer.name)] = means([step.cosine for step in layer.moves])
    recur, step = (any(len(group.change) > 1 for group in analysis.groups), bool(analysis.layers))
    label = "recursion or expert step" if recur and step else "expert step" if step else "recursion"
    return _figure(
        [
            (changes, "Change of the state", "difference over the state before", label),
            (cosines, "Direction of the state", "cosine with the state before", label),
        ]
    )


def active_share(analysis: Analysis) -> "Figure | None":
    """Share of the tokens that takes each recursion, beside the capacities where there are any."""
    series: Series = {}
    for group in analysis.groups:
        if len(group.active_share) > 1 and not isinstance(analysis.depth, Missing):
            series[short(group.name)] = group.active_share
    wanted = next((group.wanted_share for group in analysis.groups if group.wanted_share is not None), None)
    if series and wanted is not None:
        series["capacity"] = wanted
    return _figure([(series, "Active tokens", "share of the tokens", "recursion")], ends=(0, 1.05))


def weights(analysis: Analysis) -> "Figure | None":
    """The weights with which recursions and experts enter."""
    gates = {short(g.name): means(g.gate) for g in analysis.groups if not isinstance(g.gate, Missing)}
    heaviest, largest = (
        {short(layer.name): means([getattr(call, name) for call in layer.calls]) for layer in analysis.layers}
        for name in ("weight", "confidence")
    )
    return _figure(
        [
            (gates, "Gates of the recursions", "mean weight", "recursion"),
            (heaviest, "Heaviest expert of a token", "mean weight", CHOICE),
            (largest, "Confidence of the expert routers", "mean largest probability", CHOICE),
        ]
    )


def agreement(analysis: Analysis) -> "Figure | None":
    """How the active tokens of the causal rule agree with those of top-k, a panel for each routed group."""
    if isinstance(analysis.agreement, Missing):
        return None
    panels: list[Panel] = []
    for name, entries in analysis.agreement.items():
        series: Series = {
            text: [None if isinstance(value, Missing) else value for value in (getattr(e, field) for e in entries)]
            for text, field in (("agreement", "accuracy"), ("precision", "precision"), ("recall", "recall"))
        }
        panels.append((series, f"Causal rule and top-k in {short(name)}", "share of the tokens", "recursion"))
    return _figure(panels, ends=(0, 1.05))


def losses(analysis: Analysis) -> "Figure | None":
    """Held-out loss with every token at each depth, and with expert steps left out."""
    found = analysis.losses
    if isinstance(found, Missing):
        return None
    panels: list[Panel] = []
    for values, title, label in (
        (found.by_depth, "Every token at one depth", "recursions"),
        (found.by_steps, "Experts of fewer steps", "expert steps"),
    ):
        if not isinstance(values, Missing):
            places = range(1, max(values) + 1)
            series: Series = {label: [values.get(place) for place in places]}
            if values is found.by_depth and not isinstance(analysis.depth, Missing):
                series = {"every token": series[label], f"depth by {analysis.policy}": [found.loss] * len(places)}
                if found.oracle_loss is not None:
                    series["depth by top-k"] = [found.oracle_loss] * len(places)
            panels.append((series, title, "held-out loss", label))
    return _figure(panels)


def entropy(analysis: Analysis) -> "Figure | None":
    """Entropy of every router over the largest possible, at every decision."""
    depths = {
        short(group.name): means(group.entropy, group.entropy_limit)
        for group in analysis.groups
        if not isinstance(group.entropy, Missing)
    }
    several = [layer for layer in analysis.layers if layer.experts > 1]
    made, own = (
        {
            short(layer.name): means([getattr(call, name) for call in layer.calls], math.log(layer.experts))
            for layer in several
        }
        for name in ("entropy", "own_entropy")
    )
    label = "entropy over the largest"
    panels = [(depths, "Depth routers", label, "recursion"), (made, "Expert routers", label, CHOICE)]
    if own != made:
        panels.append((own, "Expert routers before the floor", label, CHOICE))
    return _figure(panels, ends=(0, 1.05))


def _figure(panels: Sequence[Panel], ends: tuple[float, float] | None = None) -> "Figure | None":
    """The panels that have a value, side by side; `ends` of the axis of the values."""
    shown = [panel for panel in panels if any(value is not None for values in panel[0].values() for value in values)]
    if not shown:
        return None
    figure, grid = new_figure(4.7 * len(shown), 3.6, columns=len(shown))
    for axes, (series, title, label, x_label) in zip(grid[0], shown, strict=True):
        panel(axes, series, title, label, x_label)
        if ends is not None:
            (axes.set_ylim if axes.lines else axes.set_xlim)(*ends)
    if len({tuple(series) for series, *_ in shown}) == 1:
        legend(figure, grid[0][0], shown[0][0])
    else:
        for axes, (series, *_) in zip(grid[0], shown, strict=True):
            if 1 < len(series) <= MOST_LINES and axes.lines:
                axes.legend(fontsize=8)
    return figure


def panel(axes: "Axes", series: Mapping[str, Sequence[float | None]], title: str, label: str, x_label: str) -> None:
    """A line for each name over 1, 2, ..., places without a value left out; bars where no name has two values."""
    axes.set_title(title)
    known = {
        name: [(x, value) for x, value in enumerate(values, start=1) if value is not None]
        for name, values in series.items()
    }
    if all(len(points) < 2 for points in known.values()):
        several = any(len(values) > 1 for values in series.values())
        bars = {
            f"{name}, {x_label} {points[0][0]}" if several else name: points[0][1]
            for name, points in reversed(known.items())
            if points
        }
        axes.barh(list(bars), list(bars.values()), height=0.6, color=HUES[0])
        axes.grid(axis="y", visible=False)
        room = 0.8 + max(0, 3 - len(bars)) / 2
        axes.set_ylim(-room, len(bars) - 1 + room)
        axes.set_xlabel(label)
        return
    for number, (name, points) in enumerate(known.items()):
        drawn = look(number, len(series)) | {"marker": list(MARKERS.values())[number % len(MARKERS)], "markersize": 5}
        axes.plot([x for x, _ in points], [value for _, value in points], label=name, **drawn)
    most = max(len(values) for values in series.values())
    axes.set_xticks(range(1, most + 1))
    axes.set_xlim(0.7, most + 0.3)
    axes.set_ylabel(label)
    axes.set_xlabel(x_label)
    axes.ticklabel_format(axis="y", useOffset=False)


def legend(figure: "Figure", axes: "Axes", series: Mapping[str, Sequence[float | None]]) -> None:
    """One legend below all panels."""
    if 1 < len(series) <= MOST_LINES and axes.lines:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)


def look(number: int, count: int) -> dict[str, Any]:
    """Colour and dash of a line; of many, all alike."""
    if count > MOST_LINES:
        return {"color": FAINT, "linewidth": 0.7, "alpha": 0.6}
    dash = list(DASHES.values())[number // len(HUES) % len(DASHES)]
    return {"color": HUES[number % len(HUES)], "linewidth": 1.7, "linestyle": dash}


def means(values: Sequence[Found], limit: float = 1.0) -> list[float | None]:
    """Means over `limit`, None where there is none."""
    return [value.mean / limit if isinstance(value, Spread) else None for value in values]
