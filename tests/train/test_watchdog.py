"""A training that hangs is ended, with the rank's name and where it stands; one that lives says so."""

import json
import re
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from morex.train import watchdog
from morex.train.listing import list_runs, status_of
from morex.train.ranks import ALONE
from morex.train.runs import RunFolder
from morex.train.watchdog import Watchdog, read_heartbeat
from train.helpers import configure, run, run_until_crash

PROGRAM = """
import sys, time
import torch
from rich.console import Console
from morex.config import Config
from morex.data.loader import Loader
from morex.loading import validate
from morex.train.trainer import train
import json, os

torch.set_num_threads(1)
draw = Loader.next_batch

def stuck_in_the_loader(self):
    if self._drawn == 8 and os.environ.get("RANK", "0") == sys.argv[2]:
        time.sleep(300)
    return draw(self)

Loader.next_batch = stuck_in_the_loader
job = json.loads(open(sys.argv[1]).read())
train(validate(Config, job["config"]), job["folder"], console=Console(quiet=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stuck"), [(1, 0), (2, 1)])
def test_a_rank_that_hangs_ends_the_training_with_its_name_and_stack(
    ranks: int, stuck: int, corpus: Path, tmp_path: Path
) -> None:
    config = configure("vanilla", corpus, "train.hang_seconds=15")
    job, program = tmp_path / "job.json", tmp_path / "program.py"
    job.write_text(json.dumps({"config": config.to_dict(), "folder": str(tmp_path / "run")}))
    program.write_text(textwrap.dedent(PROGRAM))
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [sys.executable, *launcher, program, job, str(stuck)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1, done.stderr
    who = rf"rank {stuck} of {ranks} \(process \d+ on .*\)"
    assert re.search(rf"{who} hangs since step 2.*train.hang_seconds 15", done.stderr), done.stderr
    assert "stuck_in_the_loader" in done.stderr and "time.sleep(300)" in done.stderr
    assert f"morex train --resume {tmp_path / 'run'}" in done.stderr
    assert status_of(RunFolder(tmp_path / "run")).step == 2


def test_the_heartbeat_is_there_while_it_trains_and_gone_after(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_heartbeat(folder) is None
    with Watchdog(folder, ALONE, None) as watching:
        watching.beat(3)
        found = read_heartbeat(folder)
        assert found is not None and found["ranks"] == 1 and found["age"] < 60
    assert read_heartbeat(folder) is None


def test_beats_keep_the_watchdog_still_and_their_lack_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock of its own: ten times the limit with beats, then more than the limit without."""
    now, looks, codes = [0.0], threading.Semaphore(0), []
    ended = threading.Event()

    def monotonic() -> float:
        if threading.current_thread() is not threading.main_thread():
            looks.release()
        return now[0]

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(watchdog, "BEAT", 0.01)
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=monotonic, time=time.time))
    monkeypatch.setattr(watchdog.os, "_exit", leave)
    with Watchdog(RunFolder(tmp_path), ALONE, 100.0) as watching:
        for step in range(12):
            now[0] += 90
            watching.beat(step)
            looks.acquire()
            looks.acquire()  # what the thread saw after the beat
        assert not codes
        now[0] += 101
        assert ended.wait(60)
    assert set(codes) == {watchdog.EXIT_CODE}
    assert "rank 0 of 1" in capsys.readouterr().err


def test_runs_are_listed_with_how_they_are(corpus: Path, tmp_path: Path) -> None:
    run(configure("vanilla", corpus, "train.steps=2"), tmp_path / "a" / "done")
    run_until_crash(configure("vanilla", corpus), tmp_path / "a" / "crashed", step=5)
    alive, dead = (run_until_crash(configure("vanilla", corpus), tmp_path / name, step=2) for name in ("b", "c"))
    beat = {"time": time.time(), "step": 1, "ranks": 2, "process": 1, "host": "there"}
    alive.heartbeat_path.write_text(json.dumps(beat))
    dead.heartbeat_path.write_text(json.dumps({**beat, "time": time.time() - 300}))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.yaml").write_text("model: [")
    found = {Path(status.path).name: status for status in list_runs(tmp_path)}
    assert {name: status.status for name, status in found.items()} == {
        "done": "finished", "crashed": "stopped", "b": "training", "c": "silent", "d": "damaged"
    }  # fmt: skip
    assert (found["done"].step, found["done"].steps, found["crashed"].step) == (2, 2, 4)
    assert found["done"].val_loss is not None and found["crashed"].val_loss is None
    assert found["b"].ranks == 2 and found["b"].host == "there"
    assert 290 < (found["c"].heartbeat_age or 0) < 400
