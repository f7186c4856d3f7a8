"""Checkpoints: safetensors and JSON in a folder `checkpoints/step-N/`, whole or not there at all. Nothing is pickled.

- model.safetensors: weights and router buffers by name; a tensor with two names is stored once
- optimizer.safetensors: `exp_avg/PARAMETER` and so on, and the random state, `random/cpu`
- index.json: where each tensor lies; of several ranks each writes files of its own, see `storage`
- state.json: step, tokens, seconds, losses, place in the data, config
- checksums.json: sha256 of all of them
"""

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from morex.config import Config
from morex.data.tokenizer import Tokenizer, load_tokenizer
from morex.files import sha256, sync_folder, write_json
from morex.loading import validate
from morex.model.lm import LanguageModel, build_model
from morex.sections.train import TrainConfig
from morex.train import storage
from morex.train.errors import CheckpointError, RunFolderError
from morex.train.guard import Guard
from morex.train.parallel import reshard
from morex.train.precision import resolve_device, weight_dtype
from morex.train.ranks import ALONE, Ranks
from morex.train.runs import RunFolder, read_json
from morex.train.storage import Saving
from morex.train.tensors import (
    RANDOM,
    model_tensors,
    optimizer_tensors,
    random_rank,
    random_state,
    refuse_other_model,
    room_for_optimizer,
    set_optimizer_tensors,
    set_random_state,
)

FORMAT = 3
MODEL, OPTIMIZER = "model/", "optimizer/"
"""How the names of the tensors of a part begin."""
STATE, CHECKSUMS = "state.json", "checksums.json"
RESUMABLE = frozenset(
    f"train.{key}"
    for key in (
        "steps",
        "budgets",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "hang_seconds",
        "anomaly.action",
        "anomaly.z_score",
        "anomaly.window",
        "anomaly.limit",
        "save_in_background",
        "recompute",
        "compile",
        "shards",
        "expert_shards",
        "core_units",
        "threads",
        "precision",
        "device",
        "trackers",
        "project",
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
    guard: Guard = field(default_factory=Guard)
    data: dict[str, str] = field(default_factory=dict)
    """Digests of text and tokenizer, to notice a corpus that has changed."""
    loader: dict[str, Any] = field(default_factory=dict)
    """Place in the data."""
    loss_scale: dict[str, Any] = field(default_factory=dict)
    """Of a training in fp16."""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Self:
        """The state in the content of a state.json."""
        return cls(**{known.name: content[known.name] for known in fields(cls)} | {"guard": Guard.of(content["guard"])})

    def go_back(self, earlier: "TrainState") -> None:
        """Becomes an earlier state, as far as that is about the weights: time, place in the data and guard go on."""
        for name in ("step", "tokens", "flops", "last_loss", "best_val_loss", "evaluation"):
            setattr(self, name, getattr(earlier, name))


def save_checkpoint(
    run: RunFolder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    config: Config,
    ranks: Ranks = ALONE,
    in_background: bool = False,
) -> Saving:
    """Writes `checkpoints/step-N` under a temporary name, reads it back, renames it, then drops the oldest ones.

    Of several ranks, all of which have to call it, each writes what it holds; any number of ranks can load it.

    Args:
        in_background: copies everything and writes while the training goes on, until `finish` of what it returns.

    Raises:
        OSError: the disk is full or not writable; then nothing of the new checkpoint stays and the others are intact.
    """
    reshard(model)
    tensors = {MODEL + name: tensor.detach() for name, tensor in model_tensors(model).items()}
    tensors |= {OPTIMIZER + name: tensor for name, tensor in optimizer_tensors(model, optimizer).items()}
    if random_rank(config, ranks.rank) == ranks.rank:
        random = random_state(_device(model), ranks.rank)
        tensors |= {OPTIMIZER + name: tensor for name, tensor in random.items()}
    target = run.checkpoint_path(state.step)
    temporary = run.checkpoints / f".{target.name}.new"
    content = {"format": FORMAT, **asdict(state), "config": config.to_dict()}

    def prepare() -> None:
        run.checkpoints.mkdir(exist_ok=True)
        _remove_leftovers(run)
        temporary.mkdir()

    def complete(digests: dict[str, str]) -> None:
        write_json(temporary / STATE, content)
        write_json(temporary / CHECKSUMS, digests | {STATE: sha256(temporary / STATE)})
        if target.exists():  # a damaged one, which the run went around
            target.rename(run.checkpoints / f".{target.name}.old")
        temporary.rename(target)
        sync_folder(run.checkpoints)
        _remove_leftovers(run)
        _drop_old(run, config.train)

    def abandon() -> None:
        if ranks.is_first:
            _remove_leftovers(run)

    writer = storage.Writer(temporary, ranks.rank if ranks.size > 1 else None, prepare, complete)
    return storage.write(tensors, writer, ranks.background, in_background, abandon)


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    config: Config | None = None,
    rank: int = 0,
    verified: bool = False,
) -> TrainState:
    """Reads a checkpoint into a model, and with an optimizer also into that and the random state.

    Args:
        config: what the checkpoint must have been trained with, up to the options in RESUMABLE.
        rank: which one reads; of a divided model and optimizer it reads what it holds.
        verified: whether its checksums have been looked at.

    Raises:
        CheckpointError: it is damaged, of another config, or does not fit the model; the model is untouched then.
    """
    if not verified:
        verify(path)
    content = read_state(path)
    if config is not None:
        refuse_other_config(f"checkpoint '{path}'", content["config"], config)
    index = {name: pieces[0] for name, pieces in storage.read_index(path).items()}
    weights = {name.removeprefix(MODEL): piece for name, piece in index.items() if name.startswith(MODEL)}
    own = model_tensors(model)
    refuse_other_model(path, {name: piece.whole for name, piece in weights.items()}, own)
    wanted = {MODEL + name: tensor.detach() for name, tensor in own.items()}
    if optimizer is None:
        storage.read(path, wanted)
        return TrainState.of(content)

    saved = {name.removeprefix(OPTIMIZER): piece for name, piece in index.items() if name.startswith(OPTIMIZER)}
    moments = room_for_optimizer(model, {name: at for name, at in saved.items() if not name.startswith(RANDOM)})
    rank = rank if config is None else random_rank(config, rank)
    random = {name: torch.clone(tensor) for name, tensor in random_state(_device(model), rank).items() if name in saved}
    storage.read(path, wanted | {OPTIMIZER + name: tensor for name, tensor in (moments | random).items()})
    set_optimizer_tensors(model, optimizer, moments)
    set_random_state(random, _device(model), rank)
    return TrainState.of(content)


def newest_checkpoint(run: RunFolder | str | Path, ranks: Ranks = ALONE) -> Path | None:
    """The newest intact checkpoint of a run folder, or None where there is none yet; warns about damaged ones.

    Of several ranks, all of which have to call it, each looks at some of the files.

    Raises:
        CheckpointError: every checkpoint is damaged.
    """
    run = run if isinstance(run, RunFolder) else RunFolder(Path(run))
    found = ranks.from_first(list_checkpoints(run))
    for path in reversed(found):
        try:
            with ranks.agreed():
                verify(path, ranks.rank, ranks.size)
        except CheckpointError as error:
            warnings.warn(f"{error}; looking for an older one", stacklevel=2)
        else:
            return Path(path)
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
    load_checkpoint(checkpoint, model, verified=checkpoint != Path(path))  # of a run, one that is known to be intact
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
    found = [path for path in run.checkpoints.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    """Step that a checkpoint folder is named by."""
    return int(path.name.removeprefix("step-"))


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises CheckpointError where it is damaged or of another format."""
    if _checksums(path).get(STATE) != _sha256(path, STATE):
        raise CheckpointError(f"checkpoint '{path}' is damaged: {STATE} does not match its checksum")
    content = read_json(path / STATE)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint '{path}' has format {content.get('format')}; this version reads {FORMAT}")
    return content


def verify(path: Path, rank: int = 0, ranks: int = 1) -> None:
    """Raises CheckpointError, naming the file, where a checkpoint is incomplete or its checksums do not match.

    Args:
        rank: of `ranks` that verify together, each some of the files.
    """
    expected = _checksums(path)
    for name in sorted(expected)[rank::ranks]:
        if expected[name] != _sha256(path, name):
            raise CheckpointError(f"checkpoint '{path}' is damaged: {name} does not match its checksum")


def _checksums(path: Path) -> dict[str, str]:
    """File name -> sha256 of a checkpoint: of the JSON files, and of every file that the index names."""
    if not (path / CHECKSUMS).is_file():
        raise CheckpointError(f"checkpoint '{path}' is damaged: {CHECKSUMS} is missing")
    try:
        found = read_json(path / CHECKSUMS)
    except RunFolderError:
        raise CheckpointError(f"checkpoint '{path}' is damaged: {CHECKSUMS} cannot be read") from None
    for name in (STATE, storage.INDEX):
        if name not in found:
            raise CheckpointError(f"checkpoint '{path}' is damaged: {CHECKSUMS} does not name {name}")
    return found


def _sha256(path: Path, name: str) -> str:
    if not (path / name).is_file():
        raise CheckpointError(f"checkpoint '{path}' is damaged: {name} is missing")
    return sha256(path / name)


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


def _drop_old(run: RunFolder, plan: TrainConfig) -> None:
    """Removes all but the newest checkpoints, those at multiples of `keep_every` and those to branch from."""
    for path in list_checkpoints(run)[: -plan.keep_checkpoints]:
        step = _step(path)
        if step not in plan.branch_points and (plan.keep_every is None or step % plan.keep_every):
            shutil.rmtree(path)


def _remove_leftovers(run: RunFolder) -> None:
    """Removes what a process that died while saving has left."""
    for path in run.checkpoints.glob(".step-*"):
        shutil.rmtree(path)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
