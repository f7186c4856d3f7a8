"""What a training shows on the way: a live bar on a terminal, a plain line now and then elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY = 30.0
"""Seconds between plain lines."""


class ProgressDisplay:
    """Shows the step, the time left, the last losses and the speed.

    Args:
        console: where; a quiet console shows nothing.
        total: units of the run, steps or seconds.
        done: units that are done already.
        unit: `steps` or `seconds`.
    """

    def __init__(self, console: Console, total: float, done: float, unit: str) -> None:
        self.console, self.total, self.unit = console, total, unit
        self.started, self.done_before = time.monotonic(), done
        self.said = self.started
        self.bar: Progress | None = None
        self.text, self.evaluated = "", ""
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("[dim]{task.fields[detail]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                refresh_per_second=4,
                transient=True,
            )
            self.task = self.bar.add_task(unit, total=round(total), completed=round(done), detail="")

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: float, loss: float, tokens_per_second: float) -> None:
        """Shows a completed step."""
        self.text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=round(done), detail=f"{self.text}{self.evaluated}")
        elif time.monotonic() - self.said >= PLAIN_EVERY:
            self._say(done)

    def show_evaluation(self, step: int, loss: float, oracle: float | None, accuracy: float | None = None) -> None:
        """Shows an evaluation on a line that stays."""
        self.evaluated = f"  held-out {loss:.4f}"
        both = "" if oracle is None else f" (oracle {oracle:.4f})"
        right = "" if accuracy is None else f", accuracy {accuracy:.1%}"
        self.console.print(f"step {step:,}: held-out loss {loss:.4f}{both}{right}  {self.text}", highlight=False)
        self.said = time.monotonic()

    def say(self, text: str) -> None:
        """Shows a line that stays, of something unusual."""
        self.console.print(text, style="yellow", markup=False, highlight=False)

    def _say(self, done: float) -> None:
        self.said = time.monotonic()
        share = (done - self.done_before) / max(self.total - self.done_before, 1e-9)
        left = (self.said - self.started) * (1 - share) / max(share, 1e-9)
        self.console.print(
            f"{self.unit} {round(done):,}/{round(self.total):,}: {self.text}{self.evaluated}, "
            f"about {left / 60:.0f} min left",
            highlight=False,
        )
