"""Traces made by hand, and tiny models opened as if they were runs."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

import morex
from morex.analysis.trace import Array, Decisions, GroupDecisions, LayerDecisions, Moves
from morex.config import Config, ModelConfig
from morex.data.characters import ByteTokenizer
from morex.data.prepare import PreparedData
from morex.data.source import prepare_source
from morex.data.stream import TokenStream
from morex.train.opening import OpenRun
from morex.train.runs import RunFolder

GROUP, LAYER = "stack.core.groups.0", "stack.core.blocks.0.mixer.router"


def tiny(preset: str, *overrides: str) -> Config:
    small = ["train.seq_len=16", "train.precision=fp64"]
    if morex.load_config(preset, tiny=True).data.task is not None:
        small += ["data.task.difficulty=[11,16]", "data.task.held_out=12"]
    return morex.load_config(preset, [*small, *overrides], tiny=True)


def perturbed(config: ModelConfig, std: float = 0.1) -> Any:
    """A model in float64 and eval mode whose routers really decide."""
    model = morex.build_model(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.eval()


def opened(config: Config, folder: Path, std: float = 0.1) -> OpenRun:
    """A model that was never trained, with its task or random held-out tokens below 97, as an open run."""
    if config.data.task is not None:
        task = prepare_source(config)
        return OpenRun(RunFolder(folder), 0, config, perturbed(config.model, std), task.tokenizer, task)
    ids = np.random.default_rng(0).integers(0, 97, 16 * 9 + 6).astype(np.uint16)
    stream = TokenStream(ids, np.array([0, 50]), len(ids))
    data = PreparedData(ByteTokenizer(), stream, stream, "document", 2, "", folder)
    return OpenRun(RunFolder(folder), 0, config, perturbed(config.model, std), data.tokenizer, data)


def still(steps: int, rows: int, time: int) -> Moves:
    """States of norm 1 that do not move."""
    ones = np.ones((steps, rows, time), np.float32)
    return Moves(ones, 0 * ones, ones)


def routed(config: ModelConfig, active: Array, scores: Array | None, lengths: list[int], **known: Any) -> Decisions:
    """Decisions of a depth router alone [R, B, T]."""
    steps, rows, time = active.shape
    moves = known.pop("moves", still(steps, rows, time))
    return Decisions(
        config=config,
        policy="router",
        tokens=known.pop("tokens", np.zeros((rows, time), np.int64)),
        lengths=np.array(lengths),
        depth=active.sum(0),
        groups={GROUP: GroupDecisions(active, scores, moves)},
        **known,
    )


def expert_trace(logits: Array, top_k: int = 1) -> Decisions:
    """One choice of one expert layer by these logits [B, T, E]."""
    rows, time, experts = logits.shape
    config = morex.load_config(
        "moe-one-layer", [f"model.mixer.router={{experts: {experts}, top_k: {top_k}}}"], tiny=True
    ).model
    chosen = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k].astype(np.int16)
    active = np.ones((1, rows, time), bool)
    layer = LayerDecisions(np.array([[1, 1]]), chosen[None], logits[None].astype(np.float32), None)
    return Decisions(
        config=config,
        policy="router",
        tokens=np.zeros((rows, time), np.int64),
        lengths=np.full(rows, time),
        depth=active.sum(0),
        groups={GROUP: GroupDecisions(active, None, still(1, rows, time))},
        layers={LAYER: layer},
    )
