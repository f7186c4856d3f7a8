"""Training in fp16: close to fp32, with updates left out where gradients overflow, and never in any other format."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from morex.train import setup
from morex.train.errors import AnomalyError
from morex.train.loss_scale import LossScale
from train.helpers import checkpoint_bytes, configure, losses, run, state_of
from train.test_ranks import PROGRAM, torchrun

HALF = "train.precision=fp16"


@pytest.fixture
def too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that begin where a gradient overflows, and fall soon enough."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**20))


@pytest.mark.parametrize("preset", ["vanilla", "mor-expert", "more-tuned"])
def test_is_close_to_fp32(preset: str, corpus: Path, tmp_path: Path) -> None:
    plain = losses(run(configure(preset, corpus), tmp_path / "fp32"))
    folder = run(configure(preset, corpus, HALF), tmp_path / "fp16")
    for (_, mine, *_), (_, theirs, *_) in zip(losses(folder), plain, strict=True):
        assert abs(mine["lm"] - theirs["lm"]) < 0.02
    for line in folder.metrics("train"):
        assert line["loss_scale"] == 2.0**16 and line["skipped_updates"] == 0


def test_an_overflow_leaves_the_update_out(corpus: Path, tmp_path: Path, too_large: None) -> None:
    """Weights and moments stay, the scale is halved, and from the first gradient that fits on training goes on."""
    config = configure("vanilla", corpus, HALF, "train.steps=8", "train.checkpoint_every=1", "train.keep_checkpoints=8")
    folder = run(config, tmp_path / "run")
    lines = folder.metrics("train")
    skipped = [line["step"] for line in lines if line["grad_norm"] is None]
    assert skipped[:2] == [1, 2] and len(skipped) < 8
    for line in lines:
        left_out = sum(step <= line["step"] for step in skipped)
        assert line["loss_scale"] == 2.0 ** (20 - left_out) and line["skipped_updates"] == left_out
    weights = [checkpoint_bytes(folder, step)["model.safetensors"] for step in range(1, 9)]
    assert len(set(weights)) == 8 - len(skipped) + 1
    assert state_of(folder, 8)["loss_scale"]["skipped"] == len(skipped)


def test_goes_on_to_the_bit(corpus: Path, tmp_path: Path, too_large: None) -> None:
    config = configure("vanilla", corpus, HALF, "train.schedule=constant")
    straight = run(config, tmp_path / "straight")
    short = config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})})
    run(short, tmp_path / "resumed")
    resumed = run(config, tmp_path / "resumed", resume=True)
    assert losses(straight) == losses(resumed)
    assert checkpoint_bytes(straight, 6) == checkpoint_bytes(resumed, 6)
    assert state_of(straight, 6)["loss_scale"] == state_of(resumed, 6)["loss_scale"]


def test_what_overflows_by_itself_ends_the_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a scale of 1 there is nothing left to blame on it."""

    def spoiled(device: str, is_needed: bool) -> LossScale:
        scale: Any = LossScale(device, is_needed)
        divide = scale.unscale

        def unscale(optimizer: torch.optim.Optimizer) -> None:
            optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
            divide(optimizer)

        scale.unscale = unscale
        return scale

    monkeypatch.setattr(setup, "LossScale", spoiled)
    with pytest.raises(AnomalyError, match=r"gradient norm is (inf|nan) at step 17, after 10 more in a row"):
        run(configure("vanilla", corpus, HALF, "train.steps=20"), tmp_path / "half")
    with pytest.raises(AnomalyError, match=r"gradient norm is (inf|nan) at step 1, after 10 more in a row"):
        run(configure("vanilla", corpus), tmp_path / "plain")


def test_nothing_is_scaled_in_other_formats(corpus: Path, tmp_path: Path) -> None:
    folder = run(configure("vanilla", corpus), tmp_path / "run")
    assert all("loss_scale" not in line for line in folder.metrics("train"))
    assert state_of(folder, 6)["loss_scale"] == {}


@pytest.mark.slow
def test_an_overflow_on_one_rank_is_one_on_all(tmp_path: Path) -> None:
    """Also where each rank has a copy of the weights; on both ranks weights stay and the scale is halved."""
    torchrun(2, PROGRAM.with_name("overflow_program.py"), str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == [{"scale": 2.0**15, "skipped": 1, "moved": False, "finite": False}] * 4
