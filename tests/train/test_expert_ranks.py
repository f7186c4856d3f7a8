"""Experts that ranks divide, `train.expert_shards`, are trained as in one process. Ranks exchange by gloo."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import morex
from morex.config import Config
from morex.loading import ConfigError
from morex.train.runs import RunFolder
from train.helpers import configure, run
from train.test_ranks import difference, on_ranks

OWN = ("train.precision=fp64", "train.steps=4", "train.batch_size=8", "train.checkpoint_every=0")
MIXTURE = "model.mixer={kind: moe, router: {experts: 4, top_k: 2}}"
FAMILIES = {
    "moe": ("moe", ("train.accumulation=2", "model.mixer.router={experts: 4, top_k: 2, bias_rate: 0.01}")),
    # Two tokens a rank and step: often a rank's experts get none.
    "few tokens": ("moe", ("train.batch_size=2", "train.seq_len=2", "train.steps=20")),
    "few tokens recurrent": ("more-a", ("train.batch_size=2", "train.seq_len=2")),
    "few tokens routed": ("more-tuned", ("train.batch_size=2", "train.seq_len=2", "model.mixer.router.top_k=1")),
    "gated and recurring": (
        "moe",
        ("model.mixer.expert.kind=swiglu", "model.schedule={sharing: cycle, layers: 4, recursions: 2}"),
    ),
    "token": ("more", ("model.mixer.keep_unused_qk=true",)),
    "routed in documents": ("more-tuned", ("data.mask_documents=true", "train.accumulation=2")),
    "shared recurrent": ("more-b", ()),
    "recurrent layer": ("more-c", ()),
    "computed again": ("more-tuned", ("train.recompute=recursions",)),
    "copies": ("moe", ("train.shards=1",)),
    "recursions by expert choice": ("mor-expert", (MIXTURE, "train.recompute=recursions")),
    "recursions by halting": ("mor-act", ("model.mixer={kind: recursive, router: {top_k: 1}}",)),
    # In some recursions one rank has no token, in training and in evaluation.
    "recursions of few tokens": ("mor-token", (MIXTURE, "train.batch_size=2", "train.seq_len=4", "train.steps=20")),
}


def changed(config: Config, **options: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=options)})


def pieces(run_folder: RunFolder) -> dict[str, set[tuple[str, int]]]:
    """Of each tensor of the last checkpoint the files, and how many of its first dimension are in each."""
    newest = max(run_folder.checkpoints.iterdir(), key=lambda path: int(path.name.removeprefix("step-")))
    index = json.loads((newest / "index.json").read_text(encoding="utf-8"))
    return {
        name: {(piece["file"], piece["shape"][0]) for piece in entry["pieces"]}
        for name, entry in index.items()
        if entry["shape"]
    }


@pytest.mark.slow
def test_divided_experts_are_those_of_one_process(corpus: Path, tmp_path: Path) -> None:
    """Losses and gradient norms of every step, and the held-out loss; each rank has half of the experts."""
    configs = {name: configure(preset, corpus, *OWN, *overrides) for name, (preset, overrides) in FAMILIES.items()}
    on_ranks(2, [(changed(each, expert_shards=2), tmp_path / name, False) for name, each in configs.items()], tmp_path)
    for name, config in configs.items():
        one, two = run(config, tmp_path / f"{name} alone"), RunFolder(tmp_path / name)
        assert difference(two.path, one.path) < 1e-8, name
        mine, theirs = two.summary(), one.summary()
        assert mine is not None and theirs is not None and abs(mine["val_loss"] - theirs["val_loss"]) < 1e-8, name
        # What nothing is computed with has no optimizer state.
        assert {key for key in pieces(two) if "/random/" not in key} <= pieces(one).keys(), name
        weights = pieces(two)["model/stack.core.blocks.0.mixer.down"]
        assert weights == {("model-0.safetensors", 2), ("model-1.safetensors", 2)}, name


@pytest.mark.slow
def test_ranks_that_divide_experts_go_on_with_any_run(corpus: Path, tmp_path: Path) -> None:
    """1 rank, then 2, then 4 of which two and two divide the experts, then 1: losses and weights of a straight run."""
    plan: list[tuple[int, dict[str, Any]]] = [
        (1, {}),
        (2, {"expert_shards": 2}),
        (4, {"expert_shards": 2, "shards": 2}),
        (1, {}),
    ]
    # Muon for the experts' matrices, AdamW for their vectors.
    config = configure("more-tuned", corpus, *OWN, "train.schedule=constant", "train.optimizer=muon")
    folder, last = tmp_path / "divided", 2 * len(plan)
    for stage, (ranks, options) in enumerate(plan, start=1):
        own = changed(config, steps=2 * stage, **options)
        if ranks == 1:
            run(own, folder, resume=stage > 1)
        else:
            on_ranks(ranks, [(own, folder, stage > 1)], tmp_path)
    straight = run(changed(config, steps=last), tmp_path / "straight")
    assert difference(folder, straight.path) < 1e-8
    for file in ("model.safetensors", "optimizer.safetensors"):
        mine, theirs = (load_file(path / "checkpoints" / f"step-{last}" / file) for path in (folder, straight.path))
        for key in theirs:
            if not key.startswith("random/"):
                assert torch.allclose(mine[key].double(), theirs[key].double(), rtol=1e-6, atol=1e-8), key


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("vanilla", (), "train.expert_shards 2 divides experts, and model.mixer.kind 'swiglu' has none"),
        ("moe", ("model.mixer.router.experts=5",), "train.expert_shards 2 does not divide the 5 experts"),
        ("more-tuned", ("model.mixer.depth.kind=threshold",), "model.mixer.depth.kind 'threshold' decides that"),
        ("moe", ("train.precision=fp16",), "train.expert_shards 2 is not for train.precision 'fp16'"),
    ],
)
def test_what_cannot_be_divided_is_refused(preset: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        morex.load_config(preset, [*overrides, "train.expert_shards=2"], tiny=True)
    assert message in str(refusal.value)


def test_ranks_that_the_experts_do_not_divide_over_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.expert_shards 2 does not divide the number of ranks, 1; train on a"):
        run(configure("moe", corpus, "train.expert_shards=2"), tmp_path)
