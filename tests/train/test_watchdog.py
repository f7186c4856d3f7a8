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


class Turns(threading.Event):
    """Waits by a clock of its own, which goes on when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.now, self.extra = 0.0, 0.0
        self.looked, self.turns = threading.Semaphore(0), threading.Semaphore(0)
        clock = SimpleNamespace(monotonic=lambda: self.now, time=time.time)
        monkeypatch.setattr(watchdog, "time", clock)

    def wait(self, timeout: float | None = None) -> bool:
        self.looked.release()
        self.turns.acquire()
        assert timeout is not None
        self.now += timeout + self.extra
        self.extra = 0.0
        return self.is_set()

    def go_on(self, looks: int) -> None:
        """Has the thread that waits look so many times."""
        for _ in range(looks):
            self.turns.release()
            self.looked.acquire()


def test_beats_keep_the_watchdog_still_and_their_lack_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten times the limit with beats, as long again while the process is stopped, then the limit without either."""
    clock, codes = Turns(monkeypatch), []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    watching = Watchdog(RunFolder(tmp_path), ALONE, 100.0)
    watching._ended = clock
    with watching:
        clock.looked.acquire()
        for step in range(12):
            clock.go_on(looks=18)
            watching.beat(step)
        clock.extra = 1000.0
        clock.go_on(looks=18)
        assert clock.now > 2000 and not codes
        clock.go_on(looks=2)
        assert not codes
        clock.go_on(looks=1)
        assert codes == [watchdog.EXIT_CODE]
        clock.turns.release()
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
