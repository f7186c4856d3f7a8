"""Whole analyses: of every preset, of a trained run, and of a trace file."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import morex
from analysis.helpers import GROUP, opened, perturbed, tiny
from morex.analysis import Missing, Spread, analyze, analyze_trace, to_dict, write
from morex.analysis.analyze import analyze_opened, folder_for, with_fewer_steps
from morex.analysis.drift import drift
from morex.analysis.pictures import depth_by_group
from morex.analysis.records import Drift
from morex.cli import main
from morex.data.errors import DataError
from morex.eval.loss import evaluate
from morex.loading import ConfigError
from morex.train.checkpoint import list_checkpoints
from morex.train.runs import RunFolder
from parity.helpers import VARIANTS
from train.helpers import write_corpus

OF_DECISIONS = {"expert-loads", "depth", "depth-by-class", "active-share", "weights", "state-change", "entropy"}
FIGURES = OF_DECISIONS | {"agreement", "losses", "drift"}


def numbers(tree: Any) -> Iterator[float]:
    """Every number of plain data."""
    if isinstance(tree, dict | list | tuple):
        for entry in tree.values() if isinstance(tree, dict) else tree:
            yield from numbers(entry)
    elif isinstance(tree, int | float):
        yield tree


@pytest.mark.parametrize("preset", morex.presets())
def test_every_preset(preset: str, tmp_path: Path) -> None:
    """Nothing is NaN; what the model has is there, and what it has not is said to be missing; the trace agrees."""
    config = tiny(preset)
    found = analyze_opened(opened(config, tmp_path), preset, tokens=100, trace=tmp_path / "t.npz")
    is_task, rows = config.data.task is not None, found.windows
    assert rows < 12 and 100 <= found.tokens <= 115 if is_task else found.tokens == 7 * 16 and rows == 7
    plain = json.loads(json.dumps(to_dict(found), allow_nan=False))
    assert all(math.isfinite(value) for value in numbers(plain))
    assert len(found.health) == len({line.quantity for line in found.health}) == 38
    assert all(line.status != "none" or line.reason for line in found.health)
    mixer, recursions = config.model.mixer, config.model.schedule.resolved.recursions
    assert bool(found.layers) == hasattr(mixer, "router")
    assert isinstance(found.depth, Missing) == (config.model.depth.kind in ("fixed", "sampled"))
    assert not isinstance(found.losses, Missing)
    assert isinstance(found.accuracy, Missing) != is_task
    assert isinstance(found.losses.by_depth, Missing) == (recursions == 1)
    assert isinstance(found.losses.by_steps, Missing) == (getattr(mixer, "steps", 1) == 1)
    assert isinstance(found.agreement, Missing) == (config.model.depth.kind != "expert_choice")
    for layer in found.layers:
        assert all(isinstance(call.entropy, Spread) and call.entropy.mean > 0 for call in layer.calls)
    if getattr(mixer, "kind", "") in ("huginn", "shared_recurrent", "layer_recurrent"):
        judged = {line.quantity: line.status for line in found.health}
        assert judged["change of the state by an expert step"] in ("ok", "warn")
        assert judged["last expert step's share of the path"] in ("ok", "warn")
        assert [layer.moves for layer in analyze_trace(tmp_path / "t.npz").layers] == [x.moves for x in found.layers]
    for group in found.groups:
        assert sum(group.depths) == pytest.approx(1)
        assert all(0 <= share <= 1 for share in group.active_share)
    again = analyze_trace(tmp_path / "t.npz")
    assert [layer.load for layer in again.layers] == [layer.load for layer in found.layers]
    assert again.depth == found.depth
    assert [group.active_share for group in again.groups] == [group.active_share for group in found.groups]
    assert isinstance(again.losses, Missing) and isinstance(again.drift, Missing)


@pytest.mark.parametrize("case", ["expert+sequence", "expert+all_candidates", "layer_recurrent+threshold"])
def test_other_forms(case: str, tmp_path: Path) -> None:
    preset, overrides = VARIANTS[case]
    found = analyze_opened(opened(tiny(preset, *overrides), tmp_path), case, tokens=64)
    json.dumps(to_dict(found), allow_nan=False)
    assert len(found.groups) == (2 if case == "expert+sequence" else 1)
    assert (depth_by_group(found) is None) == (len(found.groups) == 1)


def test_losses_are_those_of_evaluation(tmp_path: Path) -> None:
    config = tiny("mor-expert")
    run = opened(config, tmp_path)
    found = analyze_opened(run, "", tokens=32).losses
    plain = evaluate(run.model, run.data.val.head(33), 16, 2, by_depth=True)
    assert not isinstance(found, Missing)
    assert found.loss == pytest.approx(plain.loss, rel=1e-12)
    assert found.oracle_loss == pytest.approx(plain.oracle_loss, rel=1e-12)
    assert found.by_depth == pytest.approx(plain.by_depth, rel=1e-12)


def test_agreement_is_that_of_two_passes(tmp_path: Path) -> None:
    config = tiny("mor-expert")
    run = opened(config, tmp_path, std=0.3)
    found = analyze_opened(run, "", tokens=32).agreement
    tokens = torch.from_numpy(run.data.val.tokens[:32].astype("int64")).view(2, 16)
    with torch.no_grad():
        ours, theirs = (run.model(tokens, depth=d, return_trace=True).trace.active[GROUP] for d in (None, "oracle"))
    assert not isinstance(found, Missing)
    for r in range(3):
        assert found[GROUP][r].accuracy == pytest.approx((ours[r] == theirs[r]).double().mean().item())


def test_a_fixed_depth(tmp_path: Path) -> None:
    found = analyze_opened(opened(tiny("mor-expert"), tmp_path), "", tokens=32, depth="adaptive:16")
    assert found.policy == "adaptive:16" and isinstance(found.agreement, Missing)
    assert not isinstance(found.depth, Missing) and found.depth.histogram[1] > 0
    shallow = analyze_opened(opened(tiny("recursive"), tmp_path), "", tokens=32, depth=2)
    assert shallow.group(GROUP).active_share == (1.0, 1.0)
    with pytest.raises(ValueError, match="depth 'deep'"):
        analyze_opened(opened(tiny("recursive"), tmp_path), "", depth="deep")


def test_more_recursions_than_in_training(tmp_path: Path) -> None:
    config = tiny("recursive", "model.mixer={kind: moe, router: {experts: 3, top_k: 1}}")
    found = analyze_opened(opened(config, tmp_path), "", tokens=32, depth=5)
    assert len(found.group(GROUP).change) == 5
    layer = found.layer("stack.core.blocks.0.mixer.router")
    assert [call.recursion for call in layer.calls] == [1, 2, 3, 4, 5]


def test_without_a_causal_rule_the_oracle_is_shown(tmp_path: Path) -> None:
    found = analyze_opened(opened(tiny("mor-expert", "model.depth.causal=none"), tmp_path), "", tokens=32)
    assert found.policy == "oracle" and isinstance(found.agreement, Missing)
    assert "no causal rule" in found.agreement.missing
    assert found.group(GROUP).active_share == pytest.approx((1, 10 / 16, 5 / 16))


def test_that_steps_are_trained_by_another_rule_is_said(tmp_path: Path) -> None:
    """Inside experts there is no second pass by top-k to compare with, and the reason does not deny the rule."""
    config = tiny("more-tuned", "model.mixer.depth.kind=expert_choice")
    found = analyze_opened(opened(config, tmp_path), "", tokens=32).agreement
    assert isinstance(found, Missing) and "mixer.depth decides about steps is not" in found.missing
    one_rule = analyze_opened(opened(tiny("more-tuned"), tmp_path), "", tokens=32).agreement
    assert isinstance(one_rule, Missing) and "mixer.depth" not in one_rule.missing


@pytest.mark.parametrize("preset", ["more", "more-tuned", "more-a", "more-b", "more-c"])
def test_one_step_less_is_the_same_model_with_its_loop_cut(preset: str) -> None:
    model = perturbed(tiny(preset).model)
    shallow = with_fewer_steps(model)
    assert not isinstance(shallow, Missing)
    tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        short, whole = shallow(tokens).logits, model(tokens).logits
        for block in model.stack.core.blocks:
            block.mixer.steps -= 1
            if hasattr(block.mixer, "step_embedding"):
                block.mixer.step_embedding.data = block.mixer.step_embedding.data[:, :-1].contiguous()
        cut = model(tokens).logits
    assert torch.equal(short, cut) and not torch.allclose(short, whole)


def test_a_model_that_is_not_finite_says_so(tmp_path: Path) -> None:
    run = opened(tiny("moe"), tmp_path)
    with torch.no_grad():
        run.model.embedding.weight.fill_(torch.nan)
    found = analyze_opened(run, "", tokens=32)
    json.dumps(to_dict(found), allow_nan=False)
    assert found.losses == Missing("a loss is not finite")
    (line,) = [line for line in found.health if line.quantity == "expert router entropy over ln E"]
    assert line.reason == "a value is not finite"


# Drift


def line(step: int, load: list[float], entropy: float, share: list[float]) -> dict[str, Any]:
    layer, group = "stack.core.blocks.0.mixer.router", f"{GROUP}.router"
    return {
        "step": step,
        "expert_load": {layer: load},
        "router_entropy": {layer: entropy},
        "active_share": {group: share},
    }


def test_drift_by_hand() -> None:
    config = tiny("mor-expert", "model.mixer={kind: moe, router: {experts: 4, top_k: 1}}").model
    lines = [line(10, [0.25] * 4, math.log(4), [1, 0.5, 0.25]), line(20, [1.0, 0, 0, 0], 0.0, [1, 1, 1])]
    found = drift(lines, config)
    assert isinstance(found, Drift)
    assert found.steps == (10, 20)
    ((layer, cv),) = found.load_cv.items()
    assert cv == pytest.approx((0, math.sqrt(3)))
    assert found.effective_experts[layer] == pytest.approx((4, 1))
    assert found.entropy_share[layer] == pytest.approx((1, 0))
    assert found.mean_depth == {f"{GROUP}.router": pytest.approx((1.75, 3))}


def test_drift_is_thinned_from_the_end() -> None:
    config = tiny("mor-random").model
    found = drift([line(step, [1.0], 0.0, [1, 0.5, 0.25]) for step in range(1, 1002)], config)
    assert isinstance(found, Drift) and len(found.steps) <= 200
    assert found.steps[-1] == 1001 and len({b - a for a, b in zip(found.steps, found.steps[1:], strict=False)}) == 1


def test_drift_that_is_not_there() -> None:
    assert "1 training lines" in drift([line(1, [1.0], 0, [1])], tiny("moe").model).missing  # type: ignore[union-attr]
    nothing = drift([{"step": 1}, {"step": 2}], tiny("vanilla").model)
    assert nothing == Missing("no router decides anything in this model")


# A trained run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model with both kinds of router, three steps long."""
    folder = tmp_path_factory.mktemp("analysed")
    corpus = write_corpus(folder / "corpus.txt")
    words = ["model.mixer={kind: moe, router: {experts: 3, top_k: 1}}", f"data.corpus={corpus}", "train.log_every=1"]
    words += ["data.tokenizer.kind=byte", "data.val_fraction=0.2", "model.vocab_size=257", "train.steps=3"]
    words += ["train.batch_size=4", "train.seq_len=32", "train.threads=1", "train.checkpoint_every=2"]
    run = folder / "run"
    changes = [word for change in words for word in ("--set", change)]
    assert main(["train", "mor-expert", "--tiny", "--out", str(run), *changes]) == 0
    return run


def test_a_run_and_its_files(trained: Path, tmp_path: Path) -> None:
    found = analyze(trained, tokens=256, trace=tmp_path / "t.npz")
    assert found.step == 3 and found.tokens == 256
    assert isinstance(found.drift, Drift) and found.drift.steps == (1, 2, 3)
    assert not isinstance(found.depth, Missing) and not isinstance(found.depth.by_class, Missing)
    assert {"word", "whitespace"} <= set(found.depth.by_class)
    written = write(found, tmp_path / "out")
    assert {path.stem for path in written} == FIGURES | {"analysis"}
    for path in written[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert json.loads(written[0].read_text()) == json.loads(json.dumps(to_dict(found)))


def test_the_result_is_always_the_same(trained: Path) -> None:
    assert to_dict(analyze(trained, tokens=128)) == to_dict(analyze(trained, tokens=128))


def test_a_trace_file_gives_the_same_decisions(trained: Path, tmp_path: Path) -> None:
    whole = analyze(trained, tokens=512, trace=tmp_path / "t.npz")
    alone = analyze_trace(tmp_path / "t.npz")
    assert alone.depth == whole.depth and alone.tokens == whole.tokens
    for ours, theirs in zip(alone.groups, whole.groups, strict=True):
        for a, b in zip(ours.change, theirs.change, strict=True):
            assert isinstance(a, Spread) and isinstance(b, Spread) and a.mean == pytest.approx(b.mean)
    needs = "a trace file has no weights; analyse the run"
    assert {line.reason for line in alone.health if "loss" in line.quantity} == {needs}
    assert {path.stem for path in write(alone, tmp_path / "out")} == OF_DECISIONS | {"analysis"}


def test_figures_of_an_earlier_analysis_go(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "expert-loads.png").write_bytes(b"old")
    found = analyze_opened(opened(tiny("vanilla"), tmp_path / "none"), "", tokens=32)
    assert [path.name for path in write(found, tmp_path)] == ["analysis.json"]
    assert not (tmp_path / "expert-loads.png").exists()


def test_folders(trained: Path, tmp_path: Path) -> None:
    first, last = list_checkpoints(RunFolder(trained))
    assert folder_for(trained) == trained / "analysis"
    assert folder_for(first) == trained.resolve() / "analysis" / "step-2"
    assert analyze(first, tokens=32).step == 2 and analyze(last, tokens=32).step == 3
    (tmp_path / "x.npz").write_bytes(b"")
    assert folder_for(tmp_path / "x.npz") == tmp_path / "x-analysis"


def test_faults(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokens 0 must be 1 or more"):
        analyze(trained, tokens=0)
    with pytest.raises(ConfigError, match="neither a run folder"):
        analyze(tmp_path)
    with pytest.raises(ConfigError, match="trained as it is"):
        analyze(trained, overrides=["model.d_model=8"])
    with pytest.raises(DataError, match="no trace file"):
        (tmp_path / "x.npz").write_bytes(b"PK")
        analyze_trace(tmp_path / "x.npz")


def test_a_console_hears_what_is_under_way(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    analyze(trained, tokens=64, console=Console(stderr=True))
    said = capsys.readouterr().err
    assert "tracing 2 windows" in said and "losses at 3 depths" in said
