"""The figures of an analysis, in the style of a study's."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from morex.analysis.curves import MOST_LINES, active_share, agreement, entropy, look, losses, state_change, weights
from morex.analysis.measures import place, short
from morex.analysis.records import Analysis, ClassDepth, Missing
from morex.study.canvas import new_figure, write_figures
from morex.study.pictures import depth_bars
from morex.study.series import DEPTH_STOPS, HUES, ink_on

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NUMBERS = 16
"""Experts up to which the loads are written into the map."""
LEAST_SPAN = 0.02
"""Least span of an axis of drift, so that noise does not fill the panel."""
HIGHEST_LOAD = 2.0
"""Even shares at which the colours of the map end."""


def write_pictures(analysis: Analysis, folder: Path) -> list[Path]:
    """Draws every figure that there is something for. Raises ConfigError where matplotlib is missing."""
    drawings = {
        "expert-loads": expert_loads,
        "depth": depth,
        "depth-by-group": depth_by_group,
        "depth-by-class": depth_by_class,
        "depth-by-difficulty": depth_by_difficulty,
        "expert-steps": expert_steps,
        "accuracy": accuracy,
        "active-share": active_share,
        "agreement": agreement,
        "weights": weights,
        "losses": losses,
        "state-change": state_change,
        "entropy": entropy,
        "drift": drift,
    }
    return write_figures({name: partial(draw, analysis) for name, draw in drawings.items()}, folder)


def expert_loads(analysis: Analysis) -> "Figure | None":
    """A map of loads: a row for each choice of each expert layer, a column for each expert."""
    rows = [
        (place(layer, call.recursion, call.step), call.load)
        for layer in analysis.layers
        for call in layer.calls
        if call.load is not None
    ]
    if not rows:
        return None
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    experts = analysis.layers[0].experts
    loads = [[share * experts for share in load] for _, load in rows]
    figure, grid = new_figure(min(14, 3.4 + 0.55 * experts), 1.6 + 0.3 * len(rows))
    axes = grid[0][0]
    stops = [(1.0, 1.0, 1.0), *(tuple(channel / 255 for channel in stop) for stop in DEPTH_STOPS[1:])]
    colours = LinearSegmentedColormap.from_list("loads", stops)
    image = axes.imshow(loads, cmap=colours, vmin=0, vmax=HIGHEST_LOAD, aspect="auto")
    if experts <= MOST_NUMBERS:
        for y, load in enumerate(loads):
            for x, times in enumerate(load):
                ink = ink_on(to_hex(colours(min(times / HIGHEST_LOAD, 1))))
                axes.text(x, y, f"{times:.2f}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(experts) if experts <= MOST_NUMBERS else range(0, experts, max(1, experts // 8)))
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("expert")
    axes.set_title("Load of the experts")
    bar = figure.colorbar(image, ax=axes, extend="max", aspect=30)
    bar.outline.set_visible(False)
    bar.set_label("even shares")
    return figure


def depth(analysis: Analysis) -> "Figure | None":
    """Tokens at each depth."""
    report = analysis.depth
    if isinstance(report, Missing):
        return None
    total = sum(report.histogram)
    first = 0 if report.histogram[0] else 1
    levels = list(range(first, report.deepest + 1))
    heights = [100 * report.histogram[level] / total for level in levels]
    figure, grid = new_figure(max(4.6, 1.6 + 0.6 * len(levels)), 3.4)
    axes = grid[0][0]
    bars = axes.bar(levels, heights, width=0.72, color=HUES[0])
    axes.bar_label(bars, [f"{height:.1f}" if height else "0" for height in heights], padding=3, fontsize=8.5)
    axes.set_xticks(levels)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    axes.set_xlabel("recursions taken" + (", over all groups" if len(analysis.groups) > 1 else ""))
    axes.set_ylabel("share of the tokens, %")
    axes.set_title(f"How deep the tokens went: {report.mean:.2f} on average")
    return figure


def depth_by_group(analysis: Analysis) -> "Figure | None":
    """Depths in each routed group, the first at the top."""
    if isinstance(analysis.depth, Missing) or len(analysis.groups) < 2:
        return None
    groups = {f"{short(group.name)}, mean {_mean(group.depths):.2f}": group.depths for group in analysis.groups}
    return depth_bars(dict(reversed(groups.items())), "Depth by routed group")


def _mean(shares: Sequence[float]) -> float:
    return sum(level * share for level, share in enumerate(shares))


def depth_by_class(analysis: Analysis) -> "Figure | None":
    """Depths of each class of tokens, and of frequent and rare ones."""
    report = analysis.depth
    if isinstance(report, Missing):
        return None
    classes: dict[str, ClassDepth] = {}
    for found in (report.by_rarity, report.by_class):
        if not isinstance(found, Missing):
            classes |= dict(reversed(found.items()))
    if not classes:
        return None
    return depth_bars(_with_means(classes), "Depth by class")


def depth_by_difficulty(analysis: Analysis) -> "Figure | None":
    """Depths of the tokens in a task's examples, the easiest at the top."""
    report = analysis.depth
    if isinstance(report, Missing) or isinstance(report.by_difficulty, Missing) or len(report.by_difficulty) < 2:
        return None
    levels = {f"difficulty {level}": each for level, each in reversed(report.by_difficulty.items())}
    return depth_bars(_with_means(levels), "Depth by difficulty")


def _with_means(classes: Mapping[str, ClassDepth]) -> dict[str, tuple[float, ...]]:
    return {f"{name}, mean {each.mean:.2f}": each.shares for name, each in classes.items()}


def expert_steps(analysis: Analysis) -> "Figure | None":
    """Steps that tokens take inside the experts of each layer, the first layer at the top."""
    shares = {
        f"{place(layer, call.recursion, call.step)}, mean {call.mean_steps.mean:.2f}": call.steps
        for layer in reversed(analysis.layers)
        for call in reversed(layer.calls)
        if not isinstance(call.steps, Missing) and not isinstance(call.mean_steps, Missing)
    }
    if not shares:
        return None
    return depth_bars(
        shares,
        "Steps inside experts",
        lambda s: "1 step" if s == 1 else f"{s} steps",
        "tokens that come to the experts",
    )


def accuracy(analysis: Analysis) -> "Figure | None":
    """Accuracy on a task by difficulty, and with every token at each depth."""
    found = analysis.accuracy
    if isinstance(found, Missing):
        return None
    panels: list[tuple[Mapping[int, float], str, str]] = [
        (found.by_difficulty, f"Accuracy: {100 * found.accuracy:.1f} %", "difficulty")
    ]
    if not isinstance(found.by_depth, Missing):
        panels.append((found.by_depth, "Every token at one depth", "recursions"))
    figure, grid = new_figure(4.8 * len(panels), 3.6, columns=len(panels))
    for axes, (values, title, label) in zip(grid[0], panels, strict=True):
        bars = axes.bar(list(values), [100 * value for value in values.values()], width=0.72, color=HUES[0])
        if len(values) <= MOST_LINES:
            axes.bar_label(bars, [f"{100 * value:.0f}" for value in values.values()], padding=3, fontsize=8.5)
            axes.set_xticks(list(values))
        axes.set_xlim(min(values) - 0.8, max(values) + 0.8)
        axes.set_ylim(0, 108)
        axes.grid(axis="x", visible=False)
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.set_ylabel("right answers, %")
    return figure


def drift(analysis: Analysis) -> "Figure | None":
    """Routing over the training steps."""
    course = analysis.drift
    if isinstance(course, Missing):
        return None
    titles: dict[str, tuple[Mapping[str, Sequence[float]], str]] = {
        "Depth": (course.mean_depth, "recursions of a token"),
        "Steps inside experts": (course.mean_steps, "steps of a token"),
        "Expert load": (course.load_cv, "CV of the loads"),
        "Experts in use": (course.effective_experts, "effective experts"),
        "Router entropy": (course.entropy_share, "entropy over the largest"),
    }
    shown = {title: entry for title, entry in titles.items() if entry[0]}
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, grid = new_figure(max(4.8, 4.2 * columns), 3.6 * rows, columns, rows)
    for unused in grid.flat[len(shown) :]:
        unused.remove()
    for axes, (title, (series, label)) in zip(grid.flat, shown.items(), strict=False):
        for number, (name, values) in enumerate(series.items()):
            axes.plot(course.steps, values, label=short(name).removesuffix(".router"), **look(number, len(series)))
        axes.set_title(title)
        axes.set_ylabel(label)
        axes.set_xlabel("training step")
        axes.margins(x=0.02)
        axes.ticklabel_format(axis="y", useOffset=False)
        low, high = axes.get_ylim()
        room = max(0.0, LEAST_SPAN - (high - low)) / 2
        axes.set_ylim(low - room, high + room)
        if 1 < len(series) <= MOST_LINES:
            axes.legend(fontsize=8)
    return figure
