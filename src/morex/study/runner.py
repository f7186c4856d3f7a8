"""Runs the cells of a study, each in a process of its own, and shows how far they are.

A finished cell is skipped, an interrupted one goes on from its checkpoint, a failed one is written down and tried again
the next time; the others go on without it.
"""

import json
import signal
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from morex.files import write_json
from morex.study.plan import Plan, PlannedCell
from morex.study.results import cell_folder, failure_path, is_finished, note_jobs
from morex.study.units import duration
from morex.study.worker import Worker
from morex.train.errors import Interrupted
from morex.train.interrupt import stop_on_signals
from morex.train.runs import RunFolder, read_json

POLL = 0.25
"""Seconds between looks at the cells' processes and their metrics."""


def run_cells(folder: Path, planned: Plan, console: Console, go_on: str, jobs: int = 1) -> None:
    """Trains and measures every cell that is not finished, in the order of the plan.

    Args:
        folder: of the study, with its study.yaml.
        planned: its cells.
        console: where progress goes.
        go_on: command that continues the study, for the message after an interruption.
        jobs: cells at a time; they share the CPU threads, where `train.threads` does not set them.

    Raises:
        Interrupted: a signal asked to stop; the cells in hand have saved a checkpoint.
    """
    todo = [cell for cell in planned.cells if not is_finished(folder, cell.name)]
    done = len(planned.cells) - len(todo)
    if done:
        console.print(f"{done} of {len(planned.cells)} cells are finished already and are kept.", highlight=False)
    if not todo:
        return
    jobs = min(jobs, len(todo))
    note_jobs(folder, jobs)
    threads = None if jobs == 1 else max(1, torch.get_num_threads() // jobs)
    shown = Display(console, todo, done, len(planned.cells))
    with stop_on_signals(console) as stop, ExitStack() as workers, shown as display:
        slots = [Slot(folder, workers.enter_context(Worker(folder, threads)), display) for _ in range(jobs)]
        waiting = deque(todo)
        while True:
            for slot in slots:
                if slot.cell is None and waiting and not stop.asked:
                    slot.start(waiting.popleft())
            if all(slot.cell is None for slot in slots):
                break
            time.sleep(POLL)
            for slot in slots:
                slot.look(stop.asked)
        if stop.asked:
            assert stop.signal_number is not None
            raise Interrupted(f"stopped; what is trained is kept, go on with `{go_on}`", stop.signal_number)


class Slot:
    """A worker and the cell that it runs; `cell` is None while it has none."""

    def __init__(self, folder: Path, worker: Worker, display: "Display") -> None:
        self.folder, self.worker, self.display = folder, worker, display
        self.cell: PlannedCell | None = None
        self.interrupted = False

    def start(self, cell: PlannedCell) -> None:
        """Begins a cell, or goes on with it."""
        self.cell = cell
        failure = failure_path(self.folder, cell.name)
        failure.parent.mkdir(parents=True, exist_ok=True)
        failure.unlink(missing_ok=True)
        self.worker.start(cell.name, self._log(cell))
        self.display.start(cell)

    def look(self, stopping: bool) -> None:
        """Shows how far the cell is, asks it to stop where `stopping`, and frees the slot where it has ended."""
        if self.cell is None:
            return
        code = self.worker.poll()
        if code is None:
            if stopping and not self.interrupted:
                self.interrupted = self.worker.interrupt()
            self.display.show(self.cell, spent_share(RunFolder(cell_folder(self.folder, self.cell.name)), self.cell))
            return
        if code == 0 or not stopping:
            self.display.end(self.cell, self._error(self.cell, code))
        self.cell = None

    def _error(self, cell: PlannedCell, code: int) -> str | None:
        """The sentence that a cell failed with, or None; one that could not write its own gets one."""
        if code == 0:
            return None
        failure = failure_path(self.folder, cell.name)
        if not failure.is_file():
            end = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            hint = ", probably because memory ran out" if code == -signal.SIGKILL else ""
            write_json(failure, {"cell": cell.name, "error": f"its process {end}{hint}; see {self._log(cell)}"})
        return str(read_json(failure)["error"])

    def _log(self, cell: PlannedCell) -> Path:
        return failure_path(self.folder, cell.name).with_name(f"{cell.name}.log")


def spent_share(run: RunFolder, cell: PlannedCell) -> float:
    """Share of the cell's budget that its metrics say is spent; cheap enough to be asked often."""
    try:
        with run.metrics_path.open("rb") as file:
            file.seek(max(0, run.metrics_path.stat().st_size - 16384))
            lines = file.read().splitlines()
    except OSError:
        return 0.0
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if cell.max_seconds is not None:
            return min(1.0, float(entry["seconds"]) / cell.max_seconds)
        return min(1.0, float(entry["step"]) / cell.config.train.steps)
    return 0.0


@dataclass
class Shown:
    """A cell's line while it runs."""

    task: TaskID
    where: str
    started: float
    share: float = 0.0


class Display:
    """All cells on one bar, weighted by their FLOPs or seconds, and each cell in hand on one of its own.

    The time left follows from the time that the work done so far has taken.
    """

    def __init__(self, console: Console, cells: Sequence[PlannedCell], done: int, total: int) -> None:
        self.console, self.total, self.number = console, total, done
        self.weights = {cell.name: cell.max_seconds or cell.train_flops for cell in cells}
        self.all = sum(self.weights.values())
        self.spent, self.started, self.width = 0.0, time.monotonic(), max(len(cell.name) for cell in cells)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.study = self.progress.add_task("study", total=1.0, left="")
        self.cells: dict[str, Shown] = {}

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, cell: PlannedCell) -> None:
        """A cell begins."""
        self.number += 1
        where = f"{self.number}/{self.total} {cell.name:<{self.width}}"
        self.cells[cell.name] = Shown(self.progress.add_task(where, total=1.0, left=""), where, time.monotonic())

    def show(self, cell: PlannedCell, share: float) -> None:
        """The cell has spent `share` of its budget."""
        shown = self.cells[cell.name]
        shown.share = share
        self.progress.update(shown.task, completed=share, left="measuring" if share >= 1 else "")
        in_hand = sum(shown.share * self.weights[name] for name, shown in self.cells.items())
        done = (self.spent + in_hand) / self.all
        left = (time.monotonic() - self.started) * (1 - done) / done if done > 0.01 else None
        self.progress.update(self.study, completed=done, left="" if left is None else f"{duration(left)} left")

    def end(self, cell: PlannedCell, error: str | None) -> None:
        """The cell has ended; its line stays."""
        self.spent += self.weights[cell.name]
        shown = self.cells.pop(cell.name)
        self.progress.remove_task(shown.task)
        took = duration(time.monotonic() - shown.started)
        if error is None:
            self.console.print(f"[green]✓[/] {shown.where}  {took}", highlight=False)
        else:
            self.console.print(f"[red]✗[/] {shown.where}  {took}  ", end="", highlight=False)
            self.console.print(error, style="red", markup=False, highlight=False)
