"""Rows are averages of what stands in run folders, which are written by hand here."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from morex.loading import ConfigError
from morex.study.findings import findings
from morex.study.records import Measures, Results, Routing
from morex.study.results import collect, read_study, spread
from morex.study.spec import StudyConfig
from study.helpers import tiny_study

SUMMARY = {
    "steps": 6,
    "tokens": 192,
    "seconds": 2.0,
    "train_flops": 1.92e5,
    "final_train_loss": 2.1,
    "val_loss": 2.0,
    "perplexity": 7.4,
    "bits_per_byte": 3.0,
    "tokens_per_s": 96.0,
    "peak_memory_bytes": 1000,
    "parameters": 50,
    "unique_non_embedding": 40,
    "train_flops_per_token": 1000.0,
    "decode_flops_per_token": 300.0,
    "kv_bytes_per_token": 64.0,
    "finished": True,
}
METRICS = [
    {"kind": "train", "step": 1, "tokens": 32, "loss": 5.0, "seconds": 0.3},
    {"kind": "eval", "step": 3, "tokens": 96, "seconds": 1.0, "flops": 96_000.0, "val_loss": 3.0},
    {"kind": "eval", "step": 6, "tokens": 192, "seconds": 2.0, "flops": 192_000.0, "val_loss": 2.0},
]


def write_study(folder: Path, **changes: Any) -> StudyConfig:
    study = tiny_study(folder, **changes)
    (folder / "study.yaml").write_text(yaml.safe_dump(study.to_dict()), encoding="utf-8")
    return study


def write_cell(folder: Path, name: str, measures: Measures | None = None, **summary: Any) -> Path:
    run = folder / "runs" / name
    run.mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps(SUMMARY | summary), encoding="utf-8")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS), encoding="utf-8")
    (run / "env.json").write_text(json.dumps({"threads": 3}), encoding="utf-8")
    (run / "cell.json").write_text((measures or Measures()).model_dump_json(), encoding="utf-8")
    return run


def test_means_and_spread_over_seeds(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=[0, 1])
    write_cell(tmp_path, "vanilla-s0", val_loss=2.0, tokens_per_s=90.0)
    write_cell(tmp_path, "vanilla-s1", val_loss=2.4, tokens_per_s=110.0)
    write_cell(tmp_path, "mor-expert-s0", val_loss=1.9, val_loss_oracle=1.5)
    write_cell(tmp_path, "mor-expert-s1", val_loss=2.1, val_loss_oracle=1.7)
    results = collect(tmp_path, "morex compare this")
    dense, routed = results.rows
    assert dense.val_loss == pytest.approx(2.2)
    assert dense.val_loss_spread == pytest.approx(0.2 * 2**0.5)
    assert dense.val_loss_oracle is None
    assert dense.tokens_per_s == 100
    assert (routed.val_loss, routed.val_loss_oracle) == (pytest.approx(2.0), pytest.approx(1.6))
    assert (dense.seeds, dense.failed) == (2, 0)
    assert (dense.parameters, dense.unique_non_embedding, dense.kv_bytes_per_token) == (50, 40, 64)
    assert results.environment == {"threads": 3}
    assert results.command == "morex compare this"
    assert results.configs["vanilla"]["model"]["d_model"] == 16


def test_curves_come_from_the_metrics(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_cell(tmp_path, "vanilla-s0")
    cell = collect(tmp_path).cells[0]
    assert [(point.step, point.flops, point.val_loss) for point in cell.evaluations] == [
        (3, 96_000, 3),
        (6, 192_000, 2),
    ]
    # A training line has no FLOPs of its own: tokens times FLOPs per token.
    assert [(point.loss, point.flops) for point in cell.training] == [(5.0, 32_000)]


def test_cells_that_failed_or_wait_have_no_numbers(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=[0, 1])
    write_cell(tmp_path, "vanilla-s0", val_loss=2.0)
    (tmp_path / "runs" / "vanilla-s1.failed.json").write_text('{"cell": "vanilla-s1", "error": "it is nan"}')
    results = collect(tmp_path)
    dense, routed = results.rows
    assert (dense.val_loss, dense.val_loss_spread, dense.seeds, dense.failed) == (2.0, None, 1, 1)
    assert (routed.val_loss, routed.seeds, routed.finished) == (None, 0, False)
    assert [cell.status for cell in results.cells] == ["finished", "missing", "failed", "missing"]
    assert results.cells[2].error == "it is nan"


def test_a_run_that_was_not_measured_is_not_finished(tmp_path: Path) -> None:
    write_study(tmp_path)
    (write_cell(tmp_path, "vanilla-s0") / "cell.json").unlink()
    assert collect(tmp_path).cells[0].status == "missing"


def test_the_best_learning_rate_is_chosen_on_one_half_and_reported_on_the_other(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=[0, 1], learning_rates=[0.1, 0.2, 0.3])
    halves = {0.1: (3.0, 1.0), 0.2: (2.0, 2.5), 0.3: (1.0, 1.0)}
    for seed in (0, 1):
        for lr, (first, second) in halves.items():
            if (lr, seed) == (0.3, 1):
                continue  # one seed of the best rate has not finished, so the rate is out
            measures = Measures(val_loss_first_half=first + seed, val_loss_second_half=second + seed / 10)
            write_cell(tmp_path, f"vanilla-s{seed}-lr{lr}", measures, val_loss=2.2)
    row = collect(tmp_path).row("vanilla")
    assert row.lr == 0.2
    assert row.val_loss == pytest.approx(2.55)
    assert row.val_loss_spread == pytest.approx(0.1 / 2**0.5)
    assert [rate.lr for rate in row.learning_rates] == [0.1, 0.2, 0.3]
    assert row.learning_rates[0].first_half == pytest.approx(3.5)
    assert row.learning_rates[2].first_half is None
    assert row.learning_rates[1].full == pytest.approx(2.2)


def test_an_oracle_loss_does_not_pass_for_a_causal_one(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_cell(tmp_path, "vanilla-s0", val_loss=2.0)
    write_cell(tmp_path, "mor-expert-s0", val_loss=1.5, val_loss_oracle=1.5, val_loss_is_oracle=True)
    results = collect(tmp_path)
    row = results.row("mor-expert")
    assert (row.val_loss, row.bits_per_byte, row.val_loss_oracle, row.tokens_per_s) == (None, None, 1.5, 96)
    sentences = findings(results)
    assert sentences[0] == "The dense `vanilla` reached a held-out loss of 2.000."
    assert "`mor-expert` has no causal rule, so it has an oracle loss alone (1.500) and is left out." in sentences


def test_measures_are_averaged_and_depth_is_a_mean(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=[0, 1])
    for seed, counts in enumerate(((0, 1, 0, 1), (0, 0, 0, 2))):
        measures = Measures(decode_tokens_per_s=10.0 + seed, routing=Routing(tokens=2, deepest=3, histogram=counts))
        write_cell(tmp_path, f"mor-expert-s{seed}", measures)
    row = collect(tmp_path).row("mor-expert")
    assert row.decode_tokens_per_s == 10.5
    assert row.mean_depth == 2.5


def test_results_can_be_read_back(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_cell(tmp_path, "vanilla-s0")
    results = collect(tmp_path)
    assert Results.model_validate_json(results.model_dump_json()) == results


def test_a_folder_that_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a study folder: it has no study\.yaml"):
        read_study(tmp_path)


def test_spread_of_one() -> None:
    assert spread([1.0]) is None
    assert spread([1.0, 3.0]) == pytest.approx(2**0.5)
