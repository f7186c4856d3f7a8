"""Recipes: each is a config that builds, whose batch the ranks can divide, and whose weights fit where it says."""

from pathlib import Path

import pytest

import morex
from documents import ROOT
from morex.model.lm import build_model
from train.helpers import SMALL, run

RANKS = {"laptop": 1, "one-gpu": 1, "eight-gpus": 8, "sixty-four-gpus": 64}
FOLDER = ROOT / "examples" / "recipes"
GPU_BYTES, LAPTOP_BYTES = 80e9, 8e9
BYTES_PER_PARAMETER = 16
"""fp32 weight, gradient and AdamW's two moments."""
MOST_TOKENS = 2**14
"""Of a microbatch on a rank: more would want room that recipes leave to no one."""


def test_each_recipe_has_its_number_of_ranks() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == RANKS.keys()


@pytest.mark.parametrize("name", RANKS)
def test_it_builds_divides_and_fits(name: str) -> None:
    config, ranks = morex.load_config(FOLDER / f"{name}.yaml"), RANKS[name]
    train, model = config.train, build_model(config.model, device="meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == morex.count(config.model, seq_len=train.seq_len).parameters
    assert train.batch_size % (ranks * train.accumulation) == 0
    assert train.batch_size * train.seq_len / (ranks * train.accumulation) <= MOST_TOKENS
    shards = train.shards or ranks
    assert ranks % shards == 0
    room = LAPTOP_BYTES if name == "laptop" else GPU_BYTES
    assert parameters * BYTES_PER_PARAMETER / shards < room / 4  # the rest is for activations
    assert all(0 < point < train.steps for point in train.branch_points) and len(train.branch_points) == 2
    assert train.warmup_steps < min(train.branch_points)


@pytest.mark.parametrize("name", RANKS)
def test_its_tiny_form_trains(name: str, corpus: Path, tmp_path: Path) -> None:
    own = ("train.schedule=trapezoid", "train.accumulation=2", "train.steps=4", "train.budgets=[3]", "train.threads=1")
    plan = [change for change in SMALL if not change.startswith("train.schedule")]
    config = morex.load_config(
        FOLDER / f"{name}.yaml", [*plan, f"data.corpus={corpus}", *own, "train.shards=1"], tiny=True
    )
    finished = run(config, tmp_path / "run")
    assert [line["step"] for line in finished.metrics("train")] == [1, 2, 3, 4]
    assert (finished.checkpoints / "step-2").is_dir()
