"""What the figures show, as plain numbers: one data layer under the plotly figures and the PNGs.

Colours come from the Okabe-Ito and Tol sets, which stay apart for colour-blind readers; dense variants are grey, and
every variant also has a dash and a marker of its own, so that a grey print can be read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from morex.study.records import Cell, Results, Row
from morex.study.units import human

Axis = Literal["tokens", "flops", "seconds"]
AXIS_TITLES: dict[Axis, tuple[str, str]] = {
    "tokens": ("tokens seen", ""),
    "flops": ("training FLOPs", "FLOP"),
    "seconds": ("seconds of training", "s"),
}
INK, FAINT, GRID = "#1c2430", "#5b6673", "#e6e9ee"
GREYS = ["#3d3d3d", "#8a8a8a", "#b0b0b0", "#636363"]
HUES = ["#0072b2", "#d55e00", "#009e73", "#aa4499", "#e69f00", "#56b4e9", "#882255", "#999933", "#332288", "#cc6677"]
DASHES = ("solid", "dash", "dot", "dashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "star", "cross")
DEPTH_STOPS = ((226, 238, 248), (128, 178, 219), (13, 60, 120))
TRAINING_POINTS = 120


@dataclass(frozen=True)
class Style:
    """How a variant is drawn, in every figure alike."""

    colour: str
    dash: str
    marker: str


@dataclass(frozen=True)
class Curve:
    """Held-out loss along an axis: mean over seeds, and the lowest and highest where there are several."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """A named point of a scatter figure."""

    name: str
    x: float
    y: float
    spread: float | None = None


@dataclass(frozen=True)
class Label:
    """A point's label: shift of its anchor from the point in pixels, and the side it grows to."""

    dx: float
    dy: float
    anchor: Literal["left", "right", "center"]


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    """A style per variant, by its place in the study."""
    found: dict[str, Style] = {}
    dense = others = 0
    for row in rows:
        if row.kind == "dense":
            index, palette = dense, GREYS
            dense += 1
        else:
            index, palette = others, HUES
            others += 1
        dash = DASHES[index // len(palette) % 4] if palette is HUES else DASHES[index % 4]
        found[row.name] = Style(palette[index % len(palette)], dash, MARKERS[(dense + others - 1) % len(MARKERS)])
    return found


def curves(results: Results, axis: Axis) -> list[Curve]:
    """Evaluations of every finished variant; seeds are joined by the order of their evaluations."""
    found = []
    for row in results.finished:
        cells = [cell for cell in results.cells_of(row) if cell.evaluations]
        count = min((len(cell.evaluations) for cell in cells), default=0)
        if not count:
            continue
        # Under a budget in seconds the last evaluations stand at different steps, but they are all the last.
        columns = [[cell.evaluations[: count - 1][i] for cell in cells] for i in range(count - 1)]
        columns.append([cell.evaluations[-1] for cell in cells])
        losses = [[point.val_loss for point in column] for column in columns]
        found.append(
            Curve(
                row.name,
                tuple(_mean([getattr(point, axis) for point in column]) for column in columns),
                tuple(_mean(column) for column in losses),
                tuple(min(column) for column in losses),
                tuple(max(column) for column in losses),
            )
        )
    return found


def training_curve(cell: Cell, axis: Axis) -> tuple[list[float], list[float]]:
    """Logged training losses of one cell, neighbours averaged so that at most 120 points remain."""
    size = max(1, math.ceil(len(cell.training) / TRAINING_POINTS))
    groups = [cell.training[start : start + size] for start in range(0, len(cell.training), size)]
    return (
        [_mean([getattr(point, axis) for point in group]) for group in groups],
        [_mean([point.loss for point in group]) for group in groups],
    )


def loss_range(all_curves: Sequence[Curve]) -> tuple[float, float]:
    """Loss axis that shows the end of training: from just below the best end, as far up as keeps the ends apart."""
    low = min(min(curve.low) for curve in all_curves)
    ends = max(curve.high[-1] for curve in all_curves)
    start = max(curve.high[0] for curve in all_curves)
    top = min(start, ends + max(1.2 * (ends - low), 0.06 * low))
    margin = 0.04 * max(top - low, 0.01)
    return low - margin, top + margin


def parameter_points(results: Results) -> list[Point]:
    """Unique non-embedding parameters against held-out loss."""
    return [
        Point(row.name, row.unique_non_embedding, row.val_loss, row.val_loss_spread)
        for row in results.finished
        if row.unique_non_embedding and row.val_loss is not None
    ]


def cost_points(results: Results) -> list[Point]:
    """Training FLOPs and seconds per token, each as a multiple of the reference variant's."""
    base = results.row(results.reference)
    if not base.train_flops_per_token or not base.tokens_per_s:
        return []
    return [
        Point(row.name, row.train_flops_per_token / base.train_flops_per_token, base.tokens_per_s / row.tokens_per_s)
        for row in results.finished
        if row.train_flops_per_token and row.tokens_per_s
    ]


def depth_shares(results: Results, row: Row) -> list[float] | None:
    """Share of the held-out tokens at 0, 1, ... recursions, over all seeds; None without a depth router."""
    histograms = [c.measures.routing.histogram for c in results.cells_of(row) if c.measures.routing]
    present = [histogram for histogram in histograms if histogram]
    if not present:
        return None
    counts = [sum(column) for column in zip(*present, strict=True)]
    return [count / max(1, sum(counts)) for count in counts]


def expert_loads(results: Results, row: Row) -> dict[str, list[float]]:
    """Share of each expert by the number of its layer, averaged over seeds."""
    routings = [cell.measures.routing for cell in results.cells_of(row) if cell.measures.routing]
    layers = list(routings[0].expert_load) if routings else []
    return {
        f"{number}": [_mean(column) for column in zip(*(r.expert_load[layer] for r in routings), strict=True)]
        for number, layer in enumerate(layers, start=1)
    }


def depth_colour(depth: int, deepest: int) -> str:
    """Light for few recursions, dark for many; white for none."""
    if depth <= 0:
        return "#ffffff"
    place = (depth - 1) / (deepest - 1) * (len(DEPTH_STOPS) - 1) if deepest > 1 else len(DEPTH_STOPS) - 1.0
    left = min(int(place), len(DEPTH_STOPS) - 2)
    channels = zip(DEPTH_STOPS[left], DEPTH_STOPS[left + 1], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - left)):02x}" for a, b in channels)


def ink_on(colour: str) -> str:
    """Black or white text, whichever has more contrast on a background: at least 4.5 by WCAG relative luminance."""
    red, green, blue = (_linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4


def mixed(colour: str, share: float) -> str:
    """`colour` mixed with white, `share` of the colour."""
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - (255 - channel) * share):02x}" for channel in channels)


def loss_text(row: Row) -> str:
    """`4.123`, or `4.123 ± 0.010` with the spread over seeds."""
    spread = f" ± {row.val_loss_spread:.3f}" if row.val_loss_spread is not None else ""
    return f"{row.val_loss:.3f}{spread}"


def ranges(points: Sequence[Point], log: bool) -> tuple[list[float], list[float]]:
    """Axis ranges with room for labels; the x range in powers of ten for a log axis."""
    xs = [math.log10(point.x) if log else point.x for point in points]
    ys = [value for p in points for value in (p.y - (p.spread or 0), p.y + (p.spread or 0))]
    if not log:
        return [0, max(xs) * 1.25], [0, max(ys) * 1.15]
    x_room, y_room = max(max(xs) - min(xs), 0.2), max(max(ys) - min(ys), 0.02)
    return (
        [min(xs) - 0.22 * x_room, max(xs) + 0.22 * x_room],
        [min(ys) - 0.14 * y_room, max(ys) + 0.14 * y_room],
    )


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Ticks (value, text) of a log axis between two powers of ten: the roundest numbers of which there are three."""
    ticks: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), [1 + step / 10 for step in range(90)]):
        powers = range(math.floor(low), math.ceil(high) + 1)
        ticks = [step * 10.0**power for power in powers for step in steps if low <= math.log10(step) + power <= high]
        if len(ticks) > 2:
            break
    return [(tick, human(tick, significant=2 if tick != float(f"{tick:.0e}") else 1)) for tick in ticks]


def units_of(prefix: str, unit: str) -> str:
    """`, MB`, or nothing where the numbers are plain."""
    words = {"k": "thousands", "M": "millions", "G": "billions", "T": "trillions"}
    if not unit:
        return f", {words.get(prefix, prefix)}" if prefix else ""
    return f", {prefix}{unit}" if unit != "s" else ""


def recursions_text(level: int) -> str:
    """`1 recursion`, `2 recursions`."""
    return f"{level} recursion" if level == 1 else f"{level} recursions"


def visible(text: str) -> str:
    """Text without control characters, line ends apart."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text.expandtabs(2))


def place_labels(
    points: Sequence[tuple[float, float]], names: Sequence[str], size: tuple[float, float], font: float = 12.0
) -> list[Label]:
    """Places for labels beside points, greedily, so that they cover neither points nor one another.

    Args:
        points: pixel positions, y downwards, in a plot of `size` (width, height).
        names: the labels.
        font: height of the text in pixels.
    """
    gap, height = 9.0, font * 1.25
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    chosen: list[Label] = []
    for (x, y), name in zip(points, names, strict=True):
        width = 0.58 * font * len(name)
        options = [
            Label(gap, 0, "left"),
            Label(-gap, 0, "right"),
            Label(0, -gap - height / 2, "center"),
            Label(0, gap + height / 2, "center"),
        ]
        for rise in (1.0, 1.8, 2.6):
            for sign in (-1, 1):
                options += [Label(gap, sign * rise * height, "left"), Label(-gap, sign * rise * height, "right")]

        def cost(option: Label, x: float = x, y: float = y, width: float = width) -> float:
            box = _box(x, y, width, height, option)
            overlap = sum(_overlap(box, other) for other in taken)
            outside = max(0, -box[0]) + max(0, box[2] - size[0]) + max(0, -box[1]) + max(0, box[3] - size[1])
            return overlap + 50 * outside + 0.02 * (abs(option.dx) + abs(option.dy))

        best = min(options, key=cost)
        chosen.append(best)
        taken.append(_box(x, y, width, height, best))
    return chosen


def _box(x: float, y: float, width: float, height: float, label: Label) -> tuple[float, float, float, float]:
    left = x + label.dx - {"left": 0.0, "center": width / 2, "right": width}[label.anchor]
    middle = y + label.dy
    return left, middle - height / 2, left + width, middle + height / 2


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
