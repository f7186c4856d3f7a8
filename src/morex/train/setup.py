"""The start of a training: checks the run folder, then builds everything that the loop works with, new or resumed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from morex.config import Config
from morex.data.corpora import located
from morex.data.loader import EndlessLoader
from morex.data.prepare import PreparedData
from morex.data.source import mean_length, prepare_source, training_loader
from morex.data.tasks.prepared import PreparedTask
from morex.data.tokenizer import load_tokenizer
from morex.eval.loss import depths_to_measure
from morex.files import write_json
from morex.loading import ConfigError, validate
from morex.model.count import Count, count
from morex.model.lm import LanguageModel, build_model
from morex.nn import ranks as together
from morex.sections.train import TrainConfig
from morex.train.checkpoint import (
    TrainState,
    differences,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    refuse_other_config,
)
from morex.train.errors import CheckpointError, RunFolderError
from morex.train.loss_scale import LossScale
from morex.train.memory import PeakMemory, keep_freed_memory
from morex.train.optim import build_optimizer, same_path
from morex.train.parallel import parallelise
from morex.train.precision import autocast_dtype, resolve_device, resolve_precision, weight_dtype
from morex.train.ranks import ALONE, Ranks
from morex.train.runs import RunFolder, environment, write_config
from morex.train.storage import Saving
from morex.train.tensors import random_rank

MOST_THREADS = 16
"""CPU threads for each core, at most."""


@dataclass
class Training:
    """What the loop works with."""

    run: RunFolder
    config: Config
    """Resolved, as written to the run folder."""
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    data: PreparedData | PreparedTask
    loader: EndlessLoader
    state: TrainState
    counts: Count
    seq_len: int
    """Tokens of the sequence that a training token is in, on average: what FLOPs are counted at."""
    device: torch.device
    autocast: torch.dtype | None
    loss_scale: LossScale
    memory: PeakMemory
    pace: "Pace"
    ranks: Ranks = ALONE
    saving: Saving = field(default_factory=Saving)
    """The checkpoint that is being written."""
    saved_step: int | None = None
    """Step of the newest checkpoint."""


@dataclass
class Pace:
    """Speed since the last metric line."""

    tokens: int
    flops: float
    seconds: float

    def since_last(self, state: TrainState) -> tuple[float, float]:
        """Tokens and FLOPs a second since the last call, from the run's totals."""
        seconds = max(state.seconds - self.seconds, 1e-9)
        speeds = (state.tokens - self.tokens) / seconds, (state.flops - self.flops) / seconds
        self.tokens, self.flops, self.seconds = state.tokens, state.flops, state.seconds
        return speeds


def begin(run: RunFolder, config: Config, resume: bool, max_seconds: float | None, ranks: Ranks = ALONE) -> Training:
    """Everything for a new training, or for one that goes on from its newest checkpoint.

    Raises:
        RunFolderError: the folder already holds a run (`resume` False), or none (`resume` True).
        CheckpointError: the run is of another config or corpus, or its learning rates do not allow the new plan.
        ConfigError: what the config asks for is not there or does not fit, or ranks disagree about it.
    """
    with ranks.agreed():
        device = resolve_device(config.train.device)
        stored, config = _settled(run, config, resume, device)
    _refuse_disagreement(ranks, config)
    checkpoint = newest_checkpoint(run, ranks) if resume else None
    with ranks.agreed():
        if checkpoint is not None:
            max_seconds = _budget_from(checkpoint, config, max_seconds)
    tokenizer = load_tokenizer(run.tokenizer_path) if stored is not None and run.tokenizer_path.is_dir() else None
    with ranks.agreed():
        data = prepare_source(config, tokenizer) if ranks.is_first else None
    with ranks.agreed():  # the others find what the first has prepared
        data = prepare_source(config, tokenizer) if data is None else data
        loader = training_loader(data, config, ranks.rank, ranks.size)
    keep_freed_memory()
    memory = PeakMemory(device)
    model = build_model(config.model, device=device, dtype=weight_dtype(config.train.precision)).train()
    parallelise(model, config.train, ranks, device.type)
    optimizer = build_optimizer(model, config.train, config.model.width_ratio)
    loss_scale = LossScale(device.type, config.train.precision == "fp16")
    torch.manual_seed(config.train.seed + random_rank(config, ranks.rank))
    state = TrainState(data=_identity(data))
    with ranks.agreed():
        if checkpoint is not None:
            state = load_checkpoint(checkpoint, model, optimizer, config, ranks.rank, verified=True)
            _refuse_other_data(run, config, state.data, _identity(data))
            loader.load_state_dict(state.loader)
            loss_scale.load_state_dict(state.loss_scale)
        state.max_seconds = max_seconds
        if ranks.is_first:
            _write_start(run, config, data, device, None if stored is None else state.step)
    seq_len = mean_length(data, config)
    return Training(
        run=run,
        config=config,
        model=model,
        optimizer=optimizer,
        data=data,
        loader=loader,
        state=state,
        counts=count(config.model, seq_len=seq_len),
        seq_len=seq_len,
        device=device,
        autocast=autocast_dtype(config.train.precision),
        loss_scale=loss_scale,
        memory=memory,
        pace=Pace(state.tokens, state.flops, state.seconds),
        ranks=ranks,
        saved_step=None if checkpoint is None else state.step,
    )


def _settled(run: RunFolder, config: Config, resume: bool, device: torch.device) -> tuple[Config | None, Config]:
    """Config of the run to resume, and the config of this training."""
    stored = _stored_config(run, resume)
    config = resolved(config, stored, device)
    if stored is not None:
        refuse_other_config(f"run folder '{run.path}'", stored.to_dict(), config)
    depths_to_measure(config.model, config.eval.deepest)  # refused now, not at the first evaluation
    return stored, config


def _budget_from(checkpoint: Path, config: Config, max_seconds: float | None) -> float | None:
    """Budget in seconds of a training that goes on from a checkpoint."""
    content = read_state(checkpoint)
    refuse_other_config(f"checkpoint '{checkpoint}'", content["config"], config)
    before = validate(TrainConfig, content["config"]["train"])
    return _continued_budget(TrainState.of(content), before, config.train, max_seconds)


def _refuse_disagreement(ranks: Ranks, config: Config) -> None:
    """Raises ConfigError, on all ranks, where one was given another config than the first."""
    first, *others = together.gathered(config.to_dict())
    for rank, other in enumerate(others, start=1):
        for option, here, there in differences(first, other):
            raise ConfigError(
                f"the ranks of this training were given different configs: {option} is {here!r} on rank 0 and "
                f"{there!r} on rank {rank}; start all of them with the same"
            )


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Sets torch's CPU threads inside the block.

    Raises ConfigError for many more than there are cores: torch would end the process without a word.
    """
    most = MOST_THREADS * (os.cpu_count() or 1)
    if threads is not None and threads > most:
        raise ConfigError(f"{threads} CPU threads are too many for {os.cpu_count()} cores; use at most {most}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stored_config(run: RunFolder, resume: bool) -> Config | None:
    """Config of the run to resume. Raises RunFolderError where the folder's state and `resume` do not fit together."""
    if resume:
        return run.config()
    if run.summary_path.exists():
        constant = run.is_run() and run.config().train.schedule == "constant"
        further = f", or raise train.steps with `{run.resume_command}`" if constant else ""
        raise RunFolderError(
            f"run folder '{run.path}' holds a finished run; nothing was overwritten: name another folder{further}"
        )
    if run.is_run():
        raise RunFolderError(
            f"run folder '{run.path}' holds a run; nothing was overwritten: name another folder, or go on with "
            f"`{run.resume_command}`"
        )
    for path in (run.metrics_path, run.checkpoints, run.tokenizer_path, run.env_path):
        if path.exists():
            raise RunFolderError(f"folder '{run.path}' already holds '{path.name}'; name another folder for the run")
    return None


def resolved(config: Config, stored: Config | None, device: torch.device) -> Config:
    """The config with its precision settled, by the run that goes on or by device and width, and its corpus located."""
    train = config.train
    if train.precision == "auto":
        precision = stored.train.precision if stored is not None else train.precision
        train = train.model_copy(update={"precision": precision})
    name = resolve_precision(train.precision, device, config.model.d_model)
    train = train.model_copy(update={"precision": name})
    return config.model_copy(update={"train": train, "data": located(config.data)})


def _continued_budget(
    state: TrainState, before: TrainConfig, now: TrainConfig, max_seconds: float | None
) -> float | None:
    """Budget in seconds of a run that goes on; the old one unless another is given.

    Raises CheckpointError where the new plan would have had other learning rates in the steps that are done.
    """
    max_seconds = state.max_seconds if max_seconds is None else max_seconds
    if now.steps < state.step:
        raise CheckpointError(f"train.steps {now.steps} is less than the {state.step} steps that this run has done")
    if max_seconds != state.max_seconds:
        fits = now.schedule == "constant"
        plans = f"a budget of {max_seconds} seconds instead of {state.max_seconds}"
    else:
        timed = max_seconds is not None and now.schedule != "constant"
        fits = now.steps == before.steps if timed else same_path(before, now, state.step)
        plans = f"train.steps {now.steps} instead of {before.steps}"
    if state.step and not fits:
        raise CheckpointError(
            f"{plans} does not fit the {state.step} steps done: train.schedule '{now.schedule}' has led the learning "
            f"rate along the old plan; keep the plan, or train with train.schedule 'constant', or 'trapezoid' stopped "
            f"before its cool-down"
        )
    return max_seconds


def _identity(data: PreparedData | PreparedTask) -> dict[str, str]:
    """What tells one corpus, as tokens, from another."""
    return {"text": data.content, "tokenizer": data.tokenizer.fingerprint}


def _refuse_other_data(run: RunFolder, config: Config, before: dict[str, str], now: dict[str, str]) -> None:
    for part, digest in now.items():
        if before.get(part) != digest:
            raise CheckpointError(
                f"the {part} of {config.data.described} has changed since run folder '{run.path}' was "
                f"begun; put the old one back, or train in another folder"
            )


def _write_start(
    run: RunFolder, config: Config, data: PreparedData | PreparedTask, device: torch.device, step: int | None
) -> None:
    """Writes config, tokenizer and environment; `step` is where an earlier run goes on."""
    write_config(run.config_path, config)
    if not run.tokenizer_path.exists():
        unfinished = run.path / ".tokenizer"
        shutil.rmtree(unfinished, ignore_errors=True)
        data.tokenizer.save(unfinished)
        unfinished.rename(run.tokenizer_path)
    here = environment(device)
    first = run.environment()
    if step is not None and first is not None:
        here = {**first, "resumed": [*first.get("resumed", []), {"step": step, **here}]}
    write_json(run.env_path, here)
