"""Runs the cells of a study one after another, each in a process of its own, and shows how far they are.

A finished cell is skipped, an interrupted one goes on from its checkpoint, a failed one is written down and tried again
the next time; the others go on without it.
"""

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from morex.study.plan import Plan, PlannedCell
from morex.study.results import cell_folder, failure_path, is_finished
from morex.study.units import duration
from morex.study.worker import Worker
from morex.train.errors import Interrupted
from morex.train.interrupt import StopRequest, stop_on_signals
from morex.train.runs import RunFolder, read_json, write_json

POLL = 0.25
"""Seconds between looks at a cell's process and its metrics."""


def run_cells(folder: Path, planned: Plan, console: Console, go_on: str) -> None:
    """Trains and measures every cell that is not finished.

    Args:
        folder: of the study, with its study.yaml.
        planned: its cells.
        console: where progress goes.
        go_on: command that continues the study, for the message after an interruption.

    Raises:
        Interrupted: a signal asked to stop; the cell in hand has saved a checkpoint.
    """
    todo = [cell for cell in planned.cells if not is_finished(folder, cell.name)]
    done = len(planned.cells) - len(todo)
    if done:
        console.print(f"{done} of {len(planned.cells)} cells are finished already and are kept.", highlight=False)
    if not todo:
        return
    shown = Display(console, todo, done, len(planned.cells))
    with stop_on_signals(console) as stop, Worker(folder) as worker, shown as display:
        for cell in todo:
            display.start(cell)
            error = _run(folder, cell, worker, display, stop)
            if stop.asked:
                assert stop.signal_number is not None
                raise Interrupted(f"stopped; what is trained is kept, go on with `{go_on}`", stop.signal_number)
            display.end(cell, error)


def _run(folder: Path, cell: PlannedCell, worker: Worker, display: "Display", stop: StopRequest) -> str | None:
    """Runs one cell to its end; returns the sentence that it failed with, or None."""
    failure = failure_path(folder, cell.name)
    failure.parent.mkdir(parents=True, exist_ok=True)
    failure.unlink(missing_ok=True)
    run = RunFolder(cell_folder(folder, cell.name))
    log = failure.with_name(f"{cell.name}.log")
    worker.start(cell.name, log)
    asked = False
    while (code := worker.poll()) is None:
        if stop.asked and not asked:
            asked = worker.interrupt()
        display.show(cell, spent_share(run, cell))
        time.sleep(POLL)
    if code == 0 or stop.asked:
        return None
    if not failure.is_file():
        end = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        hint = ", probably because memory ran out" if code == -signal.SIGKILL else ""
        write_json(failure, {"cell": cell.name, "error": f"its process {end}{hint}; see {log}"})
    return str(read_json(failure)["error"])


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


class Display:
    """All cells on one bar, weighted by their FLOPs or seconds, and the cell in hand on a second one.

    The time left follows from the time that the work done so far has taken.
    """

    def __init__(self, console: Console, cells: Sequence[PlannedCell], done: int, total: int) -> None:
        self.console, self.total, self.number = console, total, done
        self.weights = {cell.name: cell.max_seconds or cell.train_flops for cell in cells}
        self.all = sum(self.weights.values())
        self.spent, self.started, self.width = 0.0, time.monotonic(), max(len(cell.name) for cell in cells)
        self.cell_started = self.started
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
        self.study: TaskID | None = None
        self.cell: TaskID | None = None

    def __enter__(self) -> "Display":
        self.progress.start()
        self.study = self.progress.add_task("study", total=1.0, left="")
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, cell: PlannedCell) -> None:
        """A cell begins."""
        self.number += 1
        self.cell_started = time.monotonic()
        if self.cell is not None:
            self.progress.remove_task(self.cell)
        text = f"{self.number}/{self.total} {cell.name:<{self.width}}"
        self.cell = self.progress.add_task(text, total=1.0, left="")

    def show(self, cell: PlannedCell, share: float) -> None:
        """The cell has spent `share` of its budget."""
        assert self.study is not None and self.cell is not None
        done = (self.spent + share * self.weights[cell.name]) / self.all
        self.progress.update(self.cell, completed=share, left="measuring" if share >= 1 else "")
        left = (time.monotonic() - self.started) * (1 - done) / done if done > 0.01 else None
        self.progress.update(self.study, completed=done, left="" if left is None else f"{duration(left)} left")

    def end(self, cell: PlannedCell, error: str | None) -> None:
        """The cell has ended; its line stays."""
        self.spent += self.weights[cell.name]
        took = duration(time.monotonic() - self.cell_started)
        where = f"{self.number}/{self.total} {cell.name:<{self.width}}"
        if error is None:
            self.console.print(f"[green]✓[/] {where}  {took}", highlight=False)
        else:
            self.console.print(f"[red]✗[/] {where}  {took}  ", end="", highlight=False)
            self.console.print(error, style="red", markup=False, highlight=False)
