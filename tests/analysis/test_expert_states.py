"""How expert layers with a state move it, against the states of the independent reference, token by token."""

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis.helpers import perturbed, tiny
from morex.analysis import Missing, analyze_trace, load_trace, save_trace
from morex.analysis.records import Found, LayerReport
from morex.analysis.tally import Tally
from morex.analysis.trace import LayerDecisions, decisions
from morex.config import ModelConfig
from morex.loading import validate
from parity.helpers import build, largest_change, pad
from parity.recurrent_reference import RecurrentReference
from parity.test_reference import RECURRING, SMALL, sequences

CASES: dict[str, dict[str, Any]] = {
    "huginn": {"mixer": {"kind": "huginn", "d_ff": 10, "steps": 3}},
    "huginn, one": {"mixer": {"kind": "huginn", "router": {"experts": 3, "top_k": 1}}},
    "huginn, alone": {"mixer": {"kind": "huginn", "attention_scope": "token"}},
    "huginn, again": {"mixer": {"kind": "huginn", "d_ff": 10}, **RECURRING},
    "shared": {"mixer": {"kind": "shared_recurrent", "d_ff": 12, "steps": 3}},
    "shared, again": {"mixer": {"kind": "shared_recurrent", "d_ff": 12}, **RECURRING},
    "layer": {"mixer": {"kind": "layer_recurrent", "steps": 3, "ema": 0.5}},
    "layer, free": {"mixer": {"kind": "layer_recurrent", "entropy_floor": 0.0}},
    "layer, high floor": {"mixer": {"kind": "layer_recurrent", "entropy_floor": 5.0}},
    "layer, again": {"mixer": {"kind": "layer_recurrent"}, **RECURRING},
}


def config_of(case: str) -> ModelConfig:
    tree = {**SMALL, **CASES[case]}
    return validate(ModelConfig, {**tree, "mixer": {"router": {"experts": 3, "top_k": 2}, **tree["mixer"]}})


def norm(vectors: list[Tensor]) -> float:
    return math.sqrt(sum(x * x for vector in vectors for x in vector.tolist()))


def block_of(layer: str, config: ModelConfig) -> int:
    """Number of a layer's block where all are counted in one row."""
    schedule, (_, part, *rest) = config.schedule.resolved, layer.split(".")
    first = {"prelude": 0, "core": schedule.prelude, "coda": schedule.prelude + schedule.core}[part]
    return first + int(rest[1] if part == "core" else rest[0])


@pytest.mark.parametrize("case", CASES)
def test_moves_are_those_of_the_reference(case: str) -> None:
    """Norm before, norm of the difference and cosine of each step; change, cosine and last share as means over them."""
    config = config_of(case)
    mixer: Any = config.mixer
    model = build(config, seed=5, std=0.5).eval()
    rows = sequences()
    tokens, lengths = pad(rows)
    trace = model(tokens, lengths=lengths, return_trace=True).trace
    found = decisions(trace, tokens, lengths, config)
    tally = Tally(config)
    tally.add(found)
    references = []
    for row in rows:
        reference = RecurrentReference(config.model_dump(), model.state_dict(), training=False)
        reference.logits(row.tolist())
        references.append(reference)
    visits = mixer.router.top_k if mixer.kind == "huginn" else 1
    steps = mixer.steps
    for name, layer in found.layers.items():
        block, report = block_of(name, config), tally.layers[name].report()
        last_shares: dict[int, list[float]] = {}
        changes: dict[int, list[float]] = {}
        entropies: dict[int, list[float]] = {}
        for b, reference in enumerate(references):
            for t in range(len(rows[b])):
                paths = reference.paths[block, t]
                for r in range(len(paths) // visits):
                    own = paths[r * visits : (r + 1) * visits]
                    moved = []
                    for s in range(steps):
                        before, after = ([path[s + i] for path in own] for i in (0, 1))
                        moved.append(norm([y - x for x, y in zip(before, after, strict=True)]))
                        assert_move(layer, r * steps + s, b, t, before, after, moved[-1])
                        if norm(before):
                            changes.setdefault(r * steps + s, []).append(moved[-1] / norm(before))
                    last_shares.setdefault(r, []).append(moved[-1] / sum(moved))
                for c, value in enumerate(reference.entropies.get((block, t), [])):
                    entropies.setdefault(c, []).append(value)
        check_report(report, changes, last_shares, entropies)
        # Places behind a row's end have nothing.
        assert layer.moves is not None and np.isnan(layer.moves.moved[:, ~found.real]).all()


def assert_move(
    layer: LayerDecisions, place: int, b: int, t: int, before: list[Tensor], after: list[Tensor], moved: float
) -> None:
    moves, start, end = layer.moves, norm(before), norm(after)
    assert moves is not None
    assert moves.start[place, b, t] == pytest.approx(start, rel=1e-5)
    assert moves.moved[place, b, t] == pytest.approx(moved, rel=1e-5)
    dot = sum(float(x @ y) for x, y in zip(before, after, strict=True))
    if start:
        assert moves.cosine[place, b, t] == pytest.approx(dot / start / end, abs=1e-5)
    else:
        assert np.isnan(moves.cosine[place, b, t])


def check_report(
    report: LayerReport,
    changes: dict[int, list[float]],
    last_shares: dict[int, list[float]],
    entropies: dict[int, list[float]],
) -> None:
    def close(found: Found, values: list[float]) -> None:
        assert not isinstance(found, Missing), found
        assert found.count == len(values) and found.mean == pytest.approx(statistics.fmean(values), rel=1e-5)

    assert not isinstance(report.moves, Missing) and not isinstance(report.last_share, Missing)
    assert len(report.moves) % len(report.last_share) == 0
    for place, step in enumerate(report.moves):
        if place in changes:
            close(step.change, changes[place])
        else:
            assert step.step == 1 and isinstance(step.change, Missing) and "is zero" in step.change.missing
    assert len(report.last_share) == len(last_shares)
    for r, values in last_shares.items():
        close(report.last_share[r], values)
    for c, call in enumerate(report.calls):
        if entropies:
            close(call.own_entropy, entropies[c])
        else:
            assert call.own_entropy == call.entropy


def test_the_entropy_before_the_floor_shows_a_collapse() -> None:
    """A router that is sure of itself has the floor's entropy in its choice, and next to none of its own."""
    config = tiny("more-c", "model.mixer.entropy_floor=0.8").model
    model = perturbed(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mixer.router.weight"):
                parameter *= 1000
    tokens = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    trace = model(tokens, return_trace=True).trace
    tally = Tally(config)
    tally.add(decisions(trace, tokens, None, config))
    for layer in tally.layers.values():
        for call in layer.report().calls:
            assert not isinstance(call.entropy, Missing) and call.entropy.mean == pytest.approx(0.8, abs=1e-3)
            assert not isinstance(call.own_entropy, Missing) and call.own_entropy.mean < 0.3


@pytest.mark.parametrize("preset", ["more-a", "more-b", "more-c"])
def test_a_trace_changes_nothing_and_costs_nothing_where_none_is_asked_for(preset: str) -> None:
    model = perturbed(tiny(preset).model)
    tokens = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    traced = model(tokens, return_trace=True)
    assert largest_change(traced.logits, model(tokens).logits) <= 1e-12
    seen: list[Any] = []
    for module in model.modules():
        if hasattr(module, "mixer"):
            module.mixer.register_forward_hook(lambda m, args, out: seen.extend(out[1]["router"].choices))
    model(tokens)
    assert seen and all(choice.moves is choice.state is choice.entropy is None for choice in seen)
    model(tokens, return_trace=True)
    assert seen[-1].moves is not None


@pytest.mark.parametrize("preset", ["more-a", "more-c"])
def test_files_of_before_are_read(preset: str, tmp_path: Path) -> None:
    """Without the states of `huginn`, and without the first step and the own entropy of `layer_recurrent`."""
    config = tiny(preset).model
    tokens = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    trace = perturbed(config)(tokens, return_trace=True).trace
    save_trace(tmp_path / "t.npz", trace, tokens, None, config)
    with np.load(tmp_path / "t.npz") as file:
        arrays = {name: file[name] for name in file.files}
    for name in [name for name in arrays if name.startswith(("expert_start", "expert_moved", "expert_cosine"))]:
        if preset == "more-a":
            del arrays[name]
        else:
            arrays[name][0] = np.nan
    old = {name: array for name, array in arrays.items() if not name.startswith("expert_entropy")}
    np.savez(tmp_path / "old.npz", **old)
    assert all(layer.entropy is None for layer in load_trace(tmp_path / "old.npz").layers.values())
    (layer, *_) = analyze_trace(tmp_path / "old.npz").layers
    if preset == "more-a":
        assert layer.moves == Missing("the experts have no state in the trace") == layer.last_share
        return
    assert not isinstance(layer.moves, Missing) and not isinstance(layer.last_share, Missing)
    first, *later = layer.moves
    assert isinstance(first.change, Missing) and "not in the trace" in first.change.missing
    assert not any(isinstance(step.change, Missing) for step in later)
    assert isinstance(layer.last_share[0], Missing)
