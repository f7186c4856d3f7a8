"""The report's figures as plotly data: plain dictionaries, drawn in the browser by the plotly.js in the page.

Legends, titles and captions are the page's, shared by all figures; a trace's `meta` names its variant, so that the
page can fade it.
"""

import math
from collections.abc import Sequence
from typing import Any

from morex.study.records import Results, Row
from morex.study.series import (
    AXIS_TITLES,
    FAINT,
    GRID,
    INK,
    Axis,
    Curve,
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
from morex.study.units import digits, human, scale_for

Figure = dict[str, Any]
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


def figures(results: Results) -> dict[str, Figure]:
    """All figures that these results allow, by name."""
    looks = styles(results.rows)
    found: dict[str, Figure | None] = {
        "ranking": ranking(results, looks),
        **{f"loss_{axis}": loss(results, looks, axis) for axis in AXIS_TITLES},
        "parameters": scatter(
            parameter_points(results), looks, "parameters without embeddings, shared weights once", "loss", log=True
        ),
        "cost": cost(results, looks),
        "train_speed": bars(results, looks, "tokens_per_s", "training tokens per second"),
        "decode_speed": bars(results, looks, "decode_tokens_per_s", "decoded tokens per second, one sequence"),
        "memory": bars(results, looks, "peak_memory_bytes", "peak memory of training", "B"),
        "kv": bars(results, looks, "kv_bytes_per_token", "KV cache per token", "B"),
        "depth": depth(results),
        **{f"experts_{row.name}": experts(results, row, looks[row.name]) for row in results.finished},
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def ranking(results: Results, looks: dict[str, Style]) -> Figure | None:
    """Held-out loss of every variant, best on top, with the spread over seeds and the oracle's loss."""
    rows = sorted(results.finished, key=lambda row: row.val_loss or 0.0, reverse=True)
    if not rows:
        return None
    values = [v for row in rows for v in (row.val_loss, row.val_loss_oracle) if v is not None]
    spread = max((row.val_loss_spread or 0.0) for row in rows)
    low, high = min(values) - spread, max(values) + spread
    room = 0.06 * max(high - low, 0.01)
    layout = _layout(height=70 + 34 * len(rows), left=None)
    layout["xaxis"] |= {"title": _title("held-out loss, nats per token"), "range": [low - room, high + room]}
    layout["yaxis"] |= {"type": "category", "showgrid": True, "automargin": True, "ticksuffix": "  "}
    layout["margin"]["r"] = 108 if spread else 58
    note = {"xref": "paper", "x": 1, "xanchor": "left", "xshift": 10, "showarrow": False, "name": "fixed"}
    layout["annotations"] = [
        note | {"y": row.name, "text": loss_text(row), "font": {"size": 12.5, "color": INK}} for row in rows
    ]
    return {"data": [mark for row in rows for mark in _end_marks(row, looks[row.name])], "layout": layout}


def _end_marks(row: Row, look: Style) -> list[dict[str, Any]]:
    """The oracle's loss, hollow, and over it the causal loss with its spread."""
    common = {"type": "scatter", "y": [row.name], "meta": row.name, "mode": "markers"}
    spread = row.val_loss_spread
    marks: list[dict[str, Any]] = []
    if row.val_loss_oracle is not None:
        rim = {"color": look.colour, "width": 2}
        marks.append(
            common
            | {
                "x": [row.val_loss_oracle],
                "marker": {"color": "#ffffff", "symbol": look.marker, "size": 9, "line": rim},
                "hovertemplate": f"{row.name}, oracle routing<br>%{{x:.4f}}<extra></extra>",
            }
        )
    said = f" ± {spread:.4f}" if spread is not None else ""
    marks.append(
        common
        | {
            "x": [row.val_loss],
            "marker": {"color": look.colour, "symbol": look.marker, "size": 12},
            "error_x": {"type": "data", "array": [spread or 0], "visible": bool(spread), "color": look.colour},
            "hovertemplate": f"{row.name}<br>held-out loss %{{x:.4f}}{said}<extra></extra>",
        }
    )
    return marks


def loss(results: Results, looks: dict[str, Style], axis: Axis) -> Figure | None:
    """Held-out loss along an axis, training losses faint behind it."""
    found = [curve for curve in curves(results, axis) if len(curve.x) > 1]
    if not found:
        return None
    prefix, divisor = scale_for([max(curve.x) for curve in found])
    title, unit = AXIS_TITLES[axis]
    if axis == "seconds":
        prefix, divisor = "", 1.0
    faint, bands, lines = [], [], []
    for curve in found:
        look = looks[curve.name]
        cell = results.cells_of(results.row(curve.name))[0]
        x, y = training_curve(cell, axis)
        faint.append(
            _line(curve.name, [v / divisor for v in x], y, {"color": mixed(look.colour, 0.28), "width": 1})
            | {"hoverinfo": "skip"}
        )
        if curve.high != curve.low:
            bands.append(_band(curve, divisor, look))
        lines.append(
            _line(
                curve.name,
                [v / divisor for v in curve.x],
                curve.y,
                {"color": look.colour, "dash": look.dash, "width": 2.2},
            )
            | {
                "mode": "lines+markers",
                "marker": {"symbol": look.marker, "size": 6},
                "hovertemplate": f"{curve.name}: %{{y:.3f}}<extra></extra>",
            }
        )
    layout = _layout(height=340)
    layout["xaxis"] |= {"title": _title(f"{title}{units_of(prefix, unit)}"), "rangemode": "tozero"}
    layout["yaxis"] |= {"title": _title("loss, nats per token"), "range": list(loss_range(found))}
    layout["hovermode"] = "x unified" if axis == "tokens" else "closest"
    return {"data": [*faint, *bands, *lines], "layout": layout}


def scatter(points: Sequence[Point], looks: dict[str, Style], x_title: str, y_title: str, log: bool) -> Figure | None:
    """Named points, labels placed so that they do not meet."""
    if len(points) < 2:
        return None
    traces = [
        {
            "type": "scatter",
            "x": [point.x],
            "y": [point.y],
            "meta": point.name,
            "mode": "markers",
            "marker": {"color": looks[point.name].colour, "symbol": looks[point.name].marker, "size": 12},
            "error_y": {"type": "data", "array": [point.spread or 0], "visible": bool(point.spread), "thickness": 1.2},
            "hovertemplate": f"{point.name}<br>%{{x:.4s}} {x_title}<br>%{{y:.4g}} {y_title}<extra></extra>",
        }
        for point in points
    ]
    layout = _layout(height=380)
    x_range, y_range = ranges(points, log)
    layout["xaxis"] |= {"title": _title(x_title), "range": x_range}
    if log:
        ticks = log_ticks(*x_range)
        layout["xaxis"] |= {
            "type": "log",
            "tickvals": [value for value, _ in ticks],
            "ticktext": [text for _, text in ticks],
        }
    layout["yaxis"] |= {"title": _title(y_title), "range": y_range}
    layout["annotations"] = _labels(points, x_range, y_range, log)
    return {"data": traces, "layout": layout}


def cost(results: Results, looks: dict[str, Style]) -> Figure | None:
    """Arithmetic against the clock, as multiples of the reference; on the diagonal all time is explained by FLOPs."""
    points = cost_points(results)
    name = results.reference
    figure = scatter(
        points, looks, f"FLOPs per training token, {name} = 1", f"time per training token, {name} = 1", False
    )
    if figure is None:
        return None
    top = max(figure["layout"]["xaxis"]["range"][1], figure["layout"]["yaxis"]["range"][1])
    figure["data"].insert(
        0,
        _line("", [0, top], [0, top], {"color": "#9aa4b0", "width": 1.2, "dash": "dot"}) | {"hoverinfo": "skip"},
    )
    return figure


def bars(results: Results, looks: dict[str, Style], key: str, title: str, unit: str = "") -> Figure | None:
    """One bar per variant, in the order of the study, first on top."""
    rows = [row for row in reversed(results.finished) if getattr(row, key) is not None]
    if not rows:
        return None
    values = [float(getattr(row, key)) for row in rows]
    prefix, divisor = scale_for(values)
    layout = _layout(height=64 + 27 * len(rows), left=None)
    layout["xaxis"] |= {
        "title": _title(f"{title}{units_of(prefix, unit)}"),
        "rangemode": "tozero",
        "range": [0, max(values) / divisor * 1.16],
    }
    layout["yaxis"] |= {"type": "category", "showgrid": False, "automargin": True, "ticksuffix": "  "}
    layout["bargap"] = 0.35
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "x": [value / divisor],
            "y": [row.name],
            "meta": row.name,
            "marker": {"color": looks[row.name].colour},
            "text": [digits(value / divisor)],
            "textposition": "outside",
            "cliponaxis": False,
            "textfont": {"size": 12, "color": INK},
            "hovertemplate": f"{row.name}<br>{human(value, unit)}<extra></extra>",
        }
        for row, value in zip(rows, values, strict=True)
    ]
    return {"data": traces, "layout": layout}


def depth(results: Results) -> Figure | None:
    """How many recursions the held-out tokens took, per routed variant: one bar split by depth."""
    shares = {row.name: found for row in reversed(results.finished) if (found := depth_shares(results, row))}
    if not shares:
        return None
    deepest = max(len(values) for values in shares.values()) - 1
    traces = []
    for level in range(deepest + 1):
        values = [share[level] if level < len(share) else 0.0 for share in shares.values()]
        if not any(values):
            continue
        colour = depth_colour(level, deepest)
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "x": [100 * value for value in values],
                "y": list(shares),
                "name": f"{level}",
                "marker": {"color": colour, "line": {"color": "#9fb0c0", "width": 0.6}},
                "text": [f"{100 * value:.0f}" if value >= 0.04 else "" for value in values],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "textangle": 0,
                "textfont": {"size": 12, "color": ink_on(colour)},
                "hovertemplate": f"%{{y}}<br>{recursions_text(level)}: %{{x:.1f}} %<extra></extra>",
            }
        )
    layout = _layout(height=96 + 34 * len(shares), left=None)
    layout |= {"barmode": "stack", "bargap": 0.3, "showlegend": True}
    layout["legend"] |= {"title": {"text": "recursions  "}, "traceorder": "normal"}
    layout["xaxis"] |= {"title": _title("share of the held-out tokens, %"), "range": [0, 100]}
    layout["yaxis"] |= {"type": "category", "showgrid": False, "automargin": True, "ticksuffix": "  "}
    return {"data": traces, "layout": layout}


def experts(results: Results, row: Row, look: Style) -> Figure | None:
    """Share of the work that each expert does, by layer, beside the even share."""
    loads = expert_loads(results, row)
    if not loads:
        return None
    number = max(len(load) for load in loads.values())
    traces = [
        {
            "type": "bar",
            "x": list(loads),
            "y": [100 * load[e] if e < len(load) else None for load in loads.values()],
            "name": f"expert {e + 1}",
            "meta": row.name,
            "marker": {"color": mixed(look.colour, 1 - 0.7 * e / max(1, number - 1))},
            "hovertemplate": f"layer %{{x}}, expert {e + 1}: %{{y:.1f}} %<extra></extra>",
        }
        for e in range(number)
    ]
    layout = _layout(height=260)
    layout |= {"barmode": "group", "bargap": 0.25, "showlegend": number <= 8}
    layout["xaxis"] |= {"type": "category", "showgrid": False, "title": _title("layer")}
    layout["yaxis"] |= {"title": _title("share of the work, %"), "rangemode": "tozero"}
    even = 100 / number
    layout["shapes"] = [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": even,
            "y1": even,
            "line": {"color": INK, "width": 1, "dash": "dot"},
        }
    ]
    return {"data": traces, "layout": layout}


def _labels(points: Sequence[Point], x_range: list[float], y_range: list[float], log: bool) -> list[dict[str, Any]]:
    size = (430.0, 300.0)
    places = [
        (
            ((math.log10(point.x) if log else point.x) - x_range[0]) / (x_range[1] - x_range[0]) * size[0],
            (1 - (point.y - y_range[0]) / (y_range[1] - y_range[0])) * size[1],
        )
        for point in points
    ]
    labels = place_labels(places, [point.name for point in points], size)
    return [
        {
            "x": math.log10(point.x) if log else point.x,
            "y": point.y,
            "text": point.name,
            "showarrow": False,
            "xanchor": label.anchor,
            "yanchor": "middle",
            "xshift": label.dx,
            "yshift": -label.dy,
            "font": {"size": 12, "color": INK},
            "name": point.name,
        }
        for point, label in zip(points, labels, strict=True)
    ]


def _line(name: str, x: Sequence[float], y: Sequence[float], line: dict[str, Any]) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines", "x": list(x), "y": list(y), "line": line, "meta": name, "name": name}


def _band(curve: Curve, divisor: float, look: Style) -> dict[str, Any]:
    """From the lowest to the highest seed."""
    x = [value / divisor for value in curve.x]
    trace = _line(curve.name, [*x, *reversed(x)], [*curve.high, *reversed(curve.low)], {"width": 0})
    return trace | {"fill": "toself", "fillcolor": f"{look.colour}26", "hoverinfo": "skip"}


def _layout(height: int, left: int | None = 58) -> dict[str, Any]:
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": "#c4cbd4",
        "showline": True,
        "ticks": "outside",
        "tickcolor": "#c4cbd4",
        "ticklen": 4,
        "automargin": True,
        "fixedrange": True,
    }
    return {
        "height": height,
        "margin": {"l": 12 if left is None else left, "r": 16, "t": 10, "b": 4},
        "font": {"family": FONT, "size": 12.5, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
        "hoverlabel": {"font": {"family": FONT, "size": 12}},
        "xaxis": dict(axis),
        "yaxis": dict(axis),
    }


def _title(text: str) -> dict[str, Any]:
    return {"text": text, "font": {"size": 12.5, "color": FAINT}, "standoff": 10}
