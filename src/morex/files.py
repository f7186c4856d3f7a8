"""Files that are whole or not there at all, and their checksums."""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """What can be made again: $MOREX_CACHE, or ~/.cache/morex."""
    return Path(os.environ.get("MOREX_CACHE") or Path.home() / ".cache" / "morex").expanduser()


def sha256(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal, read a piece at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it holds none; the message is one sentence that names the file.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"'{path}' is damaged: it is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' is damaged: it must hold a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all. Raises OSError as `write_whole` does."""
    write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name beside it, forces it to disk and renames it; text becomes UTF-8.

    Raises:
        OSError: the disk is full or not writable; what was there before is intact, and nothing else stays.
    """
    # Unique, so that two that write the same file at once do not write into each other's.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Forces a folder's entries to disk, so that a rename survives a power cut."""
    with suppress(PermissionError):  # Windows cannot open folders.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
