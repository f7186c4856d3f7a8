"""A progress bar on stderr for work on text that takes longer than a moment; nothing where nobody is looking."""

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

PATIENCE_SECONDS = 1.5
PAUSE_SECONDS = 0.1
"""Between two looks at the bar, which costs more than a short text does."""


class Progress:
    """Counts bytes; shows a bar once `PATIENCE_SECONDS` have passed, on a terminal only."""

    def __init__(self, title: str, total: int | None) -> None:
        self._title = title
        self._total = total
        self._done = 0
        self._due = time.monotonic() + PATIENCE_SECONDS
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._draw()
            self._bar.stop()

    def advance(self, num_bytes: int) -> None:
        """Counts `num_bytes` more bytes of text as done."""
        self._done += num_bytes
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + PAUSE_SECONDS
        if self._bar is None:
            self._show()
        self._draw()

    def _draw(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done)

    def _show(self) -> None:
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        self._bar = progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._bar.start()
        self._task = self._bar.add_task(self._title, total=self._total)
