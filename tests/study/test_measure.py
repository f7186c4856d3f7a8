"""What is measured of a trained cell."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from morex.data.source import halves
from morex.data.stream import TokenStream
from morex.data.tokenizer import ByteTokenizer
from morex.eval.loss import evaluate
from morex.loading import load_config
from morex.model.lm import build_model
from morex.study.cell import WOULD_FAIL_AGAIN, main, run_cell
from morex.study.measure import token_texts
from morex.study.plan import plan
from morex.study.results import cell_folder, collect, failure_path, is_finished
from morex.train.runs import RunFolder, write_config
from study.helpers import tiny_study

QUIET = Console(quiet=True)


def stream(tokens: int, starts: tuple[int, ...] = (0,)) -> TokenStream:
    ids = np.random.default_rng(0).integers(0, 90, tokens).astype(np.uint16)
    return TokenStream(ids, np.array(starts, dtype=np.int64), tokens)


def test_halves_predict_every_token_once() -> None:
    """The loss of the whole is the mean of the halves', weighted by predicted tokens."""
    model = build_model(load_config("vanilla", tiny=True).model, dtype=torch.float64).eval()
    whole = stream(101)
    parts = halves(whole, 16)
    assert [part.num_tokens for part in parts] == [49, 53]
    results = [evaluate(model, part, 16, 4) for part in parts]
    assert [result.tokens for result in results] == [48, 52]
    joined = sum(result.loss * result.tokens for result in results) / 100
    assert joined == pytest.approx(evaluate(model, whole, 16, 4).loss, abs=1e-9)


def test_halves_keep_documents() -> None:
    first, second = halves(stream(65, (0, 10, 32, 40, 60)), 16)
    assert first.document_starts.tolist() == [0, 10, 32]
    assert second.document_starts.tolist() == [0, 8, 28]
    assert np.array_equal(np.concatenate([first.tokens[:-1], second.tokens]), stream(65).tokens)


def test_token_texts_join_to_the_text() -> None:
    tokenizer = ByteTokenizer()
    ids = [*tokenizer.encode("naïve 日"), tokenizer.eos_id, *tokenizer.encode("b")]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == "naïve 日¶b"
    assert texts[2:4] == ["", "ï"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study folder with three cells, trained in this process."""
    folder = tmp_path_factory.mktemp("measured")
    study = tiny_study(
        folder,
        {"name": "mor-expert"},
        {"name": "moe", "set": {"model.mixer.kind": "moe", "model.mixer.router.experts": 4}},
        {"name": "oracle", "preset": "mor-expert", "set": {"model.depth.causal": "none"}},
        learning_rates=[0.01],
    )
    (folder / "study.yaml").write_text(yaml.safe_dump(study.to_dict()))
    for cell in plan(study).cells:
        run_cell(folder, study, cell, QUIET)
    return folder


def test_a_routed_cell(measured: Path) -> None:
    cell = collect(measured).cells[0]
    assert cell.status == "finished"
    measures = cell.measures
    assert measures.decode_tokens_per_s is not None
    assert measures.decode_tokens_per_s > 0
    assert measures.sample is not None
    assert measures.sample.prompt == "the "
    routing = measures.routing
    assert routing is not None
    assert routing.histogram is not None
    assert sum(routing.histogram) == routing.tokens > 0
    assert (routing.deepest, len(routing.histogram), routing.histogram[0]) == (3, 4, 0)
    assert routing.depth_map is not None
    assert len(routing.depth_map.tokens) == len(routing.depth_map.depths) == 12
    assert routing.expert_load == {}


def test_an_expert_cell(measured: Path) -> None:
    routing = collect(measured).cells[1].measures.routing
    assert routing is not None
    assert routing.histogram is None
    assert len(routing.expert_load) == 2
    for load in routing.expert_load.values():
        assert len(load) == 4
        assert sum(load) == pytest.approx(1)


def test_a_model_without_a_causal_rule_is_measured_but_not_decoded(measured: Path) -> None:
    measures = collect(measured).cells[2].measures
    assert measures.decode_tokens_per_s is None
    assert measures.sample is None
    assert "no causal rule" in (measures.refusal or "")
    assert measures.routing is not None
    assert measures.routing.histogram is not None
    assert measures.routing.histogram[1] > 0  # top-k sends a third of the tokens home after each recursion


def test_halves_are_measured_where_learning_rates_are_compared(measured: Path) -> None:
    for cell in collect(measured).cells:
        first, second = cell.measures.val_loss_first_half, cell.measures.val_loss_second_half
        assert first is not None
        assert second is not None
        assert cell.summary is not None
        assert min(first, second) <= cell.summary.val_loss <= max(first, second)


def test_a_finished_cell_is_left_alone(measured: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in measured.rglob("*") if path.is_file()}
    assert main([str(measured), "moe-s0-lr0.01"]) == 0
    assert {path: path.stat().st_mtime_ns for path in measured.rglob("*") if path.is_file()} == before


def test_an_unmeasured_cell_is_measured_without_training_again(measured: Path) -> None:
    run = cell_folder(measured, "moe-s0-lr0.01")
    before = (run / "metrics.jsonl").read_bytes()
    (run / "cell.json").unlink()
    assert main([str(measured), "moe-s0-lr0.01"]) == 0
    assert is_finished(measured, "moe-s0-lr0.01")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_cell_that_cannot_train_writes_down_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tiny_study(tmp_path)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study.to_dict()))
    run = RunFolder(cell_folder(tmp_path, "vanilla-s0"))
    run.path.mkdir(parents=True)
    write_config(run.config_path, load_config("moe"))  # somebody else's run
    assert main([str(tmp_path), "vanilla-s0"]) == WOULD_FAIL_AGAIN
    results = collect(tmp_path)
    assert results.cells[0].status == "failed"
    assert "is of another config" in (results.cells[0].error or "")
    assert failure_path(tmp_path, "vanilla-s0").is_file()
    assert "Traceback" in capsys.readouterr().err
