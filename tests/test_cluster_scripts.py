"""The scripts for Slurm and for plain ssh, with stand-ins for `srun`, `scontrol` and `ssh` that run everything here."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from documents import ROOT, TINY_TRAINING, write_corpus
from morex.train.runs import RunFolder

SCRIPTS = ROOT / "examples" / "cluster"
CHANGES = [word for key, value in TINY_TRAINING.items() for word in ("--set", f"{key}={value}")]
ENDLESS = ["--set", "train.steps=100000", "--set", "train.schedule=constant", "--set", "train.log_every=1"]
SRUN = """#!/usr/bin/env bash
# Starts two tasks, passes SIGTERM on to them, and kills all as soon as one has failed.
[[ $1 == --kill-on-bad-exit=1 ]] || exit 99
shift
export SLURM_NTASKS=2
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
  tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
worst=0
for task in "${tasks[@]}"; do
  while kill -0 "$task" 2>/dev/null; do
    code=0
    wait "$task" || code=$?
  done
  ((code > worst)) && worst=$code
done
exit "$worst"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >>scontrol.log
[[ $1 == show ]] && echo 127.0.0.1
exit 0
"""
SSH = """#!/usr/bin/env bash
[[ $1 == -n ]] || exit 99
echo "$2" >>ssh.log
exec bash -c "$3"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a corpus and the stand-ins."""
    write_corpus(tmp_path)
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("ssh", SSH)):
        path = tmp_path / "bin" / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    return tmp_path


def start(script: str, folder: Path, *words: str) -> "subprocess.Popen[str]":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        "PORT": str(port),
        "NODES": "localhost me@127.0.0.1",
        "SLURM_JOB_ID": str(port),
        "SLURM_JOB_NODELIST": "here",
    }
    command = ["bash", str(SCRIPTS / script), *words]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_steps(run: RunFolder, process: "subprocess.Popen[str]") -> None:
    while len(run.metrics("train")) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


RANKS = {"slurm.sbatch": (), "ssh.sh": ("--ranks", "1")}


@pytest.mark.slow
@pytest.mark.parametrize(("script", "number"), [("slurm.sbatch", signal.SIGUSR1), ("ssh.sh", signal.SIGTERM)])
def test_two_machines_train_one_run_stop_and_go_on(folder: Path, script: str, number: signal.Signals) -> None:
    words = ["vanilla", "run", *RANKS[script], "--tiny", *CHANGES]
    process = start(script, folder, *words, *ENDLESS)
    run = RunFolder(folder / "run")
    wait_for_steps(run, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=240)
    assert errors.splitlines() == [
        "stopping after this step, to save; once more stops at once without saving",
        errors.splitlines()[-1],
    ]
    assert "go on with `morex train --resume run`" in errors
    [checkpoint] = run.checkpoints.iterdir()
    saved = json.loads((checkpoint / "state.json").read_text())["step"]
    if script == "slurm.sbatch":
        assert process.returncode == 0
        requeued = (folder / "scontrol.log").read_text().splitlines()[-1]
        assert requeued.startswith("requeue ")
    process = start(script, folder, *words, *ENDLESS, "--set", f"train.steps={saved + 2}")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert output.count("held-out loss") == 1
    lines = run.metrics("train")
    assert [line["step"] for line in lines] == list(range(1, saved + 3))
    summary = run.summary()
    assert summary is not None and summary["steps"] == saved + 2
    if script == "ssh.sh":
        assert set((folder / "ssh.log").read_text().splitlines()) == {"localhost", "me@127.0.0.1"}
    else:
        assert (folder / "scontrol.log").read_text().splitlines()[-1].startswith("show hostnames"), "it is done"


@pytest.mark.slow
@pytest.mark.parametrize("script", RANKS)
def test_a_mistake_is_said_once(folder: Path, script: str) -> None:
    process = start(script, folder, "vanilla", "run", *RANKS[script], "--tiny", *CHANGES, "--set", "train.batch_size=3")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 2 and output == ""
    assert (
        errors
        == "error: train.batch_size 3 cannot be divided over 2 ranks and train.accumulation 1; use a multiple of 2\n"
    )
    assert not (folder / "run" / "config.yaml").exists()


@pytest.mark.parametrize("script", RANKS)
def test_a_wrong_call_says_how(folder: Path, script: str) -> None:
    process = start(script, folder, "vanilla")
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 2 and output == "" and errors.startswith("usage: ")
