"""A finished run, opened to be measured: its model, its tokenizer, and the held-out set that it was trained beside."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from morex.config import Config
from morex.data.prepare import PreparedData
from morex.data.source import prepare_source
from morex.data.stream import TokenStream
from morex.data.tasks.prepared import HeldOut, PreparedTask
from morex.data.tokenizer import Tokenizer
from morex.depth.policy import Depth
from morex.eval.loss import EvalResult, evaluate
from morex.loading import ConfigError, load_config
from morex.model.lm import LanguageModel
from morex.train.checkpoint import checkpoint_of, load, read_state, trained_on
from morex.train.precision import autocast_dtype
from morex.train.runs import RunFolder


@dataclass(frozen=True)
class OpenRun:
    """What a measurement of a run needs."""

    run: RunFolder
    step: int
    """Optimizer steps of the checkpoint."""
    config: Config
    model: LanguageModel
    """In eval mode."""
    tokenizer: Tokenizer
    data: PreparedData | PreparedTask


def evaluate_by(
    config: Config,
    model: LanguageModel,
    held_out: TokenStream | HeldOut,
    depth: Depth = None,
    by_depth: bool = False,
    deepest: int | None = None,
) -> EvalResult:
    """`evaluate` with the windows, batches, precision, documents and, where none is given, depth of a run's config."""
    return evaluate(
        model,
        held_out,
        config.train.seq_len,
        config.eval.batch_size,
        depth=config.train.policy if depth is None else depth,
        autocast=autocast_dtype(config.train.precision),
        by_depth=by_depth,
        deepest=deepest,
        mask_documents=config.data.mask_documents,
    )


def run_of(path: Path) -> RunFolder:
    """The run of a run folder or of one of its checkpoint folders. Raises ConfigError where it is neither."""
    for folder in (path, path.resolve().parent.parent):
        if (folder / "config.yaml").is_file():
            return RunFolder(folder)
    raise ConfigError(f"'{path}' is neither a run folder nor a checkpoint folder of one: there is no config.yaml")


def open_run(path: Path, overrides: Sequence[str] = (), device: str = "auto") -> OpenRun:
    """Loads a run folder (its newest checkpoint) or a checkpoint folder, and its data.

    Args:
        overrides: `a.b=value` changes of data, train and eval options.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ConfigError: there is no run, an override is of the model, or the corpus has changed since the training.
    """
    for override in overrides:
        if override.startswith("model."):
            raise ConfigError(
                f"--set {override}: the model of a run is trained as it is; set data, train or eval options"
            )
    run = run_of(path)
    config = load_config(run.config_path, overrides)
    checkpoint, _ = checkpoint_of(path)
    model, tokenizer = load(checkpoint, device)
    data = prepare_source(config, tokenizer)
    has_data = any(override.startswith("data.") for override in overrides)
    if not has_data and trained_on(checkpoint)["text"] != data.content:
        same = f"data.seed={config.data.seed}" if config.data.mixture else f"data.corpus={config.data.corpus}"
        raise ConfigError(
            f"{config.data.described} has changed since '{path}' was trained, and its held-out set with it; put the "
            f"old one back, or ask for the new one with --set {same}"
        )
    return OpenRun(run, int(read_state(checkpoint)["step"]), config, model, tokenizer, data)
