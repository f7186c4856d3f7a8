"""Trackers are told what metrics.jsonl has, find their run again, and never end a training."""

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from morex.loading import ConfigError
from morex.train import trackers
from morex.train.errors import Interrupted
from morex.train.runs import RunFolder
from morex.train.trackers import Trackers, numbers
from morex.train.trainer import train
from train.helpers import QUIET, configure, run, run_until_crash

EVERY = ("train.eval_every=2", "train.checkpoint_every=3")


def told(folder: RunFolder) -> dict[tuple[str, int], float]:
    """(name, step) -> value of all that trackers should know of a run."""
    return {
        (f"{line['kind']}/{name}", line["step"]): value
        for line in folder.metrics()
        for name, value in numbers(line).items()
        if name != "step"
    }


def in_tensorboard(folder: RunFolder) -> dict[tuple[str, int], float]:
    """What the event files of a run hold; a value that came twice counts as an error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    found = [((tag, event.step), event.value) for tag in reader.Tags()["scalars"] for event in reader.Scalars(tag)]
    assert len(found) == len(dict(found))
    return dict(found)


def test_numbers_are_named_by_their_path() -> None:
    line = {
        "kind": "train",
        "loss": 2.5,
        "none": None,
        "yes": True,
        "load": {"a": [0.25, 0.75]},
        "deep": {"b": {"c": 1}},
    }
    assert numbers(line) == {"loss": 2.5, "load/a/1": 0.25, "load/a/2": 0.75, "deep/b/c": 1}


def test_tensorboard_holds_what_the_metrics_hold(corpus: Path, tmp_path: Path) -> None:
    config = configure("more-tuned", corpus, *EVERY, "train.trackers=[tensorboard]")
    finished = run(config, tmp_path / "run")
    expected, found = told(finished), in_tensorboard(finished)
    assert found.keys() == expected.keys() and len(found) > 100
    for key, value in expected.items():
        assert np.float32(found[key]) == np.float32(value), key
    assert ("train/loss", 6) in found and ("eval/val_loss", 4) in found
    assert ("train/expert_load/stack.core.blocks.0.mixer.router/1", 1) in found


def test_a_run_that_goes_on_tells_each_line_once(corpus: Path, tmp_path: Path) -> None:
    """It died in step 5, and goes on from step 3: steps 4 and 5 are computed again."""
    config = configure("vanilla", corpus, *EVERY, "train.trackers=[tensorboard]")
    broken = run_until_crash(config, tmp_path / "run", step=5)
    assert max(step for _, step in in_tensorboard(broken)) == 4
    resumed = run(config, tmp_path / "run", resume=True)
    found, expected = in_tensorboard(resumed), told(resumed)
    assert found.keys() == expected.keys()
    assert found[("train/loss", 5)] == np.float32(expected[("train/loss", 5)])


def test_a_tracker_that_comes_later_is_told_what_was_before(corpus: Path, tmp_path: Path) -> None:
    config = configure("vanilla", corpus, *EVERY, "train.schedule=constant")
    run(config, tmp_path / "run")
    more = {"trackers": ("tensorboard",), "steps": 8}
    resumed = run(
        config.model_copy(update={"train": config.train.model_copy(update=more)}), tmp_path / "run", resume=True
    )
    assert in_tensorboard(resumed).keys() == told(resumed).keys()


@pytest.mark.parametrize(
    ("error", "failed"), [(None, False), (Interrupted("stopped", 15, exit_code=0), False), (OSError("broken"), True)]
)
def test_a_run_that_a_signal_has_stopped_has_not_failed(
    error: Exception | None, failed: bool, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[bool] = []
    guest = SimpleNamespace(log=lambda values, step: None, close=ends.append)
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda *arguments: guest)
    config = configure("vanilla", corpus, "train.trackers=[tensorboard]")
    with contextlib.suppress(Interrupted, OSError), Trackers(RunFolder(tmp_path), config, QUIET):
        if error is not None:
            raise error
    assert ends == [failed]


def test_a_tracker_that_fails_is_left_out_and_said_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, Mapping[str, float]]] = []

    class Fake:
        def __init__(self, *arguments: Any) -> None:
            print("a guest that talks")

        def log(self, values: Mapping[str, float], step: int) -> None:
            logged.append((step, values))

        def close(self, failed: bool) -> None:
            assert not failed
            raise OSError("cannot\nclose")

    class Failing(Fake):
        def log(self, values: Mapping[str, float], step: int) -> None:
            if step == 3:
                raise RuntimeError("the server is gone")
            super().log(values, step)

    class Absent(Fake):
        def __init__(self, *arguments: Any) -> None:
            raise ConnectionError("nobody there")

    for name, kind in (("tensorboard", Fake), ("trackio", Failing), ("wandb", Absent)):
        monkeypatch.setitem(trackers.TRACKERS, name, kind)
    monkeypatch.setattr(trackers, "PACKAGES", dict.fromkeys(trackers.PACKAGES, "torch"))
    console, out = Console(file=io.StringIO(), width=200), io.StringIO()
    config = configure("vanilla", corpus, "train.trackers=[tensorboard, trackio, wandb]")
    with contextlib.redirect_stdout(out):
        summary = train(config, tmp_path / "run", console=console)
    assert summary["finished"] and out.getvalue() == ""
    assert isinstance(console.file, io.StringIO)
    said = [line for line in console.file.getvalue().splitlines() if "tracker" in line]
    assert said == [
        "tracker wandb has failed (ConnectionError: nobody there); training goes on without it",
        "tracker trackio has failed (RuntimeError: the server is gone); training goes on without it",
        "tracker tensorboard has failed (OSError: cannot close); training goes on without it",
    ]
    steps = [step for step, values in logged if "train/loss" in values]
    assert steps == [1, 1, 2, 2, 3, 4, 5, 6]


def test_a_tracker_whose_package_is_absent_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.PACKAGES, "wandb", "no_such_package")
    config = configure("vanilla", corpus, "train.trackers=[wandb]")
    with pytest.raises(ConfigError, match=r"names 'wandb', which needs .* pip install 'morex\[track\]'"):
        train(config, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"train\.trackers"):
        configure("vanilla", corpus, "train.trackers=[mlflow]")


def test_trackio_keeps_one_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at the import
    pytest.importorskip("trackio", reason="trackio is not installed (extra `track`)")
    config = configure("vanilla", corpus, *EVERY, "train.trackers=[trackio]", "train.project=tests")
    run_until_crash(config, tmp_path / "run", step=5)
    finished = run(config, tmp_path / "run", resume=True)
    from trackio.sqlite_storage import SQLiteStorage

    [name] = SQLiteStorage.get_runs("tests")
    rows = SQLiteStorage.get_logs("tests", name)
    found = [((key, row["step"]), value) for row in rows for key, value in row.items() if "/" in key]
    expected = told(finished)
    assert name.startswith("run-") and len(found) == len(dict(found)) and dict(found).keys() == expected.keys()
    # Of steps that were computed again, speed and memory are those of the first time.
    timed = ("seconds", "_per_s", "memory_bytes")
    assert all(value == expected[key] for key, value in found if not key[0].endswith(timed))
    assert list((tmp_path / "trackio").glob("tests*.db"))


def test_wandb_keeps_one_run_offline(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (extra `track`)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = configure("vanilla", corpus, *EVERY, "train.trackers=[wandb]")
    run(config, tmp_path / "run")
    identity = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    [kept] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert kept.name.endswith(f"-{identity}") and list(kept.glob("*.wandb"))
