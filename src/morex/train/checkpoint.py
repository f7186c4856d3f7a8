"""Checkpoints: safetensors and JSON in a folder `checkpoints/step-N/`, whole or not there at all. Nothing is pickled.

- model.safetensors: weights and router buffers by name; a tensor with two names is stored once
- optimizer.safetensors: `exp_avg/PARAMETER` and so on, and the random state, `random/cpu`
- state.json: step, tokens, seconds, losses, place in the data, config
- checksums.json: sha256 of the three
"""

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from morex.config import Config
from morex.data.tokenizer import Tokenizer, load_tokenizer
from morex.files import sha256, sync_folder, write_json
from morex.loading import validate
from morex.model.lm import LanguageModel, build_model
from morex.nn import ranks as together
from morex.train.errors import CheckpointError, RunFolderError
from morex.train.parallel import divided_like, reshard, whole
from morex.train.precision import resolve_device, weight_dtype
from morex.train.ranks import ALONE, Ranks
from morex.train.runs import RunFolder, read_json
from morex.train.tensors import (
    model_tensors,
    optimizer_tensors,
    random_state,
    read_tensors,
    refuse_other_model,
    set_optimizer_tensors,
    set_random_state,
    write_tensors,
)

FORMAT = 2
MODEL, OPTIMIZER, STATE, CHECKSUMS = "model.safetensors", "optimizer.safetensors", "state.json", "checksums.json"
RESUMABLE = frozenset(
    f"train.{key}"
    for key in (
        "steps",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "recompute",
        "shards",
        "threads",
    )
)
"""Options that may differ between a checkpoint and the run that goes on from it."""
ABSENT = "absent"


@dataclass
class TrainState:
    """Where a training stands, beside its tensors."""

    step: int = 0
    """Completed optimizer steps."""
    tokens: int = 0
    """Tokens trained on."""
    flops: float = 0.0
    """Training FLOPs of those tokens, by closed form on the shares of them that were active."""
    seconds: float = 0.0
    """Time spent in training steps, without evaluation and saving."""
    max_seconds: float | None = None
    """Budget of the run, where it has one in seconds."""
    last_loss: float | None = None
    """Loss of the objective on the last step's tokens."""
    best_val_loss: float | None = None
    evaluation: dict[str, Any] | None = None
    """Line of the last evaluation."""
    peak_memory_bytes: int = 0
    """Largest use of memory in any process of the run."""
    data: dict[str, str] = field(default_factory=dict)
    """Digests of text and tokenizer, to notice a corpus that has changed."""
    loader: dict[str, Any] = field(default_factory=dict)
    """Place in the data."""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Self:
        """The state in the content of a state.json."""
        return cls(**{known.name: content[known.name] for known in fields(cls)})


def save_checkpoint(
    run: RunFolder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    config: Config,
    ranks: Ranks = ALONE,
) -> Path:
    """Writes `checkpoints/step-N` under a temporary name, forces it to disk, renames it, then drops the oldest ones.

    Of several ranks, all of which have to call it, the first writes. The checkpoint is that of a training alone.

    Raises:
        OSError: the disk is full or not writable; then nothing of the new checkpoint stays and the others are intact.
    """
    reshard(model)
    found = {MODEL: model_tensors(model), OPTIMIZER: optimizer_tensors(model, optimizer)}
    tensors = {file: _on_first(each, ranks) for file, each in found.items()}
    for own in together.gathered(random_state(_device(model), ranks.rank)):
        tensors[OPTIMIZER] |= own
    with ranks.agreed():
        if ranks.is_first:
            _write(run, tensors, state, config)
    return run.checkpoints / f"step-{state.step}"


def _on_first(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Whole tensors on the first rank, and nothing elsewhere; all ranks take part."""
    kept = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if ranks.is_first:
            kept[name] = full
    return kept


def _write(run: RunFolder, tensors: Mapping[str, Mapping[str, Tensor]], state: TrainState, config: Config) -> None:
    run.checkpoints.mkdir(exist_ok=True)
    _remove_leftovers(run)
    target = run.checkpoints / f"step-{state.step}"
    temporary = run.checkpoints / f".{target.name}.new"
    try:
        temporary.mkdir()
        for file, each in tensors.items():
            write_tensors(temporary / file, each)
        write_json(temporary / STATE, {"format": FORMAT, **asdict(state), "config": config.to_dict()})
        write_json(temporary / CHECKSUMS, {name: sha256(temporary / name) for name in (MODEL, OPTIMIZER, STATE)})
        if target.exists():  # a damaged one, which the run went around
            target.rename(run.checkpoints / f".{target.name}.old")
        temporary.rename(target)
    finally:
        _remove_leftovers(run)
    sync_folder(run.checkpoints)
    for old in list_checkpoints(run)[: -config.train.keep_checkpoints]:
        shutil.rmtree(old)


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    config: Config | None = None,
    rank: int = 0,
) -> TrainState:
    """Reads a checkpoint into a model, and with an optimizer also into that and the random state.

    Args:
        config: what the checkpoint must have been trained with, up to the options in RESUMABLE.
        rank: whose random state.

    Raises:
        CheckpointError: it is damaged, of another config, or does not fit the model; the model is untouched then.
    """
    content = read_state(path)
    if config is not None:
        refuse_other_config(f"checkpoint '{path}'", content["config"], config)
    tensors, own = read_tensors(path / MODEL), model_tensors(model)
    refuse_other_model(path, tensors, own)
    if optimizer is not None:
        resumed = read_tensors(path / OPTIMIZER)
        set_optimizer_tensors(model, optimizer, resumed)
        set_random_state(resumed, _device(model), rank)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(divided_like(tensor, tensors[name]))
    return TrainState.of(content)


def newest_checkpoint(run: RunFolder | str | Path) -> Path | None:
    """The newest intact checkpoint of a run folder, or None where there is none yet; warns about damaged ones.

    Raises CheckpointError where every checkpoint is damaged.
    """
    run = run if isinstance(run, RunFolder) else RunFolder(Path(run))
    found = list_checkpoints(run)
    for path in reversed(found):
        try:
            verify(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; looking for an older one", stacklevel=2)
        else:
            return path
    if found:
        raise CheckpointError(f"every checkpoint of run folder '{run.path}' is damaged; train again in another folder")
    return None


def load(path: str | Path, device: str = "cpu") -> tuple[LanguageModel, Tokenizer]:
    """A trained model in eval mode and its tokenizer, from a run folder (its newest checkpoint) or a checkpoint folder.

    Raises:
        RunFolderError: `path` is neither, or its tokenizer is missing.
        CheckpointError: the checkpoint is damaged, or the run has none yet.
    """
    checkpoint, run = checkpoint_of(Path(path))
    config = validate(Config, read_state(checkpoint)["config"])
    if not run.tokenizer_path.is_dir():
        raise RunFolderError(f"run folder '{run.path}' of checkpoint '{checkpoint}' has no tokenizer folder")
    if run.is_run() and config.model != run.config().model:
        raise CheckpointError(
            f"checkpoint '{checkpoint}' is of another model than config.yaml of run folder '{run.path}'"
        )
    model = build_model(config.model, device=str(resolve_device(device)), dtype=weight_dtype(config.train.precision))
    load_checkpoint(checkpoint, model)
    return model.eval(), load_tokenizer(run.tokenizer_path)


def trained_on(path: str | Path) -> dict[str, str]:
    """Digests of the text and the tokenizer that a run or checkpoint folder was trained with. Raises as `load`."""
    checkpoint, _ = checkpoint_of(Path(path))
    return TrainState.of(read_state(checkpoint)).data


def checkpoint_of(path: Path) -> tuple[Path, RunFolder]:
    """A checkpoint folder, or the newest checkpoint of a run folder, and the run."""
    if (path / STATE).is_file() or (path / CHECKSUMS).is_file():
        return path, RunFolder(path.resolve().parent.parent)
    run = RunFolder(path)
    if not run.is_run():
        raise RunFolderError(f"'{path}' is neither a run folder nor a checkpoint folder of one")
    newest = newest_checkpoint(run)
    if newest is None:
        raise CheckpointError(f"run folder '{path}' has no checkpoint yet; train it with `{run.resume_command}`")
    return newest, run


def list_checkpoints(run: RunFolder) -> list[Path]:
    """Checkpoint folders of a run, oldest first, intact or not."""
    if not run.checkpoints.is_dir():
        return []
    steps = {int(path.name[5:]): path for path in run.checkpoints.iterdir() if re.fullmatch(r"step-\d+", path.name)}
    return [steps[step] for step in sorted(steps)]


def read_state(path: Path) -> dict[str, Any]:
    """state.json of an intact checkpoint. Raises CheckpointError where it is not intact or of another format."""
    verify(path)
    content = read_json(path / STATE)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint '{path}' has format {content.get('format')}; this version reads {FORMAT}")
    return content


def verify(path: Path) -> None:
    """Raises CheckpointError, naming the file, where a checkpoint is incomplete or its checksums do not match."""
    for name in (CHECKSUMS, MODEL, OPTIMIZER, STATE):
        if not (path / name).is_file():
            raise CheckpointError(f"checkpoint '{path}' is damaged: {name} is missing")
    try:
        expected = read_json(path / CHECKSUMS)
    except RunFolderError:
        raise CheckpointError(f"checkpoint '{path}' is damaged: {CHECKSUMS} cannot be read") from None
    for name in (MODEL, OPTIMIZER, STATE):
        if expected.get(name) != sha256(path / name):
            raise CheckpointError(f"checkpoint '{path}' is damaged: {name} does not match its checksum")


def refuse_other_config(what: str, theirs: Mapping[str, Any], config: Config) -> None:
    """Raises CheckpointError that names the first differing option and both values, those in RESUMABLE apart."""
    for option, there, here in differences(theirs, config.to_dict()):
        if option not in RESUMABLE:
            raise CheckpointError(
                f"{what} is of another config: {option} is {there!r} there and {here!r} here; only "
                f"{', '.join(sorted(RESUMABLE))} may change"
            )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted option, old value, new value) of each difference between two configs or studies."""
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{at}{key}.")
        elif before != after:
            yield f"{at}{key}", before, after


def _remove_leftovers(run: RunFolder) -> None:
    """Removes what a process that died while saving has left."""
    for path in run.checkpoints.glob(".step-*"):
        shutil.rmtree(path)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
