"""`compare` as a user meets it: a folder with a report, kept cells, refusals, a stop in the middle."""

import errno
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from morex.data.prepare import prepare
from morex.loading import ConfigError
from morex.study import local, runner
from morex.study.compare import _claim, command_of, compare
from morex.study.local import Local
from morex.study.plan import PlannedCell, plan
from morex.study.results import collect, is_finished, note_jobs, read_study
from morex.study.spec import load_study
from morex.study.worker import Worker
from morex.train.errors import DiskFullError
from study.helpers import tiny_study

pytest.importorskip("plotly")
pytest.importorskip("matplotlib")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=140)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cell_of(folder: Path, name: str) -> PlannedCell:
    return next(cell for cell in plan(read_study(folder)).cells if cell.name == name)


def runs_of(folder: Path) -> dict[str, int]:
    """Every file that training wrote, with its time."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study file with a model that trains, its twin, and one whose loss overflows."""
    folder = tmp_path_factory.mktemp("source")
    study = tiny_study(
        folder,
        {"name": "mor-expert"},
        {"name": "twin", "twin_of": "mor-expert", "twin": "equal_parameters"},
        {"name": "wild", "preset": "vanilla", "set": {"train.lr": 1e30, "train.warmup_steps": 0, "train.clip": 0}},
    )
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(study.to_dict()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The study's folder after the first call, what went to the progress console, and what was printed."""
    folder = tmp_path_factory.mktemp("studies") / "mine"
    progress, output = quiet(), quiet()
    compare(source, folder, console=progress, output=output)
    return folder, text_of(progress), text_of(output)


def test_what_the_routers_of_a_study_do(
    finished: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """benchmarks/routing.py, on the models that have a router and came to an end."""
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "routing.py"))
    target = tmp_path / "routing.json"
    monkeypatch.setattr(sys, "argv", ["routing.py", str(finished[0]), str(target)])
    script["main"]()
    [row] = json.loads(target.read_text())["rows"]
    assert (row["variant"], row["seed"], row["policy"]) == ("mor-expert", 0, "router")
    entropy = row["quantities"]["depth router entropy over the largest"]
    assert 0 < entropy["low"] <= entropy["mean"] <= entropy["high"] <= 1 and entropy["places"] >= 2


def test_the_folder_holds_everything(finished: tuple[Path, str, str]) -> None:
    folder = finished[0]
    assert {path.name for path in folder.iterdir()} >= {
        "study.yaml",
        "runs",
        "results.json",
        "table.csv",
        "report.html",
        "figures",
    }
    assert {"loss.png", "speed.png", "memory.png", "depth.png", "depth-map.png"} <= {
        path.name for path in (folder / "figures").iterdir()
    }
    run = folder / "runs" / "twin-s0"
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "summary.json", "cell.json"} <= {
        p.name for p in run.iterdir()
    }


def test_results_are_plain_json(finished: tuple[Path, str, str]) -> None:
    content = json.loads((finished[0] / "results.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert set(rows) == {"mor-expert", "twin", "wild"}
    for name in ("mor-expert", "twin"):
        assert rows[name]["val_loss"] > 0
        assert rows[name]["parameters"] > rows[name]["unique_non_embedding"] > 0
        assert rows[name]["train_flops_per_token"] > rows[name]["decode_flops_per_token"] > 0
        for key in ("tokens", "seconds", "tokens_per_s", "peak_memory_bytes", "kv_bytes_per_token", "final_train_loss"):
            assert rows[name][key] > 0
    assert rows["mor-expert"]["val_loss_oracle"] > 0
    assert rows["twin"]["val_loss_oracle"] is None
    assert content["findings"]
    assert content["cells"][0]["evaluations"][-1]["step"] == 6
    assert "training" not in content["cells"][0]


def test_a_failed_cell_is_told_and_the_others_go_on(finished: tuple[Path, str, str]) -> None:
    folder, progress, output = finished
    results = collect(folder)
    assert [cell.status for cell in results.cells] == ["finished", "finished", "failed"]
    assert "at step" in (results.cells[2].error or "")
    assert "✗ 3/3 wild-s0" in progress
    assert "wild (1 failed)" in output
    assert "The cell wild-s0 failed and is left out" in output


def test_the_table_and_the_findings_are_printed(finished: tuple[Path, str, str]) -> None:
    output = finished[2]
    for word in ("held-", "oracle", "FLOP/t", "params", "tok/s", "memory", "KV per"):
        assert word in output
    assert "• " in output
    assert "report.html" in output


def test_the_same_study_keeps_finished_cells_and_tries_failed_ones(
    source: Path, finished: tuple[Path, str, str]
) -> None:
    folder = finished[0]
    before = {name: when for name, when in runs_of(folder).items() if not name.startswith("runs/wild")}
    assert len(before) > 10
    progress = quiet()
    compare(source, folder, console=progress, output=quiet())
    after = runs_of(folder)
    assert {name: after[name] for name in before} == before
    assert "2 of 3 cells are finished already" in text_of(progress)
    assert "wild-s0" in text_of(progress)


def test_another_study_is_refused(source: Path, finished: tuple[Path, str, str]) -> None:
    folder = finished[0]
    before = runs_of(folder)
    with pytest.raises(ConfigError, match=r"holds another study: its seeds is .*; nothing was overwritten"):
        compare(source, folder, ["seeds=[7]"], console=quiet(), output=quiet())
    assert runs_of(folder) == before


def test_a_second_process_is_refused(source: Path, finished: tuple[Path, str, str]) -> None:
    from morex.train.runs import RunFolder

    with RunFolder(finished[0]).locked(), pytest.raises(ConfigError, match="in use by process"):
        compare(source, finished[0], console=quiet(), output=quiet())


def test_folders_that_hold_something_else_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear reader")
    with pytest.raises(ConfigError, match="is not empty and holds no study"):
        compare(source, tmp_path, console=quiet(), output=quiet())
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        compare(source, tmp_path / "letter.txt", console=quiet(), output=quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.corpus=/does/not/exist.txt", "exist.txt"),
        ("sample.prompt=''", r"sample\.prompt '' has no tokens"),
        ("data.tokenizer.kind=char", "X"),
    ],
)
def test_faults_of_the_data_show_before_anything_is_trained(
    source: Path, tmp_path: Path, override: str, words: str
) -> None:
    overrides = [override]
    if "char" in override:
        overrides += ["sample.prompt=X"]
    with pytest.raises(ConfigError, match=words):
        compare(source, tmp_path / "out", overrides, console=quiet(), output=quiet())
    assert not (tmp_path / "out" / "runs").exists()


def test_a_study_that_could_not_start_leaves_its_folder_free(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"exist\.txt"):
        compare(source, folder, ["data.corpus=/does/not/exist.txt"], console=quiet(), output=quiet())
    results = compare(source, folder, ["variants=[{name: vanilla}]"], console=quiet(), output=quiet())
    assert results.row("vanilla").finished


def test_a_full_disk_is_one_sentence_with_the_way_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("morex.study.compare.run_cells", full)
    with pytest.raises(DiskFullError, match=r"disk of study folder .*go on with `morex compare"):
        compare(source, tmp_path / "out", console=quiet(), output=quiet())


def test_learning_rates_need_two_windows(source: Path, tmp_path: Path) -> None:
    config = plan(load_study(source)).cells[0].config
    held_out = prepare(config.data, config.model.vocab_size, 16).val.num_tokens
    overrides = ["learning_rates=[0.1]", f"train.seq_len={held_out - 1}", f"model.max_seq_len={held_out}"]
    with pytest.raises(ConfigError, match=r"one window or example alone; raise data\.val_fraction"):
        compare(source, tmp_path / "out", overrides, console=quiet(), output=quiet())
    task = ["learning_rates=[0.1]", "data.task={kind: parity, difficulty: [1, 12], held_out: 1}"]
    with pytest.raises(ConfigError, match=r"one window or example alone; raise data\.task\.held_out 1"):
        compare(source, tmp_path / "task", task, console=quiet(), output=quiet())


def test_seconds_are_a_budget(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, {"name": "vanilla"}, budget={"kind": "seconds", "value": 0.2})
    results = compare(study, tmp_path / "out", console=quiet(), output=quiet())
    row = results.row("vanilla")
    assert row.seconds == pytest.approx(0.2, abs=0.15)
    assert results.cells[0].evaluations[-1].step == results.cells[0].summary.steps  # type: ignore[union-attr]


def wait_for(condition: "object", seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def test_an_interrupted_study_goes_on_where_it_stopped(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    overrides = ["budget.value=4000", "train.checkpoint_every=1000"]
    words = [sys.executable, "-c", PROGRAM, str(source), str(folder), *overrides]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = folder / "runs" / "mor-expert-s0" / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.stat().st_size > 500)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "go on with `morex compare" in errors
    assert not is_finished(folder, "mor-expert-s0")
    [checkpoint] = (metrics.parent / "checkpoints").iterdir()
    stopped = int(checkpoint.name.removeprefix("step-"))
    assert 0 < stopped < 4000
    with Worker(folder) as worker:
        worker.start(cell_of(folder, "mor-expert-s0"), folder / "again.log")
        wait_for(lambda: metrics.read_text().count("\n") > stopped + 5)
        assert worker.interrupt()
        wait_for(lambda: worker.poll() is not None)
        assert worker.poll() == 130
    lines = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"train"' in line]
    assert lines == list(range(1, lines[-1] + 1))
    assert lines[-1] > stopped


PROGRAM = """
import os
import sys
from rich.console import Console
from morex.study.compare import compare
from morex.study.local import Local
from morex.train.errors import Interrupted
try:
    jobs = int(os.environ.get("JOBS", "1"))
    compare(sys.argv[1], sys.argv[2], sys.argv[3:], console=Console(stderr=True, width=400), executor=Local(jobs))
except Interrupted as stop:
    print(stop, file=sys.stderr)
    sys.exit(stop.exit_code)
"""


def test_cells_run_side_by_side(source: Path, finished: tuple[Path, str, str], tmp_path: Path) -> None:
    folder, progress, output = tmp_path / "out", quiet(), quiet()
    results = compare(source, folder, console=progress, output=output, executor=Local(jobs=2))
    alone = collect(finished[0])
    assert [cell.status for cell in results.cells] == ["finished", "finished", "failed"]
    for row in ("mor-expert", "twin"):
        assert results.row(row).val_loss == pytest.approx(alone.row(row).val_loss, rel=1e-4)
    assert sorted(line.split()[1] for line in text_of(progress).splitlines() if " wild-s0" in line or "✓" in line) == [
        "1/3",
        "2/3",
        "3/3",
    ]
    assert "Up to 2 cells ran at a time" in text_of(output)
    assert "Up to" not in finished[2]
    assert results.command.endswith("--jobs 2")
    # A later call that runs one at a time does not make the times of the earlier ones comparable.
    note_jobs(folder, 1)
    assert collect(folder).jobs == 2


def test_no_more_cells_at_a_time_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: set[str] = set()
    events: list[tuple[str, int]] = []

    class Looks(Worker):
        """A cell ends at the third look, without a process."""

        def start(self, cell: PlannedCell, log: Path) -> None:
            running.add(cell.name)
            events.append((cell.name, len(running)))
            self.cell, self.looks = cell.name, 0

        def poll(self) -> int | None:
            self.looks += 1
            if self.looks < 3:
                return None
            running.discard(self.cell)
            return 0

    monkeypatch.setattr(local, "Worker", Looks)
    monkeypatch.setattr(runner, "POLL", 0.0)
    planned = plan(tiny_study(tmp_path, {"name": "vanilla"}, seeds=(0, 1, 2, 3, 4)))
    runner.run_cells(tmp_path, planned, quiet(), "", Local(jobs=3))
    assert [cell for cell, _ in events] == [f"vanilla-s{seed}" for seed in range(5)]
    assert [together for _, together in events[:3]] == [1, 2, 3]
    assert max(together for _, together in events) == 3


def test_cells_share_the_threads(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    _claim(tmp_path, load_study(source, ["train.threads=null"]))
    with Worker(tmp_path, threads=1) as worker:
        worker.start(cell_of(tmp_path, "twin-s0"), tmp_path / "twin.log")
        wait_for(lambda: worker.poll() is not None)
    assert json.loads((tmp_path / "runs" / "twin-s0" / "env.json").read_text())["threads"] == 1


def test_all_cells_in_hand_are_saved(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    overrides = ["budget.value=4000", "train.checkpoint_every=1000"]
    words = [sys.executable, "-c", PROGRAM, str(source), str(folder), *overrides]
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | {"JOBS": "2"}
    )
    metrics = [folder / "runs" / name / "metrics.jsonl" for name in ("mor-expert-s0", "twin-s0")]
    wait_for(lambda: all(path.is_file() and path.stat().st_size > 500 for path in metrics))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--jobs 2`" in errors
    for path in metrics:
        [checkpoint] = (path.parent / "checkpoints").iterdir()
        assert 0 < int(checkpoint.name.removeprefix("step-")) < 4000


@pytest.mark.parametrize(
    ("jobs", "overrides", "words"),
    [
        (0, [], "--jobs 0 must be 1 or more"),
        (2, ["budget={kind: seconds, value: 1}"], "--jobs 2 does not go with budget.kind 'seconds'"),
    ],
)
def test_jobs_that_make_no_sense_are_refused(
    source: Path, tmp_path: Path, jobs: int, overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        compare(source, tmp_path / "out", overrides, console=quiet(), output=quiet(), executor=Local(jobs))
    assert not (tmp_path / "out").exists()


def test_a_killed_cell_is_a_failed_cell(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Worker.start

    def start_and_kill(self: Worker, cell: PlannedCell, log: Path) -> None:
        start(self, cell, log)
        if cell.name.startswith("mor-expert"):
            wait_for(lambda: self.poll() is None and self.pid is not None)
            assert self.pid is not None
            os.kill(self.pid, signal.SIGKILL)

    monkeypatch.setattr(Worker, "start", start_and_kill)
    results = compare(source, tmp_path / "out", console=quiet(), output=quiet())
    assert [cell.status for cell in results.cells] == ["failed", "finished", "failed"]
    assert "was killed by signal 9, probably because memory ran out" in (results.cells[0].error or "")


def test_commands_can_be_typed_again(tmp_path: Path) -> None:
    assert command_of("demo", Path("a b"), ["seeds=[1, 2]"]) == "morex compare demo --out 'a b' --set 'seeds=[1, 2]'"
    assert command_of(load_study("demo"), Path("out"), ()) == "morex compare demo --out out"
    assert command_of("demo", Path("out"), (), Local(jobs=2)) == "morex compare demo --out out --jobs 2"
    study = tiny_study(tmp_path)
    assert command_of(study, Path("out"), ()) == "morex compare out/study.yaml --out out"


@pytest.mark.parametrize("classifies", [False, True])
def test_a_study_of_a_task_has_accuracy(tmp_path: Path, classifies: bool) -> None:
    """The sample is the first held-out question; a classifier has none."""
    task = {"kind": "pattern", "numbers": 12, "difficulty": [11, 13], "held_out": 20}
    head = ["model.head={kind: classifier}"] if classifies else []
    output = quiet()
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tiny_study(tmp_path).to_dict()), encoding="utf-8")
    changes = [f"data.task={json.dumps(task)}", *head]
    results = compare(path, tmp_path / "out", changes, console=quiet(), output=output)
    assert len(results.finished) == 2
    for row in results.finished:
        assert row.val_accuracy is not None and 0 <= row.val_accuracy <= 1
    assert "accuracy" in text_of(output)
    assert "<b>pattern</b> task" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for cell in results.cells:
        sample = cell.measures.sample
        assert sample is None if classifies else sample is not None and sample.prompt.endswith("=")
