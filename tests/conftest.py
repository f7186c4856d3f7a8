"""Shared fixtures: every test starts from the same seeds, on one thread, with its cache folder out of the way."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from morex.study import canvas, runner, worker

settings.register_profile("morex", deadline=None, derandomize=True, database=None)
settings.load_profile("morex")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread makes sums reproducible to the bit and leaves the machine to the other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of this test run's own, so that nothing is read from or written to the user's."""
    folder = tmp_path_factory.mktemp("morex-cache")
    before = os.environ.get("MOREX_CACHE")
    os.environ["MOREX_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["MOREX_CACHE"]
    else:
        os.environ["MOREX_CACHE"] = before


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random state at the start of every test, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class ForkedServer:
    """What `Worker` needs of the process that serves its cells, forked from this one, which has imported everything."""

    def __init__(self, folder: Path) -> None:
        requests, answers = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for source, standard in ((requests[0], 0), (answers[1], 1)):
                os.dup2(source, standard)
            for end in (*requests, *answers):
                os.close(end)
            sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
            worker.serve(str(folder))
            os._exit(0)
        os.close(requests[0])
        os.close(answers[1])
        self.stdin, self.stdout = open(requests[1], "wb"), open(answers[0], "rb", buffering=0)  # noqa: SIM115
        os.set_blocking(answers[0], False)
        self.code: int | None = None

    def poll(self) -> int | None:
        """As of `subprocess.Popen`."""
        return self._ended(os.WNOHANG)

    def wait(self) -> int | None:
        """As of `subprocess.Popen`."""
        return self._ended(0)

    def _ended(self, options: int) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, options)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code


@pytest.fixture
def quick_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies without what takes time in a small one: a new interpreter for the cells, waiting, fine pictures."""
    import torch._dynamo  # noqa: F401 (what the server imports first)

    monkeypatch.setattr(runner, "POLL", 0.02)
    monkeypatch.setattr(canvas, "DPI", 40)
    if hasattr(os, "fork"):
        monkeypatch.setattr(worker.Worker, "_serve", lambda self: ForkedServer(self.folder))
