"""A run that begins as a copy of another one at one of its checkpoints, and goes its own way from there.

With `train.schedule: trapezoid` the learning rate is the same for every number of steps until the cool-down begins. One
long run therefore gives several budgets: from where the cool-down of a shorter one would begin, a branch goes through
it, and is to the bit the run that would have been trained for so many steps (Hägele et al. 2024, arXiv 2405.18392).
"""

import shutil
import warnings
from pathlib import Path

from morex.config import Config
from morex.files import write_json, write_whole
from morex.loading import validate
from morex.sections.train import TrainConfig
from morex.train.checkpoint import TrainState, list_checkpoints, read_state, refuse_other_config, verify
from morex.train.errors import CheckpointError, RunFolderError
from morex.train.opening import run_of
from morex.train.optim import same_path
from morex.train.precision import resolve_device
from morex.train.runs import RunFolder, encoded
from morex.train.setup import resolved


def begin_branch(source: Path, target: Path, config: Config) -> int:
    """Makes a run folder that stands where another run stood at a checkpoint; resume it to train the branch.

    Args:
        source: a checkpoint folder, or a run folder, of which the newest checkpoint is taken that was reached with the
            learning rates of the branch.
        target: a folder that does not exist yet. It is there whole or not at all.
        config: of the branch.

    Returns:
        The step at which it begins.

    Raises:
        ConfigError: `source` is neither run nor checkpoint.
        RunFolderError: `target` exists.
        CheckpointError: no intact checkpoint has the learning rates of the branch, or its config is another.
    """
    run = run_of(source)
    if target.exists():
        raise RunFolderError(f"folder '{target}' is there already; nothing was overwritten: name another with --out")
    stored = run.config()
    refuse_other_config(
        f"run folder '{run.path}'", stored.to_dict(), resolved(config, stored, resolve_device(config.train.device))
    )
    checkpoint, step = _on_the_way(run, [source] if run.path != source else list_checkpoints(run), config)
    unfinished = RunFolder(target.with_name(f".{target.name}.new"))
    shutil.rmtree(unfinished.path, ignore_errors=True)
    try:
        shutil.copytree(checkpoint, unfinished.checkpoints / checkpoint.name)
        shutil.copytree(run.tokenizer_path, unfinished.tokenizer_path)
        shutil.copy2(run.config_path, unfinished.config_path)
        lines = [line for line in run.metrics() if line["step"] <= step]
        write_whole(unfinished.metrics_path, "".join(encoded(line) for line in lines))
        branched = {"run": str(run.path.resolve()), "step": step}
        write_json(unfinished.env_path, {**(run.environment() or {}), "branched": branched})
        unfinished.path.rename(target)
    finally:
        shutil.rmtree(unfinished.path, ignore_errors=True)
    return step


def _on_the_way(run: RunFolder, checkpoints: list[Path], config: Config) -> tuple[Path, int]:
    """The newest of these checkpoints at which a run with the branch's config would stand as well, and its step."""
    steps = []
    for path in reversed(checkpoints):
        try:
            content = read_state(path)
            step = TrainState.of(content).step
            before = validate(TrainConfig, content["config"]["train"])
            if step <= config.train.steps and same_path(before, config.train, step):
                verify(path)
                return path, step
            steps.append(str(step))
        except CheckpointError as error:
            if len(checkpoints) == 1:
                raise
            warnings.warn(f"{error}; looking for an older one", stacklevel=2)
    begins = config.train.steps - config.train.cooldown_steps(config.train.steps)
    limit = f", which are flat until step {begins}" if config.train.schedule == "trapezoid" else ""
    there = ", ".join(reversed(steps)) or "none"
    raise CheckpointError(
        f"no checkpoint of run folder '{run.path}' has the learning rates of train.steps {config.train.steps} with "
        f"train.schedule '{config.train.schedule}'{limit}; there are those of the steps {there}: "
        f"use another train.steps, or train the run again with train.schedule 'trapezoid' and train.budgets"
    )
