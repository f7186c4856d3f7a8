"""What is shown and measured on the way: progress, peak memory."""

import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from morex.train import memory, progress
from morex.train.memory import PeakMemory
from morex.train.progress import ProgressDisplay
from morex.train.trainer import train
from train.helpers import QUIET, configure

MEGABYTE = 2**20


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_elsewhere_than_on_a_terminal_lines_are_few(corpus: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    train(configure("mor-expert", corpus, "train.eval_every=3"), tmp_path / "run", console=console)
    first, last = shown(console).splitlines()
    assert first.startswith("step 3: held-out loss ") and "(oracle " in first and "tokens/s" in first
    assert last.startswith("step 6: held-out loss ")


def test_a_quiet_console_shows_nothing(corpus: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), quiet=True)
    train(configure("vanilla", corpus), tmp_path / "run", console=console)
    assert shown(console) == ""


def test_a_terminal_shows_a_bar_with_the_time_left(corpus: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    train(configure("vanilla", corpus), tmp_path / "run", console=console)
    assert "0/6" in shown(console) and "left" in shown(console) and "held-out loss" in shown(console)


def test_plain_lines_come_at_intervals_and_estimate_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=160)
    with ProgressDisplay(console, total=1000, done=100, unit="steps") as display:
        for step in range(101, 401):
            now += 0.5
            display.update(step, loss=2.5, tokens_per_second=1234.0)
    lines = shown(console).splitlines()
    assert len(lines) == 5  # 150 seconds, one line every 30
    # 300 steps in 2.5 minutes: the other 600 take 5.
    assert lines[-1] == "steps 400/1,000: loss 2.5000  1,234 tokens/s, about 5 min left"


@pytest.fixture
def measure() -> Iterator[PeakMemory]:
    yield PeakMemory(torch.device("cpu"))


def test_peak_memory_is_what_was_used_at_most_since_the_start(measure: PeakMemory) -> None:
    if not measure.is_exact:
        pytest.skip("this system does not reset the peak of a process")
    assert measure.bytes() < 8 * MEGABYTE
    block = torch.ones(64 * MEGABYTE // 4)
    del block
    assert 62 * MEGABYTE < measure.bytes() < 80 * MEGABYTE
    with measure.left_out():
        block = torch.ones(256 * MEGABYTE // 4)
        del block
    assert 62 * MEGABYTE < measure.bytes() < 80 * MEGABYTE


def test_where_the_system_does_not_reset_the_peak_that_of_the_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_reset_high_water_mark", lambda: False)
    measured = PeakMemory(torch.device("cpu"))
    assert not measured.is_exact
    before = memory._process_peak()
    block = torch.ones(int(before * 1.1) // 4)
    assert measured.bytes() >= before * 1.1 - measured.start > 0
    del block


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
IN_HUGE_PAGES = """
import re, torch
from pathlib import Path
from morex.train.memory import PeakMemory, keep_freed_memory

keep_freed_memory()
memory = PeakMemory(torch.device("cpu"))
for _ in range(2):
    tensors = [torch.ones(2**20) for _ in range(64)]
    print(re.search(r"AnonHugePages:\\s+(\\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1])
    del tensors
    with memory.left_out():
        pass
"""


def test_linux_gives_a_training_huge_pages() -> None:
    """Also after an evaluation, before which the heap was trimmed."""
    if not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text(encoding="ascii"):
        pytest.skip("this system has no transparent huge pages")
    done = subprocess.run([sys.executable, "-c", IN_HUGE_PAGES], capture_output=True, text=True, check=True)
    assert all(int(size) * 1024 > 100 * MEGABYTE for size in done.stdout.split())
    assert len(done.stdout.split()) == 2


def test_memory_grows_with_the_batch(corpus: Path, tmp_path: Path) -> None:
    wide = ("model.d_model=128", "train.seq_len=64", "train.steps=2", "data.val_fraction=0.1")
    peaks = []
    for size in (2, 64):
        config = configure("vanilla", corpus, *wide, f"train.batch_size={size}")
        peaks.append(train(config, tmp_path / str(size), console=Console(quiet=True))["peak_memory_bytes"])
    assert peaks[1] > peaks[0] + 10 * MEGABYTE


def training_lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def test_every_expert_router_is_logged_by_itself(corpus: Path, tmp_path: Path) -> None:
    overrides = ("model.schedule.layers=2", "model.mixer.router.bias_rate=0.01")
    train(configure("moe", corpus, *overrides), tmp_path / "run", console=QUIET)
    for line in training_lines(tmp_path / "run"):
        for name in ("expert_balance", "expert_z"):
            layers = line[name]
            assert len(layers) == 2
            assert sum(layers.values()) / 2 == pytest.approx(line["losses"][name], rel=1e-4)
        for path, load in line["expert_load"].items():
            bias = torch.tensor(line["router_state"][path]["bias"])
            # The busiest expert has been pushed down and the idlest up; here the loads of one step are not even.
            if line["step"] == 1:
                expected = (1 / len(load) - torch.tensor(load)).sign() * 0.01
                torch.testing.assert_close(bias, expected)


@pytest.mark.parametrize("parts", [1, 2])
def test_how_long_tokens_ponder_is_logged(parts: int, corpus: Path, tmp_path: Path) -> None:
    overrides = ("model.depth.initial_bias=0.0", f"train.accumulation={parts}")
    train(configure("mor-act", corpus, *overrides), tmp_path / "run", console=QUIET)
    for line in training_lines(tmp_path / "run"):
        ((name, shares),) = line["active_share"].items()
        updates, remainder, ponder = (line[key][name] for key in ("mean_updates", "remainder", "ponder"))
        assert updates == pytest.approx(sum(shares))
        assert 1 < updates <= 3
        assert 0 < remainder <= 1
        assert ponder == pytest.approx(updates + remainder)
        assert line["losses"]["ponder"] == pytest.approx(ponder, rel=1e-5)
        assert line["loss_ponder"] == line["losses"]["ponder"]


def test_what_depth_routers_have_moved_to_is_logged(corpus: Path, tmp_path: Path) -> None:
    train(configure("mor-threshold", corpus), tmp_path / "threshold", console=QUIET)
    *_, last = training_lines(tmp_path / "threshold")
    ((name, state),) = last["router_state"].items()
    saved = load_file(tmp_path / "threshold" / "checkpoints" / "step-6" / "model.safetensors")[f"{name}.threshold"]
    assert state["threshold"] == [None, *saved[1:].tolist()]
    train(configure("mor-token", corpus), tmp_path / "token", console=QUIET)
    for line in training_lines(tmp_path / "token"):
        (entropy,) = line["router_entropy"].values()
        assert 0 < entropy <= math.log(3) + 1e-6
