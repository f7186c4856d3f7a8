"""Cells on a Ray cluster: each is a task with its CPUs and, where it trains on one, a GPU.

Machines that see the study folder write into it. From others the files of a cell come back as they change, so that a
cell goes on from its newest checkpoint in either case.
"""

import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from morex.files import write_json
from morex.loading import ConfigError
from morex.study.cell import INTERRUPTED, WOULD_FAIL_AGAIN
from morex.study.desk import Desk
from morex.study.errand import WITHOUT_FILES, Errand, owned, run_errand
from morex.study.mirror import Mirror, keep_up
from morex.study.plan import PlannedCell
from morex.study.results import cell_folder, failure_path, read_study
from morex.study.spec import StudyConfig
from morex.train.errors import TrainingError
from morex.train.runs import RunFolder

ANSWERS = 5.0
"""Seconds in which an address has to take a connection."""
HEALTHY = 20.0
"""Seconds in which a Ray has to say that it is one."""
JOINS = 60.0
"""Seconds in which a Ray that took the connection has to let this process in."""
LEAVES = 30.0
"""Seconds in which a connection has to end."""
NEWS = 0.2
"""Seconds between two looks at the desk."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # it would send the current folder to every machine
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # cells without a GPU see none; and no warning about it
}
"""Variables that Ray reads at its import: nothing is sent home, shipped, or printed between our lines."""


@dataclass(frozen=True)
class Cluster:
    """Tasks on a Ray cluster."""

    address: str | None = None
    """HOST:PORT, `ray://HOST:PORT`, or `auto`; default $RAY_ADDRESS, the Ray that runs here, or one of this machine."""
    cpus: int | None = None
    """CPUs that Ray keeps free for a cell; default `train.threads`, or the threads of this process."""
    jobs: int | None = None
    """Cells at a time; default as many as there is room for."""
    retries: int = 2

    @property
    def words(self) -> list[str]:
        options = {"--ray-address": self.address, "--cell-cpus": self.cpus, "--jobs": self.jobs}
        given = [word for option, value in options.items() if value is not None for word in (option, str(value))]
        return ["--on", "ray", *given, *(["--retries", str(self.retries)] if self.retries != 2 else [])]

    def check(self, study: StudyConfig, cells: Sequence[PlannedCell]) -> None:
        """Raises ConfigError without Ray, for an address at which nothing answers, and for what cannot be shared."""
        for option, value in (("--jobs", self.jobs), ("--cell-cpus", self.cpus)):
            if value is not None and value < 1:
                raise ConfigError(f"{option} {value} must be 1 or more")
        if study.budget.kind == "seconds":
            raise ConfigError(
                "--on ray does not go with budget.kind 'seconds', as machines differ and cells share them; use --on "
                "local, or a budget in tokens, flops or steps"
            )
        for device in sorted({cell.config.train.device for cell in cells}):
            if device not in ("auto", "cpu", "cuda"):
                raise ConfigError(
                    f"train.device '{device}' does not go with --on ray, which gives each cell a GPU of its own; use "
                    f"auto, cpu or cuda"
                )
        if cells:
            _imported()
            _refuse_silent(self.address or os.environ.get("RAY_ADDRESS"))

    @contextmanager
    def workers(self, folder: Path, cells: Sequence[PlannedCell]) -> Iterator[list["RayWorker"]]:
        """Joins the cluster for as long as the block takes; cells in hand at its end are ended."""
        ray = _imported()
        mark = _mark(folder)
        with _joined(ray, self.address):
            needs = Needs.of(ray, self.cpus, cells)
            desk = _desk(ray)
            mark.touch()
            workers: list[RayWorker] = []
            try:
                session = Session(ray, folder, mark.name, desk, needs)
                workers += [RayWorker(session) for _ in range(min(self.jobs or len(cells), len(cells)))]
                yield workers
            except ray.exceptions.RayError as error:
                raise TrainingError(
                    f"the Ray cluster was lost ({_first_line(error)}); what is trained is kept, run the study again"
                ) from error
            finally:
                mark.unlink(missing_ok=True)
                for worker in workers:
                    worker.close()
                with suppress(Exception):
                    ray.kill(desk)


def _mark(folder: Path) -> Path:
    """A file that nobody can have looked for before, as file systems remember what was not there."""
    return folder / f".shared-{secrets.token_hex(8)}"


@dataclass(frozen=True)
class Needs:
    """What cells ask of the cluster."""

    cpus: int | None
    has_gpus: bool

    @classmethod
    def of(cls, ray: Any, cpus: int | None, cells: Sequence[PlannedCell]) -> "Needs":
        """Raises ConfigError where no machine has what a cell needs: Ray would wait for one."""
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needs = cls(cpus, any(machine.get("GPU", 0) >= 1 for machine in machines))
        for cell in cells:
            if cell.config.train.device == "cuda" and not needs.has_gpus:
                raise ConfigError("train.device 'cuda' is not there: no machine of the Ray cluster has a GPU; use auto")
            fits = [
                machine
                for machine in machines
                if machine.get("CPU", 0) >= needs.threads(cell) and machine.get("GPU", 0) >= needs.gpus(cell)
            ]
            if not fits:
                most = max((machine.get("CPU", 0) for machine in machines), default=0)
                beside = " beside a GPU" if needs.gpus(cell) else ""
                raise ConfigError(
                    f"cell '{cell.name}' needs {needs.threads(cell)} CPUs{beside}, and the largest machine of the Ray "
                    f"cluster has {most:g}; lower --cell-cpus or train.threads"
                )
        return needs

    def threads(self, cell: PlannedCell) -> int:
        """CPUs of a cell."""
        return self.cpus or cell.config.train.threads or torch.get_num_threads()

    def gpus(self, cell: PlannedCell) -> int:
        """GPUs of a cell: one where it asks for one, or takes what there is."""
        device = cell.config.train.device
        return int(device == "cuda" or (device == "auto" and self.has_gpus))


class Session:
    """What the workers of a study share: the cluster and the desk."""

    def __init__(self, ray: Any, folder: Path, mark: str, desk: Any, needs: Needs) -> None:
        self.ray, self.folder, self.mark, self.desk, self.needs = ray, folder.absolute(), mark, desk, needs
        self.study = read_study(folder).to_dict()
        self.machines: dict[str, str] = {}
        self.looked, self.stopping = 0.0, False
        # A process that has run a cell ends: its memory, threads and streams are the cell's.
        self.task = ray.remote(max_calls=1, max_retries=0)(run_errand)

    def submit(self, cell: PlannedCell, files: bytes | None = None) -> Any:
        """Hands a cell to the cluster."""
        errand = Errand(
            folder=str(self.folder),
            mark=self.mark,
            study=self.study,
            cell=cell.name,
            has_begun=RunFolder(cell_folder(self.folder, cell.name)).is_run(),
            threads=self.needs.threads(cell),
            directory=os.getcwd(),
            environment={name: value for name, value in os.environ.items() if name.startswith("MOREX_")},
        )
        needs = {"num_cpus": self.needs.threads(cell), "num_gpus": self.needs.gpus(cell), "name": cell.name}
        return self.task.options(**needs).remote(errand, files, self.desk)

    def look(self, now: bool = False) -> None:
        """Takes what has come to the desk, at most every NEWS seconds unless `now`."""
        if not now and time.monotonic() - self.looked < NEWS:
            return
        self.machines, archives = self.ray.get(self.desk.news.remote())
        for cell, archive in archives:
            keep_up(self.folder / "runs", archive, owned(cell))
        self.looked = time.monotonic()

    def forget(self, cell: str) -> None:
        """A cell is not in hand any more."""
        self.ray.get(self.desk.forget.remote(cell))
        self.machines.pop(cell, None)


class RayWorker:
    """Runs one cell at a time as a task; see `executor.CellWorker`."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.cell: PlannedCell | None = None
        self.task: Any = None

    @property
    def machine(self) -> str | None:
        """Where the cell runs."""
        return None if self.cell is None else self.session.machines.get(self.cell.name)

    def start(self, cell: PlannedCell, log: Path) -> None:
        """Hands the cell to the cluster; its log stands at the same place in the study folder."""
        self.cell = cell
        self.session.forget(cell.name)
        self.task = self.session.submit(cell)

    def poll(self) -> int | None:
        """Exit code, or None."""
        assert self.cell is not None
        self.session.look()
        done, _ = self.session.ray.wait([self.task], timeout=0)
        if not done:
            return None
        code = self._code(self.cell)
        self.session.look(now=True)
        if code != WITHOUT_FILES:
            return code
        self.task = self.session.submit(self.cell, _files_of(self.session.folder, self.cell.name))
        return None

    def interrupt(self) -> bool:
        """A cell that runs saves and stops, one that waits is taken back."""
        self.session.stopping = True
        self.session.ray.get(self.session.desk.stop.remote())
        if self.machine is None:
            self.session.ray.cancel(self.task)
        return True

    def close(self) -> None:
        """Ends a cell in hand at once."""
        if self.task is not None:
            with suppress(Exception):
                self.session.ray.cancel(self.task, force=True)

    def _code(self, cell: PlannedCell) -> int:
        """Code of the task that is done; where Ray itself could not finish it, the reason is written down."""
        exceptions = self.session.ray.exceptions
        try:
            return int(self.session.ray.get(self.task))
        except exceptions.RayError as error:
            if self.session.stopping or isinstance(error, exceptions.TaskCancelledError):
                return INTERRUPTED
            reason, code = self._explained(cell, error)
        self.task = None
        write_json(failure_path(self.session.folder, cell.name), {"cell": cell.name, "error": reason})
        return code

    def _explained(self, cell: PlannedCell, error: Exception) -> tuple[str, int]:
        """Why Ray could not finish a cell, in a sentence, and the exit code that stands for it."""
        if not isinstance(error, self.session.ray.exceptions.RayTaskError):
            where = self.session.machines.get(cell.name, "its machine")
            return f"its process on {where} died: {_first_line(error)}", 1
        reason = _last_line(error)
        if "No module named" in str(error) or "failed to import" in str(error):
            lacks = f"a machine of the Ray cluster lacks what the cell needs ({reason})"
            return f"{lacks}; install the same version of morex on all of them", WOULD_FAIL_AGAIN
        return f"its task failed: {reason}", 1


def _imported() -> Any:
    """Ray, with what it reads at its import set."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise ConfigError("--on ray needs ray, which is not installed; run pip install 'morex[ray]'") from None
    return ray


def _refuse_silent(address: str | None) -> None:
    """Raises ConfigError where nothing takes a connection: Ray itself would try for minutes."""
    if address in (None, "auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--ray-address '{address}' must be HOST:PORT, ray://HOST:PORT or auto")
    hint = "start Ray there with `ray start --head`, or name another address"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS):
            pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--ray-address '{address}' does not answer ({reason.lower()}); {hint}") from None
    if address.startswith("ray://"):  # whose client has a limit of its own
        return
    # In a process of its own: Ray's core can neither be told to hurry nor to be quiet.
    look = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(look, capture_output=True, text=True, check=False, timeout=HEALTHY)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"--ray-address '{address}' takes connections, but there is no Ray; {hint}") from None
    if "AuthenticationError" in done.stderr:
        raise ConfigError(
            f"--ray-address '{address}' wants a token; set RAY_AUTH_MODE=token and give Ray the token of that cluster"
        )
    if done.returncode:
        raise ConfigError(f"--ray-address '{address}' cannot be used: {_last_line(done.stderr)}")


@contextmanager
def _joined(ray: Any, address: str | None) -> Iterator[None]:
    """A connection to the cluster; one that the process has already is used and left open."""
    if ray.is_initialized():
        yield
        return
    name = f"--ray-address '{address}'" if address else "the Ray of this machine"
    failure: list[BaseException] = []
    joined, over = threading.Event(), threading.Event()

    def stay() -> None:
        options = {} if address else {"include_dashboard": False}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
        except BaseException as error:
            failure.append(error)
        joined.set()
        over.wait()
        ray.shutdown()

    # In a thread of its own Ray leaves the handlers of signals as they are, and one that never answers can be left. The
    # thread stays, as what it has started ends with it.
    thread = threading.Thread(target=stay, daemon=True)
    thread.start()
    if not joined.wait(JOINS):
        raise ConfigError(f"{name} takes connections, but no Ray has answered there in {JOINS:.0f} seconds")
    try:
        if failure:
            raise ConfigError(f"{name} cannot be used: {_first_line(failure[0])}")
        yield
    finally:
        over.set()
        thread.join(LEAVES)


def _desk(ray: Any) -> Any:
    """The actor that errands report to, on this machine where it is one of the cluster."""
    near = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    return ray.remote(num_cpus=0)(Desk).options(scheduling_strategy=near).remote()


def _files_of(folder: Path, cell: str) -> bytes | None:
    """What the study folder has of a cell."""
    return Mirror(folder / "runs", owned(cell)).changes()


def _first_line(text: object) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(text).__name__


def _last_line(text: object) -> str:
    """The last line that says something; of a traceback, the error."""
    return _first_line("\n".join(reversed(str(text).splitlines())) or type(text).__name__)
