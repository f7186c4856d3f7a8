"""Analyses of tasks, of classifiers, of exits, of exit rules and of steps inside experts."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis.helpers import GROUP, LAYER, opened, perturbed, routed, tiny
from analysis.test_tally import ACTIVE, LENGTHS, TOKENS, assert_spread, entropy_of, tallied
from morex.analysis import Analysis, Missing, Spread, analyze_trace, to_dict, write
from morex.analysis.analyze import analyze_opened, with_fewer_steps
from morex.analysis.drift import drift
from morex.analysis.records import AccuracyReport, DepthReport, Drift
from morex.analysis.vocabulary import CLASSES, token_classes
from morex.config import Config
from morex.data.source import prepare_source
from morex.data.tasks.prepared import PreparedTask
from morex.eval.loss import evaluate

STEPS = "model.mixer={kind: recursive, steps: 3, d_ff: 32, router: {experts: 3, top_k: 2}, depth: {kind: token_choice}}"
SUMS = ["data.task={kind: addition, difficulty: [1, 3], held_out: 40}", "train.seq_len=24"]


def analysed(config: Config, folder: Path, **options: Any) -> Analysis:
    found = analyze_opened(opened(config, folder, std=0.3), "", **options)
    json.dumps(to_dict(found), allow_nan=False)
    return found


def quantity(found: Analysis, name: str) -> Any:
    return next(line for line in found.health if line.quantity == name)


# Tasks


@pytest.mark.parametrize("preset", ["sandbox-expert", "sandbox-token", "mor-expert"])
def test_a_task_is_measured_as_evaluation_does(preset: str, tmp_path: Path) -> None:
    config = tiny(preset, *([] if preset.startswith("sandbox") else SUMS))
    run = opened(config, tmp_path)
    found = analyze_opened(run, "", tokens=10**6)
    plain = evaluate(run.model, run.data.val, config.train.seq_len, 5, by_depth=True)
    assert not isinstance(found.losses, Missing) and isinstance(found.accuracy, AccuracyReport)
    assert plain.scores is not None and plain.scores_by_depth is not None
    assert found.losses.loss == pytest.approx(plain.loss, rel=1e-12)
    assert found.accuracy.accuracy == plain.scores.all.accuracy
    assert found.accuracy.examples == len(run.data.val.examples) == found.windows  # type: ignore[union-attr]
    assert found.accuracy.by_depth == {r: one.all.accuracy for r, one in plain.scores_by_depth.items()}
    assert found.accuracy.by_difficulty == {d: one.accuracy for d, one in plain.scores.by_difficulty.items()}
    assert (found.accuracy.oracle_accuracy is None) == (preset == "sandbox-token")


def test_the_first_examples_are_those_that_hold_the_tokens(tmp_path: Path) -> None:
    config = tiny("sandbox-token")
    run = opened(config, tmp_path)
    assert isinstance(run.data, PreparedTask)
    lengths = [len(example.prompt) for example in run.data.val.examples]
    found = analyze_opened(run, "", tokens=30)
    assert found.windows < len(lengths) and found.tokens == sum(lengths[: found.windows])
    assert sum(lengths[: found.windows - 1]) < 30 <= found.tokens


def test_depth_by_difficulty(tmp_path: Path) -> None:
    config = tiny("mor-token", *SUMS)
    found = analysed(config, tmp_path, tokens=10**6, trace=tmp_path / "t.npz")
    assert isinstance(found.depth, DepthReport) and not isinstance(found.depth.by_difficulty, Missing)
    assert list(found.depth.by_difficulty) == [1, 2, 3]
    assert sum(one.tokens for one in found.depth.by_difficulty.values()) == found.tokens
    weighed = sum(one.tokens * one.mean for one in found.depth.by_difficulty.values())
    assert weighed / found.tokens == pytest.approx(found.depth.mean)
    shown = max(found.depth.by_difficulty.items(), key=lambda entry: entry[1].mean)
    line = quantity(found, "mean depth by difficulty")
    assert line.where == f"difficulty {shown[0]}" and line.value == shown[1].mean
    assert analyze_trace(tmp_path / "t.npz").depth == found.depth
    assert {path.stem for path in write(found, tmp_path / "out")} >= {"depth-by-difficulty", "accuracy"}


def test_a_text_has_no_accuracy(tmp_path: Path) -> None:
    found = analysed(tiny("mor-token"), tmp_path, tokens=32)
    assert isinstance(found.accuracy, Missing) and not isinstance(found.depth, Missing)
    assert isinstance(found.depth.by_difficulty, Missing)
    assert quantity(found, "accuracy that the last recursion adds").status == "none"


def test_accuracy_that_the_last_recursion_takes_away_is_a_warning(tmp_path: Path) -> None:
    from dataclasses import replace

    from morex.analysis.health import judge

    found = analysed(tiny("recursive", *SUMS), tmp_path, tokens=200)
    worse = AccuracyReport(10, 0.5, None, {1: 0.1, 2: 0.9, 3: 0.5}, {1: 1.0, 2: 0.25})
    found = replace(found, health=judge(replace(found, accuracy=worse)))
    line = quantity(found, "accuracy that the last recursion adds")
    assert line.status == "warn" and line.value == pytest.approx(-0.4) and line.where == "recursion 3"
    assert quantity(found, "accuracy").text == "accuracy 0.25 in difficulty 2 to 1 in difficulty 1"


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        ("{kind: arithmetic}", {"0": "number", "(": "punctuation", "*": "punctuation", "=": "punctuation"}),
        ("{kind: p_hop}", {"a": "word", "7": "number", ":": "punctuation"}),
        ("{kind: pattern, difficulty: [12, 16], numbers: 20}", {"19": "number", "=": "punctuation"}),
    ],
)
def test_symbols_have_the_class_of_their_text(task: str, wanted: dict[str, str]) -> None:
    tokenizer = prepare_source(
        tiny("mor-token", f"data.task={task}", "train.seq_len=96", "model.max_seq_len=96")
    ).tokenizer
    found = token_classes(tokenizer, 97)
    for symbol, name in wanted.items():
        assert CLASSES[found[tokenizer.encode(symbol)[0]]] == name
    assert tokenizer.eos_id is not None and CLASSES[found[tokenizer.eos_id]] == "special"
    assert CLASSES[found[96]] == "fragment", "ids that stand for no symbol"


# Exits


def test_exit_probabilities_by_hand() -> None:
    config = tiny("ouro", "model.schedule.recursions=3").model
    scores = np.where(ACTIVE, np.random.default_rng(2).uniform(0.1, 0.9, ACTIVE.shape), np.nan)
    scores[2] = np.nan
    group = tallied(routed(config, ACTIVE, scores, LENGTHS)).groups[GROUP].report()
    assert not isinstance(group.entropy, Missing) and not isinstance(group.gate, Missing)
    for r in range(2):
        leaving = [scores[r, b, t] for b, t in TOKENS if ACTIVE[r, b, t]]
        assert_spread(group.entropy[r], [entropy_of([p, 1 - p]) for p in leaving])
    assert group.entropy[2] == Missing("every token leaves after the last recursion, and the gate is not asked")
    for r in range(3):
        weights = []
        for b, t in TOKENS:
            if ACTIVE[r, b, t]:
                left = math.prod(1 - scores[s, b, t] for s in range(r))
                weights.append(left * (scores[r, b, t] if r < 2 else 1))
        assert_spread(group.gate[r], weights)


def test_the_exits_of_a_model_are_those_that_it_takes(tmp_path: Path) -> None:
    config = tiny("ouro")
    found = analysed(config, tmp_path, tokens=32)
    run = opened(config, tmp_path, std=0.3)
    tokens = torch.from_numpy(run.data.val.tokens[:32].astype("int64")).view(2, 16)  # type: ignore[union-attr]
    with torch.no_grad():
        trace = run.model(tokens, return_trace=True).trace
    assert trace is not None and isinstance(found.depth, DepthReport)
    counted = torch.bincount(trace.depth.flatten(), minlength=len(found.depth.histogram))
    assert found.depth.histogram == tuple(counted.tolist()) and 0 < counted[1] < 32
    leaving = trace.scores[GROUP][0]
    group = found.group(GROUP)
    assert not isinstance(group.gate, Missing) and isinstance(group.gate[0], Spread)
    assert group.gate[0].mean == pytest.approx(leaving.mean().item(), rel=1e-6)


def test_a_gate_with_another_threshold(tmp_path: Path) -> None:
    early, late = (analysed(tiny("ouro"), tmp_path, tokens=32, depth=f"exit:gate:{x}") for x in (0.2, 0.95))
    assert isinstance(early.depth, DepthReport) and isinstance(late.depth, DepthReport)
    assert early.depth.mean < late.depth.mean and early.policy == "exit:gate:0.2"
    assert not isinstance(early.group(GROUP).entropy, Missing), "the gate is asked all the same"


@pytest.mark.parametrize("preset", ["huginn", "recursive"])
def test_exit_rules(preset: str, tmp_path: Path) -> None:
    config = tiny(preset, "model.kv=refresh")
    own = analysed(config, tmp_path, tokens=32)
    assert isinstance(own.depth, Missing) and quantity(own, "depths in use").status == "none"
    with torch.no_grad():
        trace = (
            opened(config, tmp_path, std=0.3).model(torch.arange(16)[None], depth="exit:kl", return_trace=True).trace
        )
    threshold = float(np.nanmedian([score[score.isfinite()].median() for score in trace.scores[GROUP][1:-1]]))
    found = analysed(config, tmp_path, tokens=32, depth=f"exit:kl:{threshold}", trace=tmp_path / "t.npz")
    assert isinstance(found.depth, DepthReport)
    assert sum(count > 0 for count in found.depth.histogram) > 1, "tokens leave at several depths"
    reason = found.group(GROUP).entropy
    assert isinstance(reason, Missing) and "compares with a threshold" in reason.missing
    assert analyze_trace(tmp_path / "t.npz").depth == found.depth


def test_a_rule_that_the_model_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names an exit rule that this model has not"):
        analysed(tiny("ouro"), tmp_path, depth="exit:kl")


# Steps inside experts


def test_steps_inside_experts(tmp_path: Path) -> None:
    config = tiny("mor-expert", STEPS)
    found = analysed(config, tmp_path, tokens=32, trace=tmp_path / "t.npz")
    run = opened(config, tmp_path, std=0.3)
    tokens = torch.from_numpy(run.data.val.tokens[:32].astype("int64")).view(2, 16)  # type: ignore[union-attr]
    with torch.no_grad():
        trace = run.model(tokens, return_trace=True).trace
    assert trace is not None
    layer = found.layer(LAYER)
    assert len(layer.calls) == len(trace.expert_steps[LAYER]) == 3
    for call, steps in zip(layer.calls, trace.expert_steps[LAYER], strict=True):
        taken = steps[steps >= 0]
        assert isinstance(call.mean_steps, Spread) and not isinstance(call.steps, Missing)
        assert call.mean_steps.mean == pytest.approx(taken.double().mean().item())
        counts = torch.bincount(taken.long(), minlength=4).double()
        assert call.steps == pytest.approx((counts / counts.sum()).tolist())
    again = analyze_trace(tmp_path / "t.npz")
    assert [call.steps for call in again.layer(LAYER).calls] == [call.steps for call in layer.calls]
    assert "expert-steps" in {path.stem for path in write(again, tmp_path / "out")}
    assert not isinstance(found.losses, Missing) and isinstance(found.losses.by_steps, Missing)


def test_without_a_router_for_steps(tmp_path: Path) -> None:
    found = analysed(tiny("more"), tmp_path, tokens=32)
    assert quantity(found, "mean steps inside experts").reason == "no router decides steps inside experts"
    assert "expert-steps" not in {path.stem for path in write(found, tmp_path / "out")}


def test_a_router_for_steps_has_no_shorter_twin() -> None:
    shorter = with_fewer_steps(perturbed(tiny("mor-expert", STEPS).model))
    assert shorter == Missing("router 'token_choice' decides how many steps a token takes")


# Drift


def test_drift_of_steps_and_of_exits() -> None:
    group, layer, steps = f"{GROUP}.router", LAYER, LAYER.replace(".router", ".depth")
    lines = [
        {"step": s, "active_share": {group: [1, 0.5, 0.25], steps: [1, 1, x]}, "router_entropy": {steps: math.log(3)}}
        for s, x in ((1, 0.5), (2, 0.25))
    ]
    found = drift(lines, tiny("mor-expert", STEPS).model)
    assert isinstance(found, Drift)
    assert found.mean_depth == {group: (1.75, 1.75)} and found.mean_steps == {steps: (2.5, 2.25)}
    assert found.entropy_share == {steps: pytest.approx((1, 1))} and layer not in found.mean_steps
    exits = [
        {"step": s, "active_share": {group: [1, 1, 1]}, "exit_probability": {group: [0.5, 0.25, 0.25]}} for s in (1, 2)
    ]
    found = drift(exits, tiny("ouro").model)
    assert isinstance(found, Drift) and found.mean_depth == {group: (1.75, 1.75)}
    drawn = drift([{"step": s, "active_share": {group: [1] * s}} for s in (1, 2)], tiny("huginn").model)
    assert drawn == Missing("no router decides anything in this model")
