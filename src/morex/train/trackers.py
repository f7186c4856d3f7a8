"""What else is told of a run's metrics than metrics.jsonl: TensorBoard, trackio, Weights & Biases.

Adding one: a class with `log` and `close`, and an entry in `TRACKERS`. A tracker is a guest of the training: where it
fails, that is said once, and the training goes on without it.
"""

import importlib.util
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console

from morex.config import Config
from morex.files import read_json, write_json
from morex.loading import ConfigError
from morex.train.errors import Interrupted
from morex.train.runs import RunFolder

PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}
"""Package that each tracker needs, of the extra `track`."""


class Tracker(Protocol):
    """One tracker's run, made anew or gone on with."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes numbers by name."""

    def close(self, failed: bool) -> None:
        """Ends it; `failed`: by an error, and not by a signal to stop."""


class TensorBoard:
    """Event files in the run folder: `tensorboard --logdir RUN`, or the folder of many runs."""

    def __init__(self, run: RunFolder, config: Config, identity: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.path / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class Trackio:
    """A local trackio project; `trackio show` draws it. A run is found again by its name."""

    def __init__(self, run: RunFolder, config: Config, identity: str) -> None:
        import trackio

        name = f"{run.path.resolve().name}-{identity}"
        self.run = trackio.init(
            project=config.train.project, name=name, config=config.to_dict(), resume="allow", embed=False
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self.run.finish()


class WandB:
    """Weights & Biases; offline, into the run folder, with `WANDB_MODE=offline`."""

    def __init__(self, run: RunFolder, config: Config, identity: str) -> None:
        import wandb

        self.run = wandb.init(
            project=config.train.project,
            name=run.path.resolve().name,
            id=identity,
            resume="allow",
            dir=str(run.path),
            config=config.to_dict(),
            settings=wandb.Settings(console="off"),  # which would take the progress bar for text
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


TRACKERS: dict[str, Callable[[RunFolder, Config, str], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
}


def refuse_absent(names: Iterable[str]) -> None:
    """Raises ConfigError where the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"train.trackers names '{name}', which needs the package {PACKAGES[name]}; install it with "
                f"pip install 'morex[track]', or leave it out"
            )


class Trackers:
    """The trackers of a run, as a block in which they are open."""

    def __init__(self, run: RunFolder, config: Config, console: Console, speaks: bool = True) -> None:
        """Args:
        run: lines that its metrics.jsonl already has are told to trackers that are new to it; others know them.
        console: where it is said that one has failed.
        speaks: whether this is the rank that tells; another opens none.
        """
        self._run, self._config, self._console = run, config, console
        self._names = config.train.trackers if speaks else ()
        self._open: dict[str, Tracker] = {}
        self._before = run.metrics() if self._names else []
        self._told = {_key(line) for line in self._before}

    def __enter__(self) -> Self:
        for name in self._names:
            self._try(name, lambda name=name: self._begin(name))  # type: ignore[misc]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failed = error is not None and not isinstance(error, Interrupted)
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.close(failed))  # type: ignore[misc]

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl: every number in it, by the path to it, below the line's kind."""
        if self._open and _key(line) not in self._told:
            for name, tracker in list(self._open.items()):
                self._try(name, lambda tracker=tracker: _tell(tracker, line))  # type: ignore[misc]

    def _begin(self, name: str) -> None:
        path = self._run.path / "trackers.json"
        known = read_json(path) if path.is_file() else {}
        identity = known.get(name) or uuid.uuid4().hex[:8]
        tracker = self._open[name] = TRACKERS[name](self._run, self._config, identity)
        for line in [] if name in known else self._before:
            _tell(tracker, line)
        write_json(path, known | {name: identity})

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # the output of a command is its result
                act()
        except Exception as error:
            self._open.pop(name, None)
            told = " ".join(f"{type(error).__name__}: {error}".split())
            self._console.print(
                f"tracker {name} has failed ({told}); training goes on without it", style="yellow", markup=False
            )


def numbers(values: Mapping[str, Any], path: str = "") -> dict[str, float]:
    """Numbers of nested mappings and lists, by `a/b/1`; places of a list count from 1."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, list):
            value = {str(place): part for place, part in enumerate(value, start=1)}
        if isinstance(value, Mapping):
            found |= numbers(value, f"{path}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{path}{key}"] = value
    return found


def _tell(tracker: Tracker, line: Mapping[str, Any]) -> None:
    values = {f"{line['kind']}/{name}": value for name, value in numbers(line).items() if name != "step"}
    tracker.log(values, line["step"])


def _key(line: Mapping[str, Any]) -> tuple[str, int]:
    return line["kind"], line["step"]
