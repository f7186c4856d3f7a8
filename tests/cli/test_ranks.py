"""`morex train --ranks`: several processes behind one command line."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.shell import TINY, Shell
from morex.train.runs import RunFolder

MOREX = [sys.executable, "-m", "morex"]
BATCH = ("--set", "train.batch_size=4")


def free_port() -> int:
    """A port of this machine at which nothing answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ranks(*words: str | Path, count: int = 2) -> subprocess.CompletedProcess[str]:
    """A training on so many ranks."""
    command = [*MOREX, "train", *map(str, words), *TINY, *BATCH, "--ranks", str(count)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_one_of_them_speaks(shell: Shell) -> None:
    done = ranks("mor-expert", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss ") == 1 and done.stderr.count("Next: morex eval run") == 1
    summary = RunFolder(Path("run")).summary()
    assert summary is not None and summary["steps"] == 3
    shell.succeeds("eval", "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "count", "sentence"),
    [
        (["--set", "train.batch_size=5"], 2, "train.batch_size 5 cannot be divided over 2 ranks"),
        (["--set", "train.shards=3"], 2, "train.shards 3 does not divide the 2 ranks"),
        (["--set", "train.device=cuda:0"], 2, "train.device 'cuda:0' is one device for 2 ranks"),
        (["--set", "train.device=cuda"], 2, "device 'cuda' is not there: this machine has 0 CUDA devices"),
        (["--set", "data.corpus=missing.txt"], 2, "missing.txt"),
        (["--out", "taken"], 2, "run folder 'taken' holds a run"),
    ],
)
def test_a_mistake_is_said_once_and_ends_all(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, words: list[str], count: int, sentence: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if "taken" in words:
        Path("taken").mkdir()
        Path("taken/config.yaml").write_text("model: {}\n")
    command = [*MOREX, "train", "vanilla", *TINY, *BATCH, *words, "--ranks", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert sentence in done.stderr


@pytest.mark.slow
def test_ranks_that_were_given_different_configs_end(shell: Shell) -> None:
    """As where two machines are started with two commands."""
    commands = [
        [*MOREX, "train", "vanilla", "--out", "run", *TINY, *BATCH, "--set", f"train.lr={lr}"] for lr in (0.1, 0.2)
    ]
    port = str(free_port())
    here = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0"}
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **here, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    (_, first), (_, second) = (process.communicate(timeout=300) for process in processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert "train.lr is 0.1 on rank 0 and 0.2 on rank 1" in first and second == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_the_others_ends(shell: Shell, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """The first, which the others do not come to, and one that finds no first."""
    monkeypatch.setattr("morex.train.ranks.MEETS", 1)
    port = free_port()
    here = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in here.items():
        monkeypatch.setenv(name, str(value))
    sentence = shell.refuses("train", "vanilla", "--out", "run", *TINY)
    assert f"the 2 ranks of this training have not found each other at MASTER_ADDR:MASTER_PORT '127.0.0.1:{port}'" in (
        sentence
    )
    assert not Path("run").exists()


@pytest.mark.parametrize("node", [0, 1])
def test_a_machine_without_the_others_ends(shell: Shell, monkeypatch: pytest.MonkeyPatch, node: int) -> None:
    monkeypatch.setattr("morex.cli.launch.JOINS", 1)
    head = f"127.0.0.1:{free_port()}"
    words = ["--nodes", "2", "--node", str(node), "--head", head, "--ranks", "1"]
    sentence = shell.refuses("train", "vanilla", "--out", "run", *TINY, *words)
    assert f"--head '{head}': the 2 machines have not found each other there in 1 seconds" in sentence
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--nodes", "2"], "--nodes, --node and --head go together; --node and --head missing"),
        (["--nodes", "2", "--node", "2", "--head", "one:29500"], "--node 2 must be below --nodes 2"),
        (["--nodes", "2", "--node", "0", "--head", "one"], "--head 'one' must be HOST:PORT"),
        (["--nodes", "2", "--node", "0", "--head", "one:99999"], "--head 'one:99999' must be HOST:PORT"),
    ],
)
def test_machines_that_make_no_sense_are_refused(shell: Shell, words: list[str], sentence: str) -> None:
    assert sentence in shell.refuses("train", "vanilla", *TINY, *words)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_at_the_same_step(shell: Shell, number: signal.Signals) -> None:
    command = [*MOREX, "train", "vanilla", "--out", "run", *TINY, *BATCH, "--ranks", "2", "--set", "train.steps=100000"]
    command += ["--set", "train.log_every=1", "--set", "train.schedule=constant"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    run = RunFolder(Path("run"))
    while len(run.metrics("train")) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors.count("go on with `morex train --resume run`") == 1 and "Traceback" not in errors
    [checkpoint] = run.checkpoints.glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert json.loads((checkpoint / "state.json").read_text())["step"] == step
    shell.succeeds("train", "--resume", "run", "--set", f"train.steps={step + 1}")
