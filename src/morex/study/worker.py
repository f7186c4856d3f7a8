"""Cells in processes of their own, forked from one that has imported everything: a cell starts in a moment.

A process of its own keeps a cell's peak memory apart from the others', and one that dies takes nothing with it. Run as
`python -m morex.study.worker FOLDER` it reads requests, one JSON object a line, and answers with the exit codes.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from morex.study.cell import main
from morex.study.plan import PlannedCell


class Worker:
    """Runs one cell of a study folder at a time; use as a context manager.

    It has a session of its own, so that Ctrl-C in a terminal reaches the caller alone.

    Args:
        folder: of the study.
        threads: CPU threads of cells whose config does not set them; default torch's own.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self.folder, self.threads = folder, threads
        self.server: subprocess.Popen[bytes] | None = None
        self.pid: int | None = None
        self.answers = b""

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        if self.server is None:
            return
        if self.pid is not None:
            self._signal(signal.SIGKILL)
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()
        self.server = None

    @property
    def machine(self) -> str:
        """As of `executor.CellWorker`."""
        return "here"

    def start(self, cell: PlannedCell, log: Path) -> None:
        """Starts a cell; what it prints goes to the end of `log`."""
        if self.server is None or self.server.poll() is not None:
            self.server = self._serve()
        assert self.server.stdin is not None
        self.answers, self.pid = b"", None
        self.server.stdin.write(json.dumps({"cell": cell.name, "log": str(log)}).encode() + b"\n")
        self.server.stdin.flush()

    def poll(self) -> int | None:
        """Exit code of the cell, negative for a signal, or None while it runs."""
        assert self.server is not None and self.server.stdout is not None
        died = self.server.poll()
        self.answers += self.server.stdout.read() or b""
        for line in self.answers.split(b"\n")[:-1]:
            answer = json.loads(line)
            if "code" in answer:
                self.pid = None
                return int(answer["code"])
            self.pid = answer["pid"]
        if died is not None and self.pid is not None:
            # The server is gone; its cell must not go on unseen beside the next one.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        return died

    def interrupt(self) -> bool:
        """Asks the cell to save and stop; whether it could be asked already."""
        return self._signal(signal.SIGINT)

    def _signal(self, number: int) -> bool:
        if self.poll() is not None or self.pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
        return True

    def _serve(self) -> "subprocess.Popen[bytes]":
        server = subprocess.Popen(
            [sys.executable, "-m", "morex.study.worker", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | ({} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}),
        )
        assert server.stdout is not None
        os.set_blocking(server.stdout.fileno(), False)
        return server


def serve(folder: str) -> None:
    """Answers requests until there are no more."""
    # Optimizers import this at first use, which takes a second or two.
    import torch._dynamo  # noqa: F401

    # Whoever started this server decides when its cells stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for line in sys.stdin:
        request = json.loads(line)
        if hasattr(os, "fork"):
            child = _fork(folder, request)
            answer({"pid": child})
            answer({"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])})
        else:
            process = _spawn(folder, request)
            answer({"pid": process.pid})
            answer({"code": process.wait()})


def answer(content: dict[str, Any]) -> None:
    """Writes one line to whoever asks."""
    print(json.dumps(content), flush=True)


def _fork(folder: str, request: dict[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        redirect(request["log"])
        code = main([folder, request["cell"]])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _spawn(folder: str, request: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Where there is no fork, a fresh interpreter."""
    with open(request["log"], "ab") as log:
        command = [sys.executable, "-m", "morex.study.cell", folder, request["cell"]]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def redirect(log: str) -> None:
    """Standard output and error go to a file, standard input gives nothing."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, standard in ((nothing, 0), (target, 1), (target, 2)):
        os.dup2(source, standard)


if __name__ == "__main__":
    serve(sys.argv[1])
    # Whoever closed the requests waits for the end, and to take everything that was imported down takes seconds.
    os._exit(0)
