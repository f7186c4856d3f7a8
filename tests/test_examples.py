"""The examples run, at tiny sizes, and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from documents import CORPUS, ROOT, TINY_TRAINING, write_corpus
from morex.cli import main

SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and a tiny finished run of `mor-threshold`."""
    folder = tmp_path_factory.mktemp("examples")
    write_corpus(folder)
    train("mor-threshold", folder / "run", {"model.depth.momentum": "0.0"})
    return folder


def train(preset: str, out: Path, options: dict[str, str]) -> None:
    settings = TINY_TRAINING | {"data.corpus": str(out.parent / CORPUS)} | options
    changes = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    assert main(["train", preset, "--tiny", "--out", str(out), *changes]) == 0


def run(script: str, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / script), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_every_example_has_a_test() -> None:
    assert SCRIPTS == ["depth_of_tokens.py", "training_loop.py", "turn_the_budget.py"]


def test_training_loop(folder: Path) -> None:
    done = run("training_loop.py", "--text", CORPUS, "--steps", "2", "--seq-len", "32", folder=folder)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^step 1: lm \d\.\d+, depth_balance \d\.\d+$", done.stdout, re.M)
    assert "\nThe " in done.stdout


def test_depth_of_tokens(folder: Path) -> None:
    done = run("depth_of_tokens.py", "run", "the people of the town", folder=folder)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^ +([123]) #+ +'", done.stdout, re.M)
    assert lines and re.search(r"groups\.0: 100%, \d+%, \d+% of the tokens", done.stdout)


def test_turn_the_budget(folder: Path) -> None:
    done = run("turn_the_budget.py", "run", "--shifts", "-100", "0", "100", folder=folder)
    assert done.returncode == 0, done.stderr
    depths = [float(depth) for depth in re.findall(r"mean depth (\d\.\d\d)", done.stdout)]
    assert depths[0] == 3.0 > depths[1] > depths[2] == 1.0


def test_turn_the_budget_names_the_router_it_needs(folder: Path) -> None:
    train("vanilla", folder / "dense", {})
    done = run("turn_the_budget.py", "dense", folder=folder)
    assert done.returncode == 1 and "no router of kind threshold" in done.stderr
