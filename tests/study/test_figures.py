"""Figures are valid for plotly and say what the numbers say."""

import json
from typing import Any

import pytest

from morex.study.figures import figures
from morex.study.series import styles
from study.helpers import family, make_results, variant

FIGURES = figures(family())


def trace(figure: dict[str, Any], name: str, index: int = -1) -> dict[str, Any]:
    found: dict[str, Any] = [entry for entry in figure["data"] if entry.get("meta") == name][index]
    return found


def test_all_figures_of_a_study_with_every_kind() -> None:
    assert set(FIGURES) == {
        "ranking",
        "loss_tokens",
        "loss_flops",
        "loss_seconds",
        "parameters",
        "cost",
        "train_speed",
        "decode_speed",
        "memory",
        "kv",
        "depth",
        "experts_experts",
    }


@pytest.mark.parametrize("name", FIGURES)
def test_plotly_accepts_every_key_and_value(name: str) -> None:
    graph = pytest.importorskip("plotly.graph_objects")
    graph.Figure(FIGURES[name])
    json.dumps(FIGURES[name], allow_nan=False)


@pytest.mark.parametrize("name", [name for name in FIGURES if not name.startswith(("depth", "experts"))])
def test_a_variant_has_one_colour_everywhere(name: str) -> None:
    for row in family().rows:
        shown = trace(FIGURES[name], row.name)
        colours = {shown.get(part, {}).get("color") for part in ("line", "marker")} | {
            shown.get("marker", {}).get("line", {}).get("color")
        }
        assert styles(family().rows)[row.name].colour in colours


def test_loss_curves_hold_the_evaluations_and_faint_training_losses() -> None:
    figure = FIGURES["loss_flops"]
    curve = trace(figure, "experts")
    assert curve["x"] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert "GFLOP" in figure["layout"]["xaxis"]["title"]["text"]
    assert curve["y"][-1] == pytest.approx(1.91)
    assert trace(figure, "experts", 0)["line"]["width"] < curve["line"]["width"]


def test_ranking_puts_the_best_on_top_with_its_spread_and_the_oracle_hollow() -> None:
    figure = FIGURES["ranking"]
    names = [entry["y"][0] for entry in figure["data"]]
    assert names[-1] == "experts"
    assert trace(figure, "experts")["error_x"]["array"] == [pytest.approx(0.01)]
    assert trace(figure, "routed", 0)["x"] == [pytest.approx(2.1)]
    assert trace(figure, "routed", 0)["marker"]["color"] == "#ffffff"
    assert trace(figure, "routed")["x"] == [pytest.approx(2.25)]
    assert "1.910 ± 0.010" in [note["text"] for note in figure["layout"]["annotations"]]


def test_bars_are_in_the_order_of_the_study_with_their_values() -> None:
    figure = FIGURES["train_speed"]
    assert [entry["y"][0] for entry in figure["data"]] == ["experts", "routed", "loop", "small", "dense"]
    assert trace(figure, "routed")["x"] == [120.0]
    assert trace(FIGURES["memory"], "dense")["x"] == [200.0]
    assert "MB" in FIGURES["memory"]["layout"]["xaxis"]["title"]["text"]


def test_depth_bars_add_up() -> None:
    figure = FIGURES["depth"]
    assert [entry["name"] for entry in figure["data"]] == ["1", "2", "3"]
    assert [entry["x"][0] for entry in figure["data"]] == pytest.approx([20, 60, 20])


def test_expert_bars_and_the_even_share() -> None:
    figure = FIGURES["experts_experts"]
    assert [entry["y"] for entry in figure["data"]] == [
        pytest.approx([50, 40]),
        pytest.approx([30, 30]),
        pytest.approx([20, 30]),
    ]
    assert figure["layout"]["shapes"][0]["y0"] == pytest.approx(100 / 3)


def test_a_study_without_routers_or_experts_has_no_figures_of_them() -> None:
    names = set(figures(make_results(variant("a", "dense", 2.0), variant("b", "recursive", 2.1))))
    assert "depth" not in names
    assert not any(name.startswith("experts") for name in names)
    assert "ranking" in names


def test_one_variant_has_no_scatter() -> None:
    assert not {"parameters", "cost"} & set(figures(make_results(variant("a", "dense", 2.0))))


def test_nothing_finished_draws_nothing() -> None:
    results = make_results(variant("a", "dense", 2.0))
    empty = results.model_copy(update={"rows": (results.rows[0].model_copy(update={"val_loss": None}),), "cells": ()})
    assert figures(empty) == {}
