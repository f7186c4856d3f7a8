"""Cells on Ray: the numbers of a study that runs here, tries after a loss, a stop that saves, and what is refused."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from morex.loading import ConfigError
from morex.study import cluster
from morex.study.cell import main as cell_main
from morex.study.cluster import Cluster
from morex.study.compare import _claim, command_of, compare
from morex.study.local import Local
from morex.study.records import Results
from morex.study.results import collect
from morex.study.spec import load_study
from study.helpers import tiny_study

ray = pytest.importorskip("ray", reason="the package ray of the extra `ray` is not installed")
LONG = ("budget.value=4000", "train.checkpoint_every=20", "variants=[{name: vanilla}]")
KILLED = (
    "budget.value=300",
    "train.checkpoint_every=50",
    "train.log_every=5",
    "train.eval_every=150",
    "variants=[{name: vanilla}]",
)
MEASURED = {"seconds", "tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes"}
"""What differs from one run to the next."""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take the longest, and test_compare.py has them."""
    monkeypatch.setattr("morex.study.compare.write_pictures", lambda *_: None)


@pytest.fixture(scope="module")
def address(cache_folder: Path) -> Iterator[str]:
    """A Ray with two CPUs that this process has joined."""
    cluster._imported()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL", address="local")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study file with a dense model, one whose loss overflows, and one that learns on two threads."""
    folder = tmp_path_factory.mktemp("source")
    study = tiny_study(
        folder,
        {"name": "vanilla"},
        {"name": "wild", "preset": "vanilla", "set": {"train.lr": 1e30, "train.warmup_steps": 0, "train.clip": 0}},
        {"name": "mor-expert", "set": {"train.threads": 2}},
    )
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(study.to_dict()), encoding="utf-8")
    return path


def run(source: Path, folder: Path, executor: Any, *overrides: str) -> tuple[Results, str]:
    """The results of a study and what was shown on the way."""
    progress = Console(file=io.StringIO(), width=400)
    results = compare(source, folder, overrides, console=progress, output=Console(quiet=True), executor=executor)
    assert isinstance(progress.file, io.StringIO)
    return results, progress.file.getvalue()


def numbers(results: Results) -> list[dict[str, Any]]:
    """The table without what a clock measures, the curves, the samples, and the sentences of cells that failed."""
    rows = [{key: value for key, value in row if key not in MEASURED} for row in results.rows]
    cells = [
        {
            "error": cell.error,
            "losses": [(point.step, point.val_loss) for point in cell.evaluations],
            "training": [(point.step, point.loss) for point in cell.training],
            "sample": cell.measures.sample,
            "routing": cell.measures.routing,
        }
        for cell in results.cells
    ]
    return [*rows, *cells]


def wait_for(condition: Callable[[], Any], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def process_of(cell: str) -> int | None:
    """The process that runs a cell; Ray gives it the name of its task."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.joinpath("cmdline").read_bytes().startswith(f"ray::{cell}".encode()):
                return int(folder.name)
        except OSError:
            continue
    return None


@pytest.mark.slow
def test_the_same_study_has_the_same_numbers(address: str, source: Path, tmp_path: Path) -> None:
    here, _ = run(source, tmp_path / "here", Local())
    there, shown = run(source, tmp_path / "there", Cluster())
    assert numbers(there) == numbers(here)
    assert [cell.status for cell in there.cells] == ["finished", "failed", "finished"]
    assert "at step" in str(there.cells[1].error) and "follows" not in shown  # it would fail again in the same way
    assert there.row("mor-expert").val_loss
    assert {path.name for path in (tmp_path / "there").iterdir()} >= {"table.csv", "report.html", "results.json"}
    assert not list((tmp_path / "there").glob(".shared*"))


@pytest.fixture(scope="module")
def straight(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The numbers of a longer cell that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    study = load_study(source, KILLED)
    _claim(folder, study)
    assert cell_main([str(folder), "vanilla-s0"]) == 0
    return numbers(collect(folder))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_a_process_that_dies_is_started_again(
    address: str,
    source: Path,
    straight: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shared: bool,
) -> None:
    """The cell goes on from its checkpoint; where machines share no files, from the one that has come back."""

    def often(*words: Any) -> int:
        from morex.study import errand

        errand.REPORT = 0.05
        return errand.run_errand(*words)

    monkeypatch.setattr(cluster, "run_errand", often)
    if not shared:
        monkeypatch.setattr(cluster, "_mark", lambda folder: folder / ".shared-with-nobody")
    run_folder = tmp_path / "there" / "runs" / "vanilla-s0"

    def kill() -> None:
        wait_for(lambda: list(run_folder.glob("checkpoints/step-*")))
        process = process_of("vanilla-s0")
        assert process is not None
        os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    there, shown = run(source, tmp_path / "there", Cluster(), *KILLED)
    killer.join()
    assert re.search(r"✗ 1/1 vanilla-s0 .* its process on \S+ died: .*; try 2 of 3 follows\n✓ 1/1 vanilla-s0", shown)
    resumed = json.loads((run_folder / "env.json").read_text())["resumed"]
    assert len(resumed) == 1 and resumed[0]["step"] >= 50
    assert numbers(there) == straight
    assert not (tmp_path / "there" / "runs" / "vanilla-s0.failed.json").exists()


@pytest.mark.slow
def test_a_stop_saves_and_the_study_goes_on(address: str, source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "morex", "compare", str(source), "--out", str(tmp_path / "out")]
    command += [word for change in LONG for word in ("--set", change)]
    command += ["--set", "seeds=[0, 1, 2]", "--on", "ray", "--ray-address", address]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = [tmp_path / "out" / "runs" / f"vanilla-s{seed}" / "metrics.jsonl" for seed in (0, 1)]
    wait_for(lambda: all(path.is_file() and path.stat().st_size > 500 for path in metrics))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert re.fullmatch(r"stopping after this step.*\nstopped; what is trained is kept, go on with `.*`\n", errors)
    assert f"--on ray --ray-address {address}`" in errors
    for path in metrics:
        newest = max(int(folder.name.removeprefix("step-")) for folder in path.parent.glob("checkpoints/step-*"))
        last = json.loads(path.read_text().splitlines()[-1])["step"]
        assert 0 < newest == last < 4000
    assert {cell.status for cell in collect(tmp_path / "out").cells} == {"missing"}
    assert process_of("vanilla") is None


def test_a_process_that_always_dies_is_a_failed_cell(
    address: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "run_errand", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    results, shown = run(source, tmp_path / "out", Cluster(retries=1), "variants=[{name: vanilla}]")
    assert shown.count("try 2 of 2 follows") == 1 and "try 3" not in shown
    assert results.cells[0].status == "failed" and "died" in str(results.cells[0].error)


def test_a_machine_without_the_library_is_a_failed_cell(
    address: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'morex'")

    monkeypatch.setattr(cluster, "run_errand", lacking)
    results, shown = run(source, tmp_path / "out", Cluster(), "variants=[{name: vanilla}]")
    assert "follows" not in shown
    says = r"lacks what the cell needs \(.*No module named 'morex'\); install the same version"
    assert re.search(says, str(results.cells[0].error))


@pytest.mark.parametrize(
    ("executor", "overrides", "words"),
    [
        (Cluster(cpus=3), [], r"cell 'vanilla-s0' needs 3 CPUs, and the largest machine .* has 2; lower --cell-cpus"),
        (Cluster(), ["train.threads=5"], r"needs 5 CPUs"),
        (Cluster(), ["train.device=cuda"], r"train\.device 'cuda' is not there: no machine of the Ray cluster has"),
    ],
)
def test_what_no_machine_has_is_refused(
    address: str, source: Path, tmp_path: Path, executor: Cluster, overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run(source, tmp_path / "out", executor, *overrides)
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize(
    ("executor", "overrides", "words"),
    [
        (Cluster("here"), [], "--ray-address 'here' must be HOST:PORT"),
        (Cluster(jobs=0), [], "--jobs 0 must be 1 or more"),
        (Cluster(cpus=0), [], "--cell-cpus 0 must be 1 or more"),
        (Cluster(), ["budget={kind: seconds, value: 1}"], "--on ray does not go with budget.kind 'seconds'"),
        (Cluster(), ["train.device=cuda:1"], "train.device 'cuda:1' does not go with --on ray"),
    ],
)
def test_what_makes_no_sense_is_refused(
    source: Path, tmp_path: Path, executor: Cluster, overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        run(source, tmp_path / "out", executor, *overrides)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_that_does_not_answer_is_refused(source: Path, tmp_path: Path, scheme: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"--ray-address '{address}' does not answer"):
            run(source, tmp_path / "out", Cluster(address))
    assert not (tmp_path / "out").exists()


def test_something_else_at_the_address_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "HEALTHY", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"'{address}' takes connections, but there is no Ray"):
            run(source, tmp_path / "out", Cluster(address))


def test_without_the_package_it_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--on ray needs ray, .*pip install 'morex\[ray\]'"):
        run(source, tmp_path / "out", Cluster())


def test_commands_can_be_typed_again() -> None:
    executor = Cluster("head:6379", cpus=4, jobs=2, retries=0)
    expected = "morex compare demo --out out --on ray --ray-address head:6379 --cell-cpus 4 --jobs 2 --retries 0"
    assert command_of("demo", Path("out"), (), executor) == expected
    assert command_of("demo", Path("out"), (), Cluster()) == "morex compare demo --out out --on ray"
