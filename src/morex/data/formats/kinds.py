"""What reads which file: the one list of formats. Another format is a function and an entry here."""

from collections.abc import Callable, Iterator
from pathlib import Path

from morex.data.formats.columnar import read_arrow, read_parquet
from morex.data.formats.files import decoded
from morex.data.formats.json_files import read_json, read_jsonl
from morex.data.formats.tables import read_csv, read_tsv

# From a file and a column to documents, each an iterator of non-empty pieces of text, used up before the next.
Reader = Callable[[Path, str], Iterator[Iterator[str]]]


def _whole(path: Path, column: str) -> Iterator[Iterator[str]]:
    yield decoded(path)


def _rows(read: Callable[[Path, str], Iterator[str]]) -> Reader:
    return lambda path, column: (iter((text,)) for text in read(path, column))


FORMATS: dict[str, Reader] = {
    ".txt": _whole,
    ".md": _whole,
    ".jsonl": _rows(read_jsonl),
    ".json": _rows(read_json),
    ".csv": _rows(read_csv),
    ".tsv": _rows(read_tsv),
    ".parquet": _rows(read_parquet),
    ".arrow": _rows(read_arrow),
}
# A .json file in a folder is as a rule its settings, so such a file is read only by its own name.
FOLDER_SUFFIXES = tuple(suffix for suffix in FORMATS if suffix != ".json")
# Formats whose files are smaller than their text.
COMPRESSED_SUFFIXES = (".parquet",)
# Formats that would decode as text but are markup, and so no text to train on.
REFUSED_SUFFIXES = (".xml", ".html")


def format_of(path: Path) -> str:
    """The suffix that says what a file holds: that before `.gz`, in lower case."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def documents_of(path: Path, column: str) -> Iterator[Iterator[str]]:
    """The documents of a file; one with a suffix of its own making is a text. Raises DataError as its reader does."""
    return FORMATS.get(format_of(path), _whole)(path, column)
