"""The PNGs of a study, drawn by matplotlib from the same numbers and colours as the report."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morex.study.canvas import new_figure, write_figures
from morex.study.records import Results
from morex.study.series import (
    AXIS_TITLES,
    FAINT,
    INK,
    Axis,
    Point,
    Style,
    cost_points,
    curves,
    depth_colour,
    depth_shares,
    expert_loads,
    ink_on,
    log_ticks,
    loss_range,
    loss_text,
    mixed,
    parameter_points,
    place_labels,
    ranges,
    recursions_text,
    styles,
    training_curve,
    units_of,
)
from morex.study.typeset import depth_map, samples
from morex.study.units import digits, scale_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES: dict[str, Any] = {"solid": "-", "dash": (0, (5, 2)), "dot": (0, (1.2, 1.5)), "dashdot": (0, (5, 1.6, 1.2, 1.6))}
Looks = dict[str, Style]
MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "x": "X",
    "triangle-down": "v",
    "star": "*",
    "cross": "P",
}


def write_pictures(results: Results, folder: Path) -> list[Path]:
    """Draws every picture that these results allow into `folder`. Raises ConfigError where matplotlib is missing."""
    looks = styles(results.rows)
    return write_figures({name: partial(draw, results, looks) for name, draw in PICTURES.items()}, folder)


def _loss(results: Results, looks: Looks) -> "Figure | None":
    """Held-out loss against tokens, FLOPs and seconds."""
    if not any(len(curve.x) > 1 for curve in curves(results, "tokens")):
        return None
    figure, grid = new_figure(13, 4.6, columns=3, sharey=True)
    titles: dict[Axis, str] = {
        "tokens": "Against tokens",
        "flops": "Against training FLOPs",
        "seconds": "Against time",
    }
    for axes, (axis, title) in zip(grid[0], titles.items(), strict=True):
        _loss_panel(axes, results, looks, axis)
        axes.set_title(title)
    grid[0][0].set_ylabel("held-out loss, nats per token")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), handlelength=2.6)
    return figure


def _loss_panel(axes: "Axes", results: Results, looks: Looks, axis: Axis) -> None:
    found = [curve for curve in curves(results, axis) if len(curve.x) > 1]
    prefix, divisor = scale_for([max(curve.x) for curve in found])
    title, unit = AXIS_TITLES[axis]
    if axis == "seconds":
        prefix, divisor = "", 1.0
    for curve in found:
        look = looks[curve.name]
        x, y = training_curve(results.cells_of(results.row(curve.name))[0], axis)
        axes.plot([v / divisor for v in x], y, color=mixed(look.colour, 0.28), linewidth=0.7, zorder=1)
        places = [v / divisor for v in curve.x]
        if curve.high != curve.low:
            axes.fill_between(places, curve.low, curve.high, color=look.colour, alpha=0.15, linewidth=0, zorder=2)
        axes.plot(
            places,
            curve.y,
            color=look.colour,
            linestyle=DASHES[look.dash],
            marker=MARKERS[look.marker],
            markersize=4.5,
            linewidth=1.8,
            label=curve.name,
            zorder=3,
        )
    axes.set_ylim(*loss_range(found))
    axes.set_xlim(left=0)
    axes.set_xlabel(title + units_of(prefix, unit))


def _ranking(results: Results, looks: Looks) -> "Figure | None":
    rows = sorted(results.finished, key=lambda row: row.val_loss or 0.0, reverse=True)
    if not rows:
        return None
    figure, grid = new_figure(8, 1.1 + 0.34 * len(rows))
    axes = grid[0][0]
    for place, row in enumerate(rows):
        look = looks[row.name]
        if row.val_loss_oracle is not None:
            axes.plot(
                row.val_loss_oracle,
                place,
                MARKERS[look.marker],
                color=look.colour,
                markerfacecolor="white",
                markersize=7,
            )
        axes.errorbar(
            row.val_loss,
            place,
            xerr=row.val_loss_spread,
            color=look.colour,
            marker=MARKERS[look.marker],
            markersize=8,
            capsize=3,
            linewidth=1.4,
        )
        axes.annotate(loss_text(row), (1.015, place), xycoords=("axes fraction", "data"), va="center")
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.margins(x=0.08, y=0.06)
    axes.set_xlabel("held-out loss, nats per token")
    hollow = any(row.val_loss_oracle is not None for row in rows)
    axes.set_title("Where they ended" + (" (hollow: oracle routing)" if hollow else ""))
    return figure


def _scatter(axes: "Axes", points: list[Point], looks: Looks, log: bool) -> None:
    x_range, y_range = ranges(points, log)
    for point in points:
        look = looks[point.name]
        axes.errorbar(
            point.x,
            point.y,
            yerr=point.spread,
            color=look.colour,
            marker=MARKERS[look.marker],
            markersize=8,
            linewidth=1.1,
            capsize=2,
        )
    if log:
        axes.set_xscale("log")
        axes.set_xlim(10 ** x_range[0], 10 ** x_range[1])
        axes.set_xticks(*zip(*log_ticks(*x_range), strict=True))
        axes.set_xticks([], minor=True)
    else:
        axes.set_xlim(*x_range)
    axes.set_ylim(*y_range)
    figure = axes.get_figure()
    assert figure is not None
    figure.canvas.draw()
    area = axes.get_window_extent()
    pixels = [axes.transData.transform((point.x, point.y)) for point in points]
    scale = figure.dpi / 72
    places = [((x - area.x0) / scale, (area.height - (y - area.y0)) / scale) for x, y in pixels]
    labels = place_labels(places, [p.name for p in points], (area.width / scale, area.height / scale), font=9.0)
    for point, label in zip(points, labels, strict=True):
        axes.annotate(
            point.name,
            (point.x, point.y),
            xytext=(label.dx, -label.dy),
            textcoords="offset points",
            ha=label.anchor,
            va="center",
            fontsize=9,
        )


def _parameters(results: Results, looks: Looks) -> "Figure | None":
    points = parameter_points(results)
    if len(points) < 2:
        return None
    figure, grid = new_figure(7, 4.6)
    axes = grid[0][0]
    axes.set_title("Parameters against loss")
    axes.set_xlabel("parameters without embeddings, shared weights once")
    axes.set_ylabel("held-out loss, nats per token")
    _scatter(axes, points, looks, log=True)
    return figure


def _cost(results: Results, looks: Looks) -> "Figure | None":
    points = cost_points(results)
    if len(points) < 2:
        return None
    figure, grid = new_figure(7, 4.6)
    axes = grid[0][0]
    axes.set_title("Arithmetic against the clock")
    axes.set_xlabel(f"FLOPs per training token, {results.reference} = 1")
    axes.set_ylabel(f"time per training token, {results.reference} = 1")
    axes.axline((0, 0), slope=1, color="#9aa4b0", linewidth=1, linestyle=DASHES["dot"], zorder=1)
    _scatter(axes, points, looks, log=False)
    return figure


def _bars(panels: tuple[tuple[str, str, str], ...]) -> Callable[[Results, Looks], "Figure | None"]:
    """A picture of bar panels side by side; each is (key, title, unit)."""

    def draw(results: Results, looks: Looks) -> "Figure | None":
        shown = [panel for panel in panels if any(getattr(row, panel[0]) is not None for row in results.finished)]
        if not shown:
            return None
        figure, grid = new_figure(5.2 * len(shown), 1.2 + 0.33 * len(results.finished), columns=len(shown))
        for axes, (key, title, unit) in zip(grid[0], shown, strict=True):
            rows = [row for row in reversed(results.finished) if getattr(row, key) is not None]
            values = [float(getattr(row, key)) for row in rows]
            prefix, divisor = scale_for(values)
            bars = axes.barh(
                [row.name for row in rows],
                [v / divisor for v in values],
                color=[looks[r.name].colour for r in rows],
                height=0.66,
            )
            axes.bar_label(bars, [digits(v / divisor) for v in values], padding=4)
            axes.set_xlim(0, max(values) / divisor * 1.16 or 1.0)
            axes.grid(axis="y", visible=False)
            axes.set_title(title)
            axes.set_xlabel(f"{prefix}{' ' if prefix and unit == 'tokens/s' else ''}{unit}")
        return figure

    return draw


def _depth(results: Results, looks: Looks) -> "Figure | None":
    shares = {row.name: found for row in reversed(results.finished) if (found := depth_shares(results, row))}
    if not shares:
        return None
    return depth_bars(shares, "How deep the tokens went")


def depth_bars(
    shares: Mapping[str, Sequence[float]],
    title: str,
    named: Callable[[int], str] = recursions_text,
    total: str = "held-out tokens",
) -> "Figure":
    """A bar for each name, from bottom to top, of its shares at 0, 1, ... recursions.

    Args:
        named: text of a level for the legend.
        total: what the shares are of.
    """
    deepest = max(map(len, shares.values())) - 1
    figure, grid = new_figure(8, 1.5 + 0.4 * len(shares))
    axes = grid[0][0]
    left = [0.0] * len(shares)
    columns = [
        [100 * share[level] if level < len(share) else 0.0 for share in shares.values()] for level in range(deepest + 1)
    ]
    taken = [level for level, values in enumerate(columns) if any(values)]
    for level in taken:
        values = columns[level]
        colour = depth_colour(level, deepest)
        bars = axes.barh(
            list(shares),
            values,
            left=left,
            color=colour,
            edgecolor="#9fb0c0",
            linewidth=0.6,
            height=0.68,
            label=named(level) if level == taken[-1] else str(level),  # once is enough, and many fit
        )
        axes.bar_label(bars, [f"{v:.0f}" if v >= 4 else "" for v in values], label_type="center", color=ink_on(colour))
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"share of the {total}, %")
    axes.set_title(title)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.01, 0.985),
        ncols=deepest + 1,
        handlelength=1.5,
        columnspacing=1.2,
        borderpad=0,
    )
    return figure


def _experts(results: Results, looks: Looks) -> "Figure | None":
    found = {row.name: loads for row in results.finished if (loads := expert_loads(results, row))}
    if not found:
        return None
    figure, grid = new_figure(4.6 * len(found), 3.1, columns=len(found))
    for axes, (name, loads) in zip(grid[0], found.items(), strict=True):
        number = max(map(len, loads.values()))
        for e in range(number):
            places = [layer + (e - (number - 1) / 2) * 0.8 / number for layer in range(len(loads))]
            heights = [100 * load[e] if e < len(load) else 0.0 for load in loads.values()]
            colour = mixed(looks[name].colour, 1 - 0.7 * e / max(1, number - 1))
            axes.bar(places, heights, width=0.74 / number, color=colour)
        axes.axhline(100 / number, color=INK, linewidth=1, linestyle=DASHES["dot"])
        axes.set_xticks(range(len(loads)), list(loads))
        axes.grid(axis="x", visible=False)
        axes.set_title(name)
        axes.set_xlabel("layer")
    grid[0][0].set_ylabel("share of the work, %")
    figure.text(0.995, 0.99, "a bar per expert; dotted: an even share", ha="right", va="top", color=FAINT, fontsize=8.5)
    return figure


PICTURES: dict[str, Callable[[Results, Looks], "Figure | None"]] = {
    "loss": _loss,
    "ranking": _ranking,
    "parameters": _parameters,
    "cost": _cost,
    "speed": _bars(
        (("tokens_per_s", "Training speed", "tokens/s"), ("decode_tokens_per_s", "Decoding speed", "tokens/s"))
    ),
    "memory": _bars(
        (("peak_memory_bytes", "Peak memory of training", "B"), ("kv_bytes_per_token", "KV cache per token", "B"))
    ),
    "depth": _depth,
    "depth-map": depth_map,
    "experts": _experts,
    "samples": samples,
}
