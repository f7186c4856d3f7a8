"""Sentences follow from the numbers, whoever wins."""

from typing import Any

import pytest

from morex.study.findings import findings, interpolate, separation
from morex.study.records import Cell, Results
from study.helpers import family, make_results, variant


def said(results: Results, *words: str) -> str:
    """The one sentence with all of these words."""
    found = [sentence for sentence in findings(results) if all(word in sentence for word in words)]
    assert len(found) == 1, (words, findings(results))
    return found[0]


def silent(results: Results, *words: str) -> bool:
    return not any(all(word in sentence for word in words) for sentence in findings(results))


def test_the_winner_is_named_with_its_lead() -> None:
    results = make_results(variant("a", "dense", 2.5), variant("b", "recursive", 2.3), variant("c", "experts", 2.4))
    assert findings(results)[0] == (
        "`b` has the lowest held-out loss, 2.300, 0.100 below `c`. The best dense variant, `a`, has 2.500."
    )


def test_a_dense_winner_is_named_as_dense() -> None:
    results = make_results(variant("a", "dense", 2.1), variant("b", "recursive", 2.3))
    assert findings(results)[0] == "The dense `a` has the lowest held-out loss, 2.100, 0.200 below `b`."


def test_a_lead_within_the_spread_is_no_win() -> None:
    close = make_results(variant("a", "dense", (2.0, 2.2)), variant("b", "recursive", (2.05, 2.25)))
    assert "the 0.050 between them is within the spread over seeds" in findings(close)[0]
    clear = make_results(variant("a", "dense", (2.0, 2.02)), variant("b", "recursive", (2.45, 2.47)))
    assert "0.450 below `b`" in findings(clear)[0]
    assert "± 0.014" in findings(clear)[0]


def test_spread_is_added_in_quadrature() -> None:
    one, other = make_results(variant("a", "dense", (2.0, 2.2)), variant("b", "dense", (2.19, 2.39))).rows
    assert one.val_loss_spread == pytest.approx(0.1414, abs=1e-4)
    assert separation(one, other) == "within the spread over seeds"
    one, other = make_results(variant("a", "dense", (2.0, 2.2)), variant("b", "dense", (2.21, 2.41))).rows
    assert separation(one, other) is None


@pytest.mark.parametrize(
    ("dense", "loop", "verdict"),
    [
        (2.30, 2.20, "loses to `loop` (2.200 with 2 times its FLOPs)"),
        (2.10, 2.20, "beats `loop` (2.200 with 2 times its FLOPs)"),
        (2.20, 2.20, "is level with `loop` (2.200 with 2 times its FLOPs)"),
        (2.197, 2.20, "is level with `loop` (2.200 with 2 times its FLOPs)"),
    ],
)
def test_equal_parameters_in_every_direction(dense: float, loop: float, verdict: str) -> None:
    results = make_results(variant("dense", "dense", dense, flops=5e5), variant("loop", "recursive", loop))
    sentence = said(results, "At equal parameters")
    assert sentence == f"At equal parameters (1.00 M without embeddings) the dense `dense` ({dense:.3f}) {verdict}."


def test_equal_flops_in_both_directions() -> None:
    for dense, verb in ((2.3, "loses to"), (2.1, "beats")):
        results = make_results(
            variant("dense", "dense", dense, parameters=4_000_000), variant("loop", "recursive", 2.2)
        )
        sentence = said(results, "At equal training FLOPs")
        assert f"the dense `dense` ({dense:.3f}) {verb} `loop` (2.200 with 0.25 times its parameters)" in sentence
        assert "(1.00 GFLOP)" in sentence


def test_several_rivals_are_sorted_into_verdicts() -> None:
    results = make_results(
        variant("dense", "dense", 2.2),
        variant("x", "recursive", 2.1),
        variant("y", "routed", 2.3),
        variant("z", "experts", 2.0),
    )
    sentence = said(results, "At equal parameters")
    assert "loses to `z` (2.000) and `x` (2.100), and beats `y` (2.300)" in sentence


def test_unequal_sizes_are_not_called_equal() -> None:
    results = make_results(
        variant("dense", "dense", 2.2), variant("loop", "recursive", 2.1, parameters=1_020_000, tokens=1100)
    )
    assert silent(results, "At equal")


def test_after_the_same_flops_is_read_from_the_curves() -> None:
    # `loop` spends 2 GFLOP, `dense` 1 GFLOP; at 1 GFLOP `loop` is half-way: 2.0 + 0.5 * 2.5.
    results = make_results(variant("dense", "dense", 2.2), variant("loop", "recursive", 2.0, flops=2e6))
    sentence = said(results, "After the same", "FLOP")
    assert "After the same 1.00 GFLOP of training (read from the curves" in sentence
    assert "the dense `dense` is ahead with 2.200; the best other, `loop`, has 3.250" in sentence


def test_after_the_same_time_the_other_way_round() -> None:
    results = make_results(variant("dense", "dense", 2.2, speed=50.0), variant("loop", "recursive", 2.0))
    sentence = said(results, "After the same 10 s")
    assert "`loop` is ahead with 2.000; the best dense variant, `dense`, has 3.450" in sentence


def test_equal_budgets_need_no_caveat() -> None:
    results = make_results(variant("dense", "dense", 2.2), variant("loop", "recursive", 2.0))
    assert silent(results, "After the same", "FLOP")
    assert "read from the curves" not in said(results, "After the same", "s of training")


def routed(flops: float, speed: float, **numbers: Any) -> Results:
    return make_results(
        variant("loop", "recursive", 2.0),
        variant("routed", "routed", 2.1, flops=flops, speed=speed, unrouted="loop", **numbers),
    )


def test_what_routing_saved() -> None:
    sentence = said(routed(7.5e5, 125.0), "Routing against none")
    assert sentence == "Routing against none (`loop`), per training token: `routed` −25 % FLOPs and −20 % time."


def test_a_saving_that_the_clock_does_not_show_is_explained() -> None:
    sentence = said(routed(7.5e5, 80.0), "Routing against none")
    assert "`routed` −25 % FLOPs and +25 % time" in sentence
    assert "(`routed`: 0.60 explained)" in sentence


def test_the_twin_of_equal_depth_stands_in_for_the_unrouted_form() -> None:
    results = make_results(
        variant("dense", "dense", 2.0, twin_of="routed", twin="equal_depth"),
        variant("routed", "routed", 2.1, flops=5e5, speed=160.0),
    )
    assert "Routing against none (`dense`)" in said(results, "Routing")


def test_the_oracle_is_never_alone() -> None:
    sentence = said(routed(7.5e5, 125.0, oracle=1.95), "oracle")
    assert "`routed` 1.950 (causal: 2.100)" in sentence
    assert silent(routed(7.5e5, 125.0), "oracle")


def test_a_router_that_does_not_tell_tokens_apart() -> None:
    assert "gave 97 % of the held-out tokens the same 3 recursions" in said(
        routed(1e6, 100.0, histogram=(0, 1, 2, 97)), "hardly tells tokens apart"
    )
    assert silent(routed(1e6, 100.0, histogram=(0, 30, 30, 40)), "apart")


def test_uneven_experts() -> None:
    uneven = make_results(
        variant("a", "dense", 2.0), variant("e", "experts", 2.1, load=((0.25, 0.25, 0.5), (0.4, 0.3, 0.3)))
    )
    assert "busiest expert of `e` takes 50 % of its layer's work, where 33 % would be even" in said(uneven, "busiest")
    even = make_results(variant("a", "dense", 2.0), variant("e", "experts", 2.1, load=((0.35, 0.33, 0.32),)))
    assert silent(even, "busiest")


def test_the_best_learning_rates_are_named() -> None:
    results = family()
    rates = [{"lr": lr, "first_half": 1.0, "second_half": 1.0, "full": 1.0, "full_spread": None} for lr in (1e-3, 3e-3)]
    tree = results.model_dump()
    tree["rows"] = [row | {"learning_rates": rates} for row in tree["rows"][:2]]
    sentence = said(Results.model_validate(tree), "learning rates")
    assert sentence == (
        "Each is shown at the best of 2 learning rates, chosen on the first half of the held-out windows and measured "
        "on the second: `dense` 0.001 and `small` 0.001."
    )
    assert silent(results, "learning rates")


def test_losses_over_other_windows_are_told_apart() -> None:
    """The table has the loss over half of the windows, the curves that over all of them."""
    results = family()
    rates = [{"lr": 1e-3, "first_half": 1.0, "second_half": 1.0, "full": 1.0, "full_spread": None}]
    tree = results.model_dump()
    tree["rows"] = [row | {"learning_rates": rates} for row in tree["rows"]]
    assert "over all held-out windows" in said(Results.model_validate(tree), "After the same", "s of training")
    assert silent(results, "over all held-out windows")


def test_one_seed_is_said_to_be_one() -> None:
    one = make_results(variant("a", "dense", 2.0), variant("b", "recursive", 2.1))
    assert "one seed" in findings(one)[-1]
    assert silent(family(), "one seed")


def test_failures_are_told() -> None:
    results = make_results(variant("a", "dense", 2.0), variant("b", "recursive", 2.1))
    lost = Cell(name="b-s0", variant="b", seed=0, lr=1e-3, status="failed", error="loss 'lm' is nan at step 3.")
    waiting = Cell(name="c-s0", variant="b", seed=1, lr=1e-3, status="missing")
    results = results.model_copy(update={"cells": (*results.cells, lost, waiting)})
    assert said(results, "failed") == "The cell `b-s0` failed and is left out: loss 'lm' is nan at step 3."
    assert "1 of 4 cells are not trained yet" in said(results, "not trained")


def test_nothing_finished() -> None:
    results = make_results(variant("a", "dense", 2.0))
    empty = results.model_copy(update={"rows": (results.rows[0].model_copy(update={"val_loss": None}),), "cells": ()})
    assert findings(empty) == ("No cell has finished, so there is nothing to compare.",)


def test_interpolation() -> None:
    points = [(1.0, 10.0), (3.0, 20.0)]
    assert interpolate(points, 2.0) == 15.0
    assert interpolate(points, 3.0) == 20.0
    assert interpolate(points, 0.5) is None
    assert interpolate(points, 3.5) is None
    assert interpolate([], 1.0) is None
