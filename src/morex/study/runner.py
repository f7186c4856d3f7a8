"""Runs the cells of a study, each in a process of its own, and shows how far they are.

A finished cell is skipped, an interrupted one goes on from its checkpoint, a failed one is written down and tried again
the next time, or at once where the executor says so; the others go on without it.
"""

import json
import signal
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from morex.files import write_json
from morex.study.cell import WOULD_FAIL_AGAIN
from morex.study.executor import CellWorker, Executor
from morex.study.plan import Plan, PlannedCell
from morex.study.results import cell_folder, failure_path, is_finished, note_jobs
from morex.study.units import duration
from morex.train.errors import Interrupted
from morex.train.interrupt import stop_on_signals
from morex.train.runs import RunFolder, read_json

POLL = 0.25
"""Seconds between looks at the cells' processes and their metrics."""


def unfinished(folder: Path, planned: Plan) -> list[PlannedCell]:
    """Cells that are left to run, in the order of the plan."""
    return [cell for cell in planned.cells if not is_finished(folder, cell.name)]


def run_cells(folder: Path, planned: Plan, console: Console, go_on: str, executor: Executor) -> None:
    """Trains and measures every cell that is not finished, in the order of the plan.

    Args:
        folder: of the study, with its study.yaml.
        planned: its cells.
        console: where progress goes.
        go_on: command that continues the study, for the message after an interruption.
        executor: where they run, how many at a time, and how often one that failed is started again.

    Raises:
        ConfigError: the executor cannot be reached or has no room for them.
        Interrupted: a signal asked to stop; the cells in hand have saved a checkpoint.
    """
    todo = unfinished(folder, planned)
    done = len(planned.cells) - len(todo)
    if done:
        console.print(f"{done} of {len(planned.cells)} cells are finished already and are kept.", highlight=False)
    if not todo:
        return
    shown = Display(console, todo, done, len(planned.cells))
    with stop_on_signals(console) as stop, executor.workers(folder, todo) as workers, shown as display:
        waiting = Waiting(deque(todo), executor.retries)
        slots, most = [Slot(folder, worker, display, waiting) for worker in workers], 1
        while True:
            for slot in slots:
                if slot.cell is None and waiting.cells and not stop.asked:
                    slot.start(waiting.next())
            if all(slot.cell is None for slot in slots):
                break
            together = Counter(slot.machine for slot in slots if slot.machine is not None)
            if (now := max(together.values(), default=0)) > most:
                most = now
                note_jobs(folder, most)
            time.sleep(POLL)
            for slot in slots:
                slot.look(stop.asked)
        if stop.asked:
            assert stop.signal_number is not None
            raise Interrupted(f"stopped; what is trained is kept, go on with `{go_on}`", stop.signal_number)


@dataclass
class Waiting:
    """Cells that no slot has yet, and how often each was started; one that is tried again goes to the end."""

    cells: deque[PlannedCell]
    retries: int
    tries: Counter[str] = field(default_factory=Counter)

    def next(self) -> PlannedCell:
        """The cell to start now."""
        cell = self.cells.popleft()
        self.tries[cell.name] += 1
        return cell

    def again(self, cell: PlannedCell) -> str | None:
        """Takes a cell that failed back, where it may be tried again; then which try comes next, in words."""
        done = self.tries[cell.name]
        if done > self.retries:
            return None
        self.cells.append(cell)
        return f"try {done + 1} of {self.retries + 1} follows"


class Slot:
    """A worker and the cell that it runs; `cell` is None while it has none."""

    def __init__(self, folder: Path, worker: CellWorker, display: "Display", waiting: Waiting) -> None:
        self.folder, self.worker, self.display, self.waiting = folder, worker, display, waiting
        self.cell: PlannedCell | None = None
        self.interrupted = False

    @property
    def machine(self) -> str | None:
        """Where the cell in hand runs; None without one, or where it waits for room."""
        return None if self.cell is None else self.worker.machine

    def start(self, cell: PlannedCell) -> None:
        """Begins a cell, or goes on with it."""
        self.cell = cell
        failure = failure_path(self.folder, cell.name)
        failure.parent.mkdir(parents=True, exist_ok=True)
        failure.unlink(missing_ok=True)
        self.worker.start(cell, self._log(cell))

    def look(self, stopping: bool) -> None:
        """Shows how far the cell is, asks it to stop where `stopping`, and frees the slot where it has ended."""
        if self.cell is None:
            return
        code = self.worker.poll()
        if self.worker.machine is not None:
            self.display.start(self.cell)
        if code is None:
            if stopping and not self.interrupted:
                self.interrupted = self.worker.interrupt()
            self.display.show(self.cell, spent_share(RunFolder(cell_folder(self.folder, self.cell.name)), self.cell))
            return
        if code == 0 or not stopping:
            self._end(self.cell, code)
        self.cell = None

    def _end(self, cell: PlannedCell, code: int) -> None:
        error = self._error(cell, code)
        again = self.waiting.again(cell) if error is not None and code != WOULD_FAIL_AGAIN else None
        self.display.end(cell, error, again)

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
        self.console, self.total, self.done = console, total, done
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
        self.places: dict[str, int] = {}

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, cell: PlannedCell) -> None:
        """A cell runs; to say so again changes nothing."""
        if cell.name in self.cells:
            return
        place = self.places.setdefault(cell.name, self.done + len(self.places) + 1)
        where = f"{place}/{self.total} {cell.name:<{self.width}}"
        self.cells[cell.name] = Shown(self.progress.add_task(where, total=1.0, left=""), where, time.monotonic())

    def show(self, cell: PlannedCell, share: float) -> None:
        """The cell has spent `share` of its budget; nothing is shown of one that does not run yet."""
        if cell.name not in self.cells:
            return
        shown = self.cells[cell.name]
        shown.share = share
        self.progress.update(shown.task, completed=share, left="measuring" if share >= 1 else "")
        in_hand = sum(shown.share * self.weights[name] for name, shown in self.cells.items())
        done = (self.spent + in_hand) / self.all
        left = (time.monotonic() - self.started) * (1 - done) / done if done > 0.01 else None
        self.progress.update(self.study, completed=done, left="" if left is None else f"{duration(left)} left")

    def end(self, cell: PlannedCell, error: str | None, again: str | None = None) -> None:
        """The cell has ended; its line stays. `again` says that it is tried again."""
        self.start(cell)
        if again is None:
            self.spent += self.weights[cell.name]
        shown = self.cells.pop(cell.name)
        self.progress.remove_task(shown.task)
        took = duration(time.monotonic() - shown.started)
        if error is None:
            self.console.print(f"[green]✓[/] {shown.where}  {took}", highlight=False)
        else:
            self.console.print(f"[red]✗[/] {shown.where}  {took}  ", end="", highlight=False)
            self.console.print(error, style="red", markup=False, highlight=False, end="" if again else "\n")
        if again is not None:
            self.console.print(f"; {again}", style="yellow", highlight=False)
