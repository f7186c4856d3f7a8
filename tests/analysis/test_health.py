"""What is judged, on routers whose health is known."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from analysis.helpers import GROUP, expert_trace, routed, tiny
from morex.analysis.health import judge
from morex.analysis.measures import dead_experts, effective_experts, hot_experts, load_cv
from morex.analysis.records import Agreement, Analysis, Drift, Health, LossReport, Missing
from morex.analysis.tally import Tally
from morex.analysis.trace import Decisions, Moves


def analysis_of(batch: Decisions, **known: Any) -> Analysis:
    tally = Tally(batch.config)
    tally.add(batch)
    nothing = Missing("not asked")
    return Analysis(
        source="",
        step=None,
        tokens=tally.tokens,
        windows=tally.windows,
        policy="router",
        model=batch.config.model_dump(mode="json"),
        groups=tuple(group.report() for group in tally.groups.values()),
        layers=tuple(layer.report() for layer in tally.layers.values()),
        depth=tally.depth_report(True),
        **{"agreement": nothing, "losses": nothing, "accuracy": nothing, "drift": nothing, **known},
    )


def lines(analysis: Analysis) -> dict[str, Health]:
    return {line.quantity: line for line in judge(analysis)}


def test_loads_by_hand() -> None:
    load = (0.7, 0.2, 0.1, 0.0)
    assert load_cv(load) == pytest.approx(np.std(load) / np.mean(load))
    assert effective_experts(load) == pytest.approx(1 / (0.49 + 0.04 + 0.01))
    assert dead_experts(load) == [3] and hot_experts(load) == [0]
    assert dead_experts((0.0024, 0.9976, 0, 0)) == [0, 2, 3]
    even = (0.25,) * 4
    assert load_cv(even) == 0 and effective_experts(even) == 4
    assert not dead_experts(even) and not hot_experts(even)
    assert effective_experts((1.0, 0.0, 0.0, 0.0)) == 1


def test_a_collapsed_expert_router_is_reported() -> None:
    logits = np.zeros((4, 32, 8))
    logits[..., 3] = 20
    found = lines(analysis_of(expert_trace(logits)))
    for quantity, value in {
        "expert load CV": math.sqrt(7),
        "busiest expert over an even share": 8,
        "idlest expert over an even share": 0,
        "effective experts over E": 1 / 8,
        "dead experts": 7,
        "hot experts": 1,
        "expert router entropy over ln E": 0,
    }.items():
        assert found[quantity].status == "warn", quantity
        assert found[quantity].value == pytest.approx(value, abs=1e-5)
    assert found["dead experts"].text == "dead experts 7 in core.blocks.0 (healthy at 0; 1 of 1 outside)"
    assert found["expert load CV"].text == "expert load CV 2.65 in core.blocks.0 (healthy up to 0.3; 1 of 1 outside)"


def test_an_even_expert_router_is_healthy() -> None:
    logits = np.random.default_rng(0).normal(0, 0.01, (32, 256, 8))
    found = lines(analysis_of(expert_trace(logits)))
    own = [line for name, line in found.items() if "expert" in name and line.status != "none"]
    assert len(own) == 8 and {line.status for line in own} <= {"ok", "info"}
    assert found["expert load CV"].text.endswith("(healthy up to 0.3)")


def test_the_worst_place_is_named() -> None:
    """Of several layers, the one that is farthest out."""
    even = analysis_of(expert_trace(np.random.default_rng(0).normal(0, 0.01, (32, 64, 4))))
    logits = np.zeros((4, 32, 4))
    logits[..., 0] = 20
    collapsed = analysis_of(expert_trace(logits)).layers[0]
    both = replace(even, layers=(even.layers[0], replace(collapsed, name="stack.core.blocks.7.mixer.router")))
    line = lines(both)["effective experts over E"]
    assert (line.status, line.where, line.outside, line.places) == ("warn", "core.blocks.7", 1, 2)
    assert line.value == pytest.approx(0.25)


def test_one_expert_has_nothing_to_choose() -> None:
    found = lines(analysis_of(expert_trace(np.zeros((1, 4, 1)))))
    line = found["expert router entropy over ln E"]
    assert line.status == "none" and line.reason == "there is one expert, and nothing to choose"
    assert found["expert load CV"].status == "none"


def all_deep(config: Any, share: float = 1.0) -> Decisions:
    active = np.ones((3, 1, 100), bool)
    active[1:, :, int(100 * share) :] = False
    return routed(config, active, None, [100])


def test_tokens_of_one_depth_are_reported() -> None:
    found = lines(analysis_of(all_deep(tiny("mor-random").model)))
    assert found["depths in use"].status == "warn" and found["depths in use"].value == 1
    off = found["active share off its capacity"]
    assert off.status == "warn" and off.value == pytest.approx(2 / 3) and off.where == "core.groups.0 recursion 3"
    split = lines(analysis_of(all_deep(tiny("mor-random").model, 0.6)))
    assert split["depths in use"].status == "ok" and split["depths in use"].value == 2


def test_states_that_stand_still_or_run_away() -> None:
    config, active = tiny("recursive").model, np.ones((3, 1, 4), bool)

    def change(moved: list[float]) -> dict[str, Health]:
        ones = np.ones((3, 1, 4))
        moves = Moves(ones, ones * np.array(moved)[:, None, None], ones)
        return lines(analysis_of(routed(config, active, None, [4], moves=moves)))

    quantity, share = "change of the state by a later recursion", "last recursion's share of the path"
    found = change([9.0, 0.5, 0.01])
    assert found[quantity].status == "warn" and found[quantity].where == "core.groups.0 recursion 3"
    assert found[share].status == "warn" and found[share].value == pytest.approx(0.01 / 9.51)
    assert change([1.0, 0.5, 5.0])[quantity].value == pytest.approx(5)
    found = change([9.0, 0.5, 0.6])
    assert found[quantity].status == found[share].status == "ok"


def test_late_in_training() -> None:
    course = Drift(
        steps=(1, 2, 3, 4, 5, 6, 7, 8),
        mean_depth={f"{GROUP}.router": (3, 3, 3, 3, 3, 3, 2, 1)},
        mean_steps={},
        load_cv={"stack.core.blocks.1.mixer.router": (0, 0, 0, 0, 0, 0, 0.2, 0.6)},
        effective_experts={},
        entropy_share={},
    )
    found = lines(analysis_of(all_deep(tiny("mor-random").model), drift=course))
    load, depth = found["expert load CV late in training"], found["mean depth late in training"]
    assert (load.status, load.value, load.where) == ("warn", pytest.approx(0.4), "core.blocks.1")
    assert (depth.status, depth.value, depth.where) == ("info", pytest.approx(1.5), "core.groups.0")


def test_losses_and_agreement() -> None:
    batch = all_deep(tiny("mor-expert").model)
    agreement = {GROUP: (Agreement(1.0, 1.0, 1.0), Agreement(0.8, 0.9, Missing("")))}
    losses = LossReport(3.0, None, {1: 3.5, 2: 3.2, 3: 3.3}, {2: 3.1, 3: 3.0})
    found = lines(analysis_of(batch, agreement=agreement, losses=losses))
    agree = found["agreement of the causal rule with top-k"]
    assert (agree.status, agree.value, agree.where) == ("warn", 0.8, "core.groups.0 recursion 2")
    last = found["loss that the last recursion takes off"]
    assert last.status == "warn" and last.value == pytest.approx(-0.1)
    step = found["loss that the last expert step takes off"]
    assert step.status == "ok" and step.value == pytest.approx(0.1)


def test_what_cannot_be_computed_says_why() -> None:
    found = lines(analysis_of(all_deep(tiny("recursive").model)))
    assert found["expert load CV"].reason == "this model has no experts"
    assert found["gate"].reason == "every token takes every recursion; no router decides depth"
    assert found["loss that the last recursion takes off"].text.endswith("not computed (not asked)")
    for line in found.values():
        assert (line.value is None) == (line.status == "none") == (line.reason is not None)
