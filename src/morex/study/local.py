"""Cells on this machine, one at a time or several side by side."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from morex.loading import ConfigError
from morex.study.plan import PlannedCell
from morex.study.spec import StudyConfig
from morex.study.worker import Worker
from morex.train.precision import resolve_device


@dataclass(frozen=True)
class Local:
    """Processes of this machine."""

    jobs: int = 1
    """Cells at a time; they share the CPU threads, where `train.threads` does not set them."""
    retries: int = 0

    @property
    def words(self) -> list[str]:
        jobs = ["--jobs", str(self.jobs)] if self.jobs > 1 else []
        return jobs + (["--retries", str(self.retries)] if self.retries else [])

    def check(self, study: StudyConfig, cells: Sequence[PlannedCell]) -> None:
        """Raises ConfigError for a number of cells that makes no sense, and for a device that is not there."""
        if self.jobs < 1:
            raise ConfigError(f"--jobs {self.jobs} must be 1 or more")
        if self.jobs > 1 and study.budget.kind == "seconds":
            raise ConfigError(
                f"--jobs {self.jobs} does not go with budget.kind 'seconds', as cells would take time from each other; "
                f"use --jobs 1, or a budget in tokens, flops or steps"
            )
        for cell in cells:
            resolve_device(cell.config.train.device)

    @contextmanager
    def workers(self, folder: Path, cells: Sequence[PlannedCell]) -> Iterator[list[Worker]]:
        """One worker for each job."""
        jobs = min(self.jobs, len(cells))
        threads = None if jobs == 1 else max(1, torch.get_num_threads() // jobs)
        with ExitStack() as held:
            yield [held.enter_context(Worker(folder, threads)) for _ in range(jobs)]
