"""A folder that one machine writes and another one keeps up with, where they share no file system.

What is sent is an archive in memory, as far as possible of what has changed: files, whole, and the names of all that
there are. Names that begin with a dot are left out; files being written have such names.
"""

import io
import json
import zipfile
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from morex.files import write_whole

NAMES = ".names"


class Mirror:
    """The side that writes.

    Args:
        root: the folder.
        owned: entries of the folder that it is about.
    """

    def __init__(self, root: Path, owned: Collection[str]) -> None:
        self.root, self.owned = root, owned
        self.sent: dict[str, tuple[int, int]] = {}

    def mark_as_sent(self) -> None:
        """What is there now, the other side has already."""
        self.sent = _found(self.root, self.owned)

    def changes(self) -> bytes | None:
        """What is new, different or gone since the last call; None where nothing is."""
        found = _found(self.root, self.owned)
        if found == self.sent:
            return None
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            for name in [name for name, state in found.items() if self.sent.get(name) != state]:
                try:
                    content = (self.root / name).read_bytes()
                except FileNotFoundError:  # an old checkpoint was removed just now
                    del found[name]
                    continue
                file.writestr(name, content)
            file.writestr(NAMES, json.dumps(sorted(found)))
        self.sent = found
        return archive.getvalue()


def keep_up(root: Path, archive: bytes, owned: Collection[str]) -> None:
    """The side that keeps up: takes over what `changes` gave.

    Args:
        root: the folder.
        archive: as returned by `Mirror.changes`.
        owned: entries of the folder that it may be about; what the other side has no more of them goes here too.
    """
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        there = set(json.loads(file.read(NAMES)))
        for name in file.namelist():
            parts = PurePosixPath(name).parts
            if parts[0] in owned and ".." not in parts:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                write_whole(root / name, file.read(name))
    for name in _found(root, owned).keys() - there:
        (root / name).unlink(missing_ok=True)
        _remove_empty((root / name).parent, root)


def _found(root: Path, owned: Collection[str]) -> dict[str, tuple[int, int]]:
    """Name below the folder -> size and time of change, of every file of these entries."""
    found = {}
    for path in sorted(path for entry in owned for path in (root / entry, *(root / entry).rglob("*"))):
        name = path.relative_to(root)
        if any(part.startswith(".") for part in name.parts):
            continue
        try:
            state = path.stat()
        except FileNotFoundError:
            continue
        if path.is_file():
            found[name.as_posix()] = state.st_size, state.st_mtime_ns
    return found


def _remove_empty(folder: Path, root: Path) -> None:
    """Removes a folder in which nothing is left, and those above it."""
    while folder != root and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
