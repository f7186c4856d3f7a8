"""What ends a training early. Every message is one sentence; `exit_code` is what a command line returns."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from morex.loading import ConfigError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk and of a used-up quota."""


class RunFolderError(ConfigError):
    """A run folder that cannot be used: in use, of another run, finished, or not a run at all."""


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used: damaged, incomplete, or of another config."""


class TrainingError(RuntimeError):
    """A training that cannot go on."""

    exit_code = 2
    said_by_first = False
    """Whether another rank of the same training says it."""


class AnomalyError(TrainingError):
    """A loss or gradient that is not finite, or far above what it was; raised before it reaches the weights."""


class DiskFullError(TrainingError):
    """No space left for a file of the run; everything written before stands."""


class Interrupted(TrainingError):
    """A signal asked to stop; what was done is saved.

    Args:
        exit_code: what a command line returns; default: 128 and the signal's number.
    """

    def __init__(self, message: str, signal_number: int, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number if exit_code is None else exit_code


@contextmanager
def disk_full_explained(what: str, how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Turns "no space left" from any write inside into one sentence that names `what` and says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DiskFullError(
            f"no space left on the disk of {what}; nothing saved before was touched: free some space and "
            f"{how_to_go_on()}"
        ) from error
