"""Where the cells of a study run: what `runner` asks of an executor. `local` is this machine, `cluster` a Ray."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from morex.study.plan import PlannedCell
from morex.study.spec import StudyConfig


class CellWorker(Protocol):
    """Runs one cell at a time, trained from its newest checkpoint where there is one, and measured.

    What it leaves is in the study folder when `poll` has returned a code: the cell's run folder or, where it failed,
    its sentence at `results.failure_path`.
    """

    @property
    def machine(self) -> str | None:
        """Where the cell in hand runs; None while it waits for a place."""

    def start(self, cell: PlannedCell, log: Path) -> None:
        """Starts a cell; what it prints goes to the end of `log`."""

    def poll(self) -> int | None:
        """Exit code as of `cell.main`, negative for a signal that killed it, or None while it runs or waits."""

    def interrupt(self) -> bool:
        """Asks the cell to save and stop; whether it could be asked already."""


class Executor(Protocol):
    """A place for cells, and how they are treated there."""

    @property
    def retries(self) -> int:
        """How often a cell is started again after a failure that need not happen again."""

    @property
    def words(self) -> list[str]:
        """The options of `morex compare` that choose it."""

    def check(self, study: StudyConfig, cells: Sequence[PlannedCell]) -> None:
        """Raises ConfigError where the cells, those that are left of the study, cannot run there; quick."""

    def workers(self, folder: Path, cells: Sequence[PlannedCell]) -> AbstractContextManager[Sequence[CellWorker]]:
        """A worker for each cell that may be in hand at a time.

        Raises:
            ConfigError: the place cannot be reached, or has no room for one of the cells.
        """
