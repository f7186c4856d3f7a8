"""What a process of Ray's does for a study: one cell, and word of it to the desk of whoever asked.

Where it does not see the study folder, it works in one of its own, and what it writes goes to the desk as it comes.
"""

import _thread
import os
import shutil
import signal
import socket
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from morex.files import write_whole
from morex.study.cell import INTERRUPTED, main
from morex.study.mirror import Mirror, keep_up
from morex.study.results import failure_path
from morex.study.worker import redirect

REPORT = 1.0
"""Seconds between two words to the desk."""
ANSWER = 60.0
"""Seconds in which the desk has to answer; it is lost otherwise."""
WITHOUT_FILES = -1000
"""Code of an errand that needs the files of the cell, as it does not see the study folder."""


@dataclass(frozen=True)
class Errand:
    """One cell to run, and how."""

    folder: str
    """The study folder, absolute."""
    mark: str
    """A file of the study folder: who sees it shares the file system."""
    study: dict[str, Any]
    cell: str
    has_begun: bool
    """Whether the study folder has a run of the cell to go on with."""
    threads: int
    """CPU threads, where `train.threads` does not set them."""
    directory: str
    """Current folder, for relative paths of corpora."""
    environment: dict[str, str]
    """Variables that the library reads."""


def owned(cell: str) -> list[str]:
    """Entries of a study's `runs` that belong to a cell."""
    return [cell, f"{cell}.log", failure_path(Path(), cell).name]


def run_errand(errand: Errand, files: bytes | None, desk: Any) -> int:
    """Runs a cell in this process, which does nothing else before or after it; returns an exit code as of `cell.main`.

    Args:
        errand: the cell.
        files: what the study folder has of it; asked for by the code WITHOUT_FILES.
        desk: handle of the actor.
    """
    # Ray has SIGINT blocked. A signal to the interpreter alone is not, and finds this handler or that of training.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(errand.environment)
    with suppress(OSError):
        os.chdir(errand.directory)
    folder, mirror = Path(errand.folder), None
    if not (folder / errand.mark).is_file():
        if errand.has_begun and files is None:
            return WITHOUT_FILES
        folder = Path(tempfile.mkdtemp(prefix="morex-study-"))
        mirror = _prepared(folder, errand, files)
    link = Link(desk, errand.cell, mirror)
    try:
        redirect(str(folder / "runs" / f"{errand.cell}.log"))
        torch.set_num_threads(errand.threads)
        link.start()
        return main([str(folder), errand.cell])
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        link.close()
        if mirror is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _prepared(folder: Path, errand: Errand, files: bytes | None) -> Mirror:
    """A study folder of this machine's own, with what there is of the cell."""
    write_whole(folder / "study.yaml", yaml.safe_dump(errand.study, sort_keys=False, allow_unicode=True))
    (folder / "runs").mkdir()
    mirror = Mirror(folder / "runs", owned(errand.cell))
    if files is not None:
        keep_up(folder / "runs", files, owned(errand.cell))
        mirror.mark_as_sent()
    return mirror


class Link(threading.Thread):
    """Tells the desk every second that a cell runs, with what has changed in its files, and passes a stop on.

    A call that blocks in `ray.get` would give the cell's CPUs to others meanwhile; a future does not.
    """

    def __init__(self, desk: Any, cell: str, mirror: Mirror | None) -> None:
        super().__init__(daemon=True)
        self.desk, self.cell, self.mirror = desk, cell, mirror
        self.over = threading.Event()

    def run(self) -> None:
        """Until the cell is over."""
        told = False
        while not self.over.is_set():
            try:
                stop = self._report()
            except Exception:  # whoever asked for the cell is gone
                stop = True
            if stop and not told:
                told = True
                _thread.interrupt_main()
            self.over.wait(REPORT)

    def close(self) -> None:
        """Sends what is left to send."""
        self.over.set()
        if self.is_alive():
            self.join()
        with suppress(Exception):
            self._report()

    def _report(self) -> bool:
        archive = self.mirror.changes() if self.mirror is not None else None
        answer = self.desk.report.remote(self.cell, socket.gethostname(), archive)
        return bool(answer.future().result(timeout=ANSWER))
