"""What the training tests share: a small corpus, tiny configs, and a training that dies half-way."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import morex
from morex.config import Config
from morex.model.lm import LanguageModel
from morex.train.runs import RunFolder
from morex.train.trainer import train

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away", "from", "them"]
SMALL = (
    "model.vocab_size=257",
    "data.tokenizer={kind: byte}",
    "data.val_fraction=0.01",
    "train.batch_size=4",
    "train.accumulation=1",
    "train.seq_len=16",
    "train.steps=6",
    "train.warmup_steps=2",
    "train.lr=0.003",
    "train.schedule=cosine",
    "train.log_every=1",
    "train.eval_every=0",
    "train.checkpoint_every=3",
    "train.precision=fp32",
)
QUIET = Console(quiet=True)

# Every kind of router and of state that routers carry: name -> (preset, overrides).
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dense": ("vanilla", ()),
    "dropout": ("mor-expert", ("model.dropout={attention: 0.1, residual: 0.1, embedding: 0.1}",)),
    "accumulation": ("vanilla", ("train.accumulation=2",)),
    "fixed": ("recursive", ()),
    "expert_choice": ("mor-expert", ("model.depth.warmup_steps=5",)),
    "expert_choice accumulated": ("mor-expert", ("train.accumulation=2", "model.depth.causal=aux_router")),
    "token_choice": ("mor-token", ()),
    "token_choice loss-free": ("mor-token", ("model.depth.balance=loss_free", "train.accumulation=4")),
    "threshold": ("mor-threshold", ()),
    "threshold accumulated": ("mor-threshold", ("train.accumulation=2",)),
    "halting": ("mor-act", ()),
    "exit gate": ("ouro", ()),
    "sampled accumulated": ("huginn", ("train.accumulation=2",)),
    "halting accumulated": ("mor-act", ("train.accumulation=2",)),
    "random": ("mor-random", ()),
    "moe loss-free": ("moe", ("model.mixer.router.bias_rate=0.01",)),
    "experts": ("more", ()),
    "experts routed": ("more-tuned", ("train.accumulation=2",)),
    "experts with steps by a router": ("more-tuned", ("model.mixer.depth.kind=threshold",)),
    "experts with steps by expert choice": ("more-tuned", ("model.mixer.depth.kind=expert_choice",)),
    "recurrent experts": ("more-a", ()),
    "shared recurrent block": ("more-b", ("train.accumulation=2",)),
    "recurrent layer": ("more-c", ("model.mixer.router.bias_rate=0.01",)),
    "muon": ("mor-expert", ("train.optimizer=muon", "train.accumulation=2")),
    "muon with experts": ("more-tuned", ("train.optimizer=muon",)),
    "random windows": ("more-baseline", ("data.windows=random",)),
}


def write_corpus(path: Path, words: int = 6000) -> Path:
    """A text with some order in it, so that there is something to learn."""
    draw = random.Random(1)
    path.write_text("\n".join(" ".join(draw.choices(WORDS, k=12)) for _ in range(words // 12)), encoding="utf-8")
    return path


def configure(preset: str, corpus: Path, *overrides: str) -> Config:
    """A preset's tiny form on the byte tokens of `corpus`."""
    return morex.load_config(preset, [*SMALL, f"data.corpus={corpus}", *overrides], tiny=True)


def run(config: Config, folder: Path, **options: Any) -> RunFolder:
    """Trains without output."""
    train(config, folder, console=QUIET, **options)
    return RunFolder(folder)


def run_until_crash(config: Config, folder: Path, step: int) -> RunFolder:
    """A training whose process dies in `step`, after the update but before anything is written about it."""

    def die(self: LanguageModel, stats: Any, at: int) -> None:
        if at == step:
            raise RuntimeError("the power went out")
        update(self, stats, at)

    update = LanguageModel.update_routers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "update_routers", die)
        with pytest.raises(RuntimeError, match="power went out"):
            run(config, folder)
    return RunFolder(folder)


def losses(folder: RunFolder) -> list[tuple[int, dict[str, float], float, float]]:
    """(step, raw losses, learning rate, gradient norm) of every training line."""
    return [(line["step"], line["losses"], line["lr"], line["grad_norm"]) for line in folder.metrics("train")]


def checkpoint_bytes(folder: RunFolder, step: int) -> dict[str, bytes]:
    """The tensors of a checkpoint, as files: weights, router buffers, optimizer, random state."""
    path = folder.checkpoints / f"step-{step}"
    return {name: (path / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state_of(folder: RunFolder, step: int) -> dict[str, Any]:
    """state.json of a checkpoint."""
    state: dict[str, Any] = json.loads((folder.checkpoints / f"step-{step}" / "state.json").read_text())
    return state
