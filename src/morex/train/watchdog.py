"""A thread beside the training that tells it is alive, and ends it where it hangs.

The first rank's heartbeat is a small file in the run folder. Where a rank does not get on, its own watchdog says which
one it is and where it stands, and ends the process; whoever started the ranks then ends the others.
"""

import os
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

from morex.files import write_json
from morex.train.ranks import Ranks
from morex.train.runs import RunFolder, read_json

BEAT = 5.0
"""Seconds between heartbeats."""
EXIT_CODE = 1
LIBRARY = os.path.join("torch", "distributed")
"""Whoever stands in here waits for other ranks."""


class Watchdog:
    """Watches the thread that makes it, from `with` on.

    Args:
        run: where the heartbeat goes.
        limit: seconds without a step, an evaluation or a checkpoint from which on a rank hangs; None: never.
    """

    def __init__(self, run: RunFolder, ranks: Ranks, limit: float | None) -> None:
        self._run, self._ranks, self._limit = run, ranks, limit
        self._every = BEAT if limit is None else min(BEAT, limit / 4)
        self._step, self._since = 0, time.monotonic()
        self._ended = threading.Event()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self._ranks.is_first:
            self._run.heartbeat_path.unlink(missing_ok=True)

    def beat(self, step: int) -> None:
        """Called whenever the training gets on."""
        self._step, self._since = step, time.monotonic()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self._every):
            now = time.monotonic()
            stopped = now - before - self._every
            if stopped > self._every:  # the whole process was: a job that is suspended does not hang
                self._since += stopped
            before = now
            self._write()
            if self._limit is not None and now - self._since > self._limit:
                self._end(self._limit)

    def _write(self) -> None:
        if self._ranks.is_first:
            with suppress(OSError):  # a full disk is for those to tell who need it
                write_json(
                    self._run.heartbeat_path,
                    {
                        "time": time.time(),
                        "step": self._step,
                        "ranks": self._ranks.size,
                        "process": os.getpid(),
                        "host": socket.gethostname(),
                    },
                )

    def _end(self, limit: float) -> None:
        frame = sys._current_frames().get(self._watched)
        waits = _waits_for_others(frame)
        if waits and self._ended.wait(2 * self._every):  # the rank that is waited for speaks first
            return
        where = f"rank {self._ranks.rank} of {self._ranks.size} (process {os.getpid()} on {socket.gethostname()})"
        what = "waits for other ranks" if waits else "hangs"
        stack = "".join(traceback.format_stack(frame)) if frame is not None else "its thread has ended\n"
        print(
            f"{where} {what} since step {self._step}, for more than train.hang_seconds {limit:g}; it stands at\n{stack}"
            f"the training ends; {self._run.how_to_go_on()}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_CODE)


def read_heartbeat(run: RunFolder) -> dict[str, Any] | None:
    """The last heartbeat of a training that goes on or was killed, with its `age` in seconds; else None."""
    if not run.heartbeat_path.is_file():
        return None
    found = read_json(run.heartbeat_path)
    return {**found, "age": max(0.0, time.time() - found["time"])}


def _waits_for_others(frame: FrameType | None) -> bool:
    return frame is not None and LIBRARY in frame.f_code.co_filename
