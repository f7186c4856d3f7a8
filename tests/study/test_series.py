"""The numbers and places under the figures."""

import random

import pytest

from morex.study.series import (
    HUES,
    Label,
    cost_points,
    curves,
    depth_colour,
    depth_shares,
    expert_loads,
    ink_on,
    log_ticks,
    loss_range,
    mixed,
    parameter_points,
    place_labels,
    styles,
    training_curve,
)
from study.helpers import family, make_results, variant


def test_every_variant_has_a_look_of_its_own() -> None:
    many = [variant(f"v{i}", "dense" if i < 4 else "routed", 2.0) for i in range(24)]
    looks = styles(make_results(*many).rows)
    assert len(set(looks.values())) == 24
    dense = [looks[f"v{i}"].colour for i in range(4)]
    assert all(red == green == blue for red, green, blue in ((c[1:3], c[3:5], c[5:7]) for c in dense))
    assert len(set(dense)) == 4
    assert [looks[f"v{i}"].colour for i in range(4, 14)] == list(HUES)


def luminance(colour: str) -> float:
    def linear(channel: float) -> float:
        return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("deepest", [1, 2, 3, 4, 8])
def test_depth_goes_from_light_to_dark_and_can_be_read(deepest: int) -> None:
    colours = [depth_colour(depth, deepest) for depth in range(deepest + 1)]
    assert colours[0] == "#ffffff"
    shades = [luminance(colour) for colour in colours]
    assert shades == sorted(shades, reverse=True)
    assert len(set(colours)) == deepest + 1
    for colour in colours:
        light, dark = sorted((luminance(colour) + 0.05, luminance(ink_on(colour)) + 0.05), reverse=True)
        assert light / dark >= 4.5


def test_mixing_with_white() -> None:
    assert mixed("#000000", 1.0) == "#000000"
    assert mixed("#000000", 0.0) == "#ffffff"
    assert mixed("#0080ff", 0.5) == "#80c0ff"


def test_curves_are_means_with_their_range() -> None:
    found = {curve.name: curve for curve in curves(family(), "tokens")}
    dense = found["dense"]
    assert dense.x == (200, 400, 600, 800, 1000)
    assert dense.y[-1] == pytest.approx(2.01)
    assert (dense.low[-1], dense.high[-1]) == (2.00, 2.02)
    assert {curve.name: curve.x[-1] for curve in curves(family(), "flops")}["routed"] == pytest.approx(7.5e8)
    assert {curve.name: curve.x[-1] for curve in curves(family(), "seconds")}["experts"] == 25


def test_training_curves_are_thinned() -> None:
    cell = make_results(variant("a", "dense", 2.0)).cells[0]
    x, y = training_curve(cell, "tokens")
    assert len(x) == len(y) == 100
    long = cell.model_copy(update={"training": cell.training * 5})
    assert len(training_curve(long, "tokens")[0]) == 100


def test_the_loss_axis_keeps_the_ends_apart() -> None:
    found = curves(family(), "tokens")
    low, high = loss_range(found)
    assert low < 1.90
    assert 2.32 < high < max(curve.high[0] for curve in found)


def test_points() -> None:
    points = {point.name: point for point in parameter_points(family())}
    assert (points["experts"].x, points["experts"].y) == (6_000_000, pytest.approx(1.91))
    assert points["experts"].spread == pytest.approx(0.01)
    cost = {point.name: (point.x, point.y) for point in cost_points(family())}
    assert cost["dense"] == (1.0, 1.0)
    assert cost["experts"] == (2.0, 2.5)


def test_depths_and_loads() -> None:
    results = family()
    assert depth_shares(results, results.row("routed")) == pytest.approx([0, 0.2, 0.6, 0.2])
    assert depth_shares(results, results.row("loop")) is None
    loads = expert_loads(results, results.row("experts"))
    assert list(loads) == ["1", "2"]
    assert loads["1"] == pytest.approx([0.5, 0.3, 0.2])
    assert expert_loads(results, results.row("dense")) == {}


def box(x: float, y: float, name: str, label: Label) -> tuple[float, float, float, float]:
    width, height = 0.58 * 12 * len(name), 15
    left = x + label.dx - {"left": 0.0, "center": width / 2, "right": width}[label.anchor]
    return left, y + label.dy - height / 2, left + width, y + label.dy + height / 2


@pytest.mark.parametrize("seed", range(5))
def test_labels_do_not_meet(seed: int) -> None:
    draw = random.Random(seed)
    points = [(draw.uniform(60, 440), draw.uniform(30, 270)) for _ in range(9)]
    points[1] = (points[0][0] + 2, points[0][1] + 3)  # two that nearly coincide
    names = [f"variant-{i}" for i in range(9)]
    boxes = [
        box(x, y, n, label)
        for (x, y), n, label in zip(points, names, place_labels(points, names, (500, 300)), strict=True)
    ]
    for i, one in enumerate(boxes):
        assert one[0] >= 0
        assert one[2] <= 500
        for other in boxes[:i]:
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            assert apart, (one, other)


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (4.9, 8.1, ["100 k", "1 M", "10 M", "100 M"]),
        (5.6, 7.2, ["500 k", "1 M", "2 M", "5 M", "10 M"]),
        (5.7, 6.2, ["700 k", "1 M", "1.5 M"]),
        (5.995, 6.12, ["990 k", "1 M", "1.1 M", "1.2 M", "1.3 M"]),
    ],
)
def test_log_axes_have_at_least_three_round_ticks(low: float, high: float, texts: list[str]) -> None:
    ticks = log_ticks(low, high)
    assert [text for _, text in ticks] == texts
    assert all(10**low <= value <= 10**high for value, _ in ticks)
