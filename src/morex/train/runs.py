"""The run folder: one training, in one folder. Everything that draws or compares reads run folders through here.

- config.yaml: the resolved config
- metrics.jsonl: one object a line, `kind` train or eval
- checkpoints/step-N/: see `morex.train.checkpoint`
- tokenizer/: the tokenizer that made the tokens
- env.json: versions, device, CPU, threads, commit
- trackers.json: names that other trackers know the run by; only where there are any
- summary.json: the end of the run in numbers; only finished runs have it
- heartbeat.json: a sign of life, while it trains; it stays where the training was killed
"""

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from morex import files
from morex.config import Config
from morex.loading import load_config
from morex.train.errors import FULL, RunFolderError

try:
    import fcntl
except ImportError:  # Windows has no flock; there nothing keeps two processes apart.
    fcntl = None  # type: ignore[assignment]

PACKAGES = ("morex", "torch", "numpy", "safetensors", "tokenizers", "pydantic")


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run and what is in them."""

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer"

    @property
    def env_path(self) -> Path:
        return self.path / "env.json"

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    @property
    def heartbeat_path(self) -> Path:
        return self.path / "heartbeat.json"

    def checkpoint_path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.checkpoints / f"step-{step}"

    def is_run(self) -> bool:
        """Whether a training has begun here."""
        return self.config_path.is_file()

    @property
    def is_stopped(self) -> bool:
        """Whether a training has ended here by itself after it had saved: neither killed nor under way."""
        return self.checkpoints.is_dir() and not self.heartbeat_path.exists()

    @property
    def resume_command(self) -> str:
        """The command line that goes on with the run, for messages."""
        return shlex.join(["morex", "train", "--resume", str(self.path)])

    def how_to_go_on(self) -> str:
        """What to do after a stop, for messages."""
        return f"go on with `{self.resume_command}`" if self.is_run() else "start again"

    def config(self) -> Config:
        """The resolved config. Raises RunFolderError where there is no run, ConfigError where the file is not valid."""
        if not self.is_run():
            raise RunFolderError(f"'{self.path}' is not a run folder: it has no config.yaml")
        return load_config(self.config_path)

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl in order, of one `kind` or all; [] where there are none yet."""
        if not self.metrics_path.is_file():
            return []
        lines = read_json_lines(self.metrics_path)
        return lines if kind is None else [line for line in lines if line.get("kind") == kind]

    def summary(self) -> dict[str, Any] | None:
        """summary.json, or None where the run is not finished."""
        return read_json(self.summary_path) if self.summary_path.is_file() else None

    def environment(self) -> dict[str, Any] | None:
        """env.json, or None where the run has not begun."""
        return read_json(self.env_path) if self.env_path.is_file() else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder, made if need be, against other processes; one that stays empty after an error goes again.

        Raises:
            RunFolderError: another process holds it, or it cannot be made or written.
            OSError: the disk is full.
        """
        is_new, lock = not self.path.exists(), self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if error.errno in FULL:
                raise
            raise RunFolderError(
                f"run folder '{self.path}' cannot be made or written ({error.strerror}); name another folder"
            ) from None
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
                    raise RunFolderError(
                        f"run folder '{self.path}' is in use by process {holder}; wait for it or name another folder"
                    ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield
        except BaseException:
            if is_new and list(self.path.iterdir()) == [lock]:
                lock.unlink()
                self.path.rmdir()
            raise
        finally:
            os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run. Raises RunFolderError where it holds none."""
    try:
        return files.read_json(path)
    except ValueError as error:
        raise RunFolderError(str(error)) from None


def encoded(line: Mapping[str, Any]) -> str:
    """A line of metrics.jsonl."""
    return json.dumps(line, allow_nan=False) + "\n"


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; an incomplete last line, which a killed process leaves, is left out."""
    raw = path.read_bytes().split(b"\n")
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(raw, start=1):
        if not line:
            continue
        try:
            lines.append(json.loads(line))
        except (UnicodeDecodeError, json.JSONDecodeError):
            if number == len(raw):
                break
            raise RunFolderError(f"'{path}' is damaged: line {number} is not valid JSON") from None
    return lines


def write_config(path: Path, config: Config) -> None:
    """Writes a config as YAML, whole or not at all."""
    files.write_whole(path, yaml.safe_dump(config.to_dict(), sort_keys=False))


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, CPU, threads and commit, as written to env.json."""
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def cpu_name() -> str:
    """The CPU's model name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that the package runs from, `-dirty` where files differ; None outside a checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=here.parent,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        # An installed copy may lie inside the checkout of another project: ask whether this very file is tracked.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
