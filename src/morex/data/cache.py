"""The cache folder, and writing to it so that nothing half-written is ever taken for whole.

Files and folders are written under a temporary name and renamed when they are complete. Two processes that build the
same thing at once both build it; the first to rename wins, and both read what won.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from morex import files
from morex.data.errors import DataError

TEMPORARY = ".unfinished-"
ABANDONED_AFTER_SECONDS = 24 * 3600


def key_of(*parts: Any) -> str:
    """A short name for anything that JSON can hold: equal parts, equal key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an exception, and is gone otherwise.

    Raises:
        DataError: nothing can be written there, or the disk is full.
    """
    with write_faults(folder):
        temporary = temporary_name(folder)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sweep(folder.parent)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file of the cache, whole or not at all; raises DataError where that fails."""
    with write_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, content)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file of the cache, or None where there is none that can be read."""
    try:
        return files.read_json(path)
    except (OSError, ValueError):
        return None


def discard(folder: Path) -> None:
    """Removes a folder of the cache that turned out to be damaged."""
    with write_faults(folder):
        doomed = temporary_name(folder)
        try:
            folder.rename(doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nothing else has."""
    return path.parent / f"{TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def write_faults(path: Path, elsewhere: str = "let MOREX_CACHE name a folder that can be written") -> Iterator[None]:
    """Raises DataError in place of any OSError inside the block; `elsewhere` says how to write to another place."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write '{path}': {error.strerror or error}; free some space, or {elsewhere}") from error


def sweep(folder: Path, pattern: str = f"{TEMPORARY}*") -> None:
    """Removes what processes that were killed long ago have left in a folder, under names of this pattern."""
    for left in folder.glob(pattern):
        try:
            abandoned = time.time() - left.stat().st_mtime > ABANDONED_AFTER_SECONDS
        except FileNotFoundError:
            continue
        if abandoned and left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif abandoned:
            left.unlink(missing_ok=True)
