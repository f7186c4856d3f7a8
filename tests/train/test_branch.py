"""Branches: several budgets from one run, each to the bit the run that would have been trained alone."""

import json
from pathlib import Path

import pytest

from morex.config import Config
from morex.loading import ConfigError
from morex.train.branch import begin_branch
from morex.train.errors import CheckpointError, RunFolderError
from morex.train.runs import RunFolder
from morex.train.trainer import train
from train.helpers import QUIET, checkpoint_bytes, configure, losses, run

LONG = (
    "train.schedule=trapezoid",
    "train.cooldown_fraction=0.25",
    "train.steps=20",
    "train.budgets=[8, 12]",
    "train.checkpoint_every=7",
    "train.keep_checkpoints=1",
)
KINDS = {"routed": ("mor-expert", ("model.depth.warmup_steps=5",)), "muon": ("more-tuned", ("train.optimizer=muon",))}


def of_steps(config: Config, steps: int, **more: object) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps, **more})})


def saved(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_is_the_run_of_its_budget(kind: str, corpus: Path, tmp_path: Path) -> None:
    preset, overrides = KINDS[kind]
    config = configure(preset, corpus, *LONG, *overrides)
    long = run(config, tmp_path / "long")
    assert saved(long) == ["step-20", "step-6", "step-9"]  # of the others, the newest one is kept
    for steps, begins in ((8, 6), (12, 9)):
        branch = run(of_steps(config, steps), tmp_path / f"branch-{steps}", branch_of=long.path)
        alone = run(of_steps(config, steps, budgets=()), tmp_path / f"alone-{steps}")
        assert losses(branch) == losses(alone) and [line[0] for line in losses(branch)] == list(range(1, steps + 1))
        assert checkpoint_bytes(branch, steps) == checkpoint_bytes(alone, steps)
        mine, theirs = branch.summary(), alone.summary()
        assert mine and theirs and mine["val_loss"] == theirs["val_loss"] and mine["tokens"] == theirs["tokens"]
        environment = branch.environment()
        assert environment and environment["branched"] == {"run": str(long.path.resolve()), "step": begins}


@pytest.fixture
def long(corpus: Path, tmp_path: Path) -> tuple[Config, RunFolder]:
    config = configure(
        "vanilla", corpus, *LONG, "train.steps=12", "train.keep_checkpoints=9", "train.checkpoint_every=2"
    )
    return config, run(config, tmp_path / "long")


def test_it_begins_at_the_newest_checkpoint_before_its_cooldown(
    long: tuple[Config, RunFolder], tmp_path: Path, corpus: Path
) -> None:
    config, source = long
    assert begin_branch(source.path, tmp_path / "a", of_steps(config, 7)) == 4  # flat until step 5
    assert begin_branch(source.checkpoints / "step-2", tmp_path / "b", of_steps(config, 7)) == 2
    assert begin_branch(source.path, tmp_path / "c", of_steps(config, 40)) == 9  # where its own cool-down begins
    (source.checkpoints / "step-4" / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"step-4' is damaged: .*; looking for an older one"):
        assert begin_branch(source.path, tmp_path / "d", of_steps(config, 7)) == 2
    # A config that was not read from the run is the same one.
    again = configure("vanilla", corpus, *LONG, "train.precision=auto", "train.steps=8")
    assert begin_branch(source.path, tmp_path / "e", again) == 6


def test_what_cannot_be_a_branch_is_refused_and_leaves_nothing(
    long: tuple[Config, RunFolder], tmp_path: Path, corpus: Path
) -> None:
    config, source = long
    before = sorted(path.name for path in tmp_path.iterdir())
    target = tmp_path / "branch"
    with pytest.raises(CheckpointError, match=r"train\.steps 2 .* flat until step 1; .*steps 2, 4, 6, 8, 9, 10, 12:"):
        begin_branch(source.path, target, of_steps(config, 2))
    with pytest.raises(CheckpointError, match=r"the learning rates of train\.steps 7"):
        begin_branch(source.checkpoints / "step-6", target, of_steps(config, 7))
    with pytest.raises(CheckpointError, match=r"train\.lr is 0\.003 there and 0\.1 here"):
        begin_branch(source.path, target, of_steps(config, 8, lr=0.1))
    with pytest.raises(ConfigError, match="neither a run folder nor a checkpoint"):
        begin_branch(tmp_path, target, config)
    with pytest.raises(RunFolderError, match="is there already"):
        train(of_steps(config, 8), source.path, console=QUIET, branch_of=source.path)
    (source.checkpoints / "step-6" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not match"):
        begin_branch(source.checkpoints / "step-6", target, of_steps(config, 8))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    with pytest.raises(ConfigError, match=r"budgets are for train\.schedule 'trapezoid'.*'cosine'"):
        configure("vanilla", corpus, "train.budgets=[3]")


def test_the_copy_holds_no_line_of_later(long: tuple[Config, RunFolder], tmp_path: Path) -> None:
    config, source = long
    begin_branch(source.path, tmp_path / "a", of_steps(config, 7))
    copied = RunFolder(tmp_path / "a")
    assert max(line["step"] for line in copied.metrics()) == 4 and saved(copied) == ["step-4"]
    assert copied.summary() is None
    lines = source.metrics_path.read_text().splitlines()
    assert copied.metrics_path.read_text().splitlines() == [line for line in lines if json.loads(line)["step"] <= 4]
