"""Reads files of text in pieces, so that memory does not grow with the file.

A .txt or .md file is one document; a line of a .jsonl file is one document. Each may be gzipped (.gz). Text is UTF-8
and is kept as it is, line ends included; only a byte order mark at the start of a file is dropped.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from morex.data.errors import DataError

CHUNK_BYTES = 1 << 20
TEXT_SUFFIXES = (".txt", ".md")
JSONL_SUFFIX = ".jsonl"


def format_of(path: Path) -> str:
    """The suffix that says what a file holds: that before `.gz`, in lower case."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def read_text(path: Path) -> Iterator[str]:
    """The text of a file in non-empty pieces of about a million characters.

    Raises:
        DataError: the file is empty, binary, not UTF-8 (with the offset of the byte) or cannot be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, empty = 0, True
    with _opened(path) as file:
        while True:
            chunk = file.read(CHUNK_BYTES)
            _refuse_nul(path, chunk, offset)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset - pending + error.start, error) from None
            if empty:
                text = text.removeprefix("\ufeff")
            offset += len(chunk)
            if text:
                empty = False
                yield text
            if not chunk:
                break
    if empty:
        raise DataError(f"file '{path}' is empty; give a file with text in it")


def read_jsonl(path: Path, column: str) -> Iterator[str]:
    """The texts in field `column` of a file of JSON lines; blank lines and empty texts are passed over.

    Raises:
        DataError: the file is empty, binary or not UTF-8, or a line is not a JSON object with text in that column.
    """
    offset = 0
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            _refuse_nul(path, line, offset)
            try:
                decoded = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + error.start, error) from None
            if offset == 0:
                decoded = decoded.removeprefix("\ufeff")
            offset += len(line)
            if decoded.strip():
                text = _field(decoded, column, f"{path}:{number}")
                if text:
                    yield text
    if offset == 0:
        raise DataError(f"file '{path}' is empty; give a file with JSON lines in it")


def _field(line: str, column: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it is nested too deeply"
        raise DataError(f"{where}: the line is not JSON ({reason}); a .jsonl file has one JSON object a line") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: the line holds {_kind(record)}; a .jsonl file has one JSON object a line")
    if column not in record:
        there = ", ".join(f"'{name}'" for name in record) or "none"
        raise DataError(f"{where}: there is no column '{column}'; set data.column to one of those there are: {there}")
    text = record[column]
    if not isinstance(text, str):
        raise DataError(f"{where}: column '{column}' holds {_kind(text)}; data.column must name a column of text")
    if "\\u" in line:
        # Only an escape can bring half of a surrogate pair in: the bytes themselves were valid UTF-8.
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise DataError(f"{where}: column '{column}' holds {half}, half a surrogate pair") from None
    return text


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked where it is gzipped; faults of the disk or of the packing become sentences."""
    try:
        with path.open("rb") as raw:
            if path.name.lower().endswith(".gz"):
                # GzipFile reads like a binary file but is not typed as one.
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    yield cast(IO[bytes], cast(Any, unpacked))
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"file '{path}' is not a whole gzip file ({error}); pack it again") from None
    except FileNotFoundError:
        raise DataError(f"file '{path}' does not exist") from None
    except OSError as error:
        raise DataError(f"file '{path}' cannot be read: {error.strerror or error}") from None


def _refuse_nul(path: Path, data: bytes, offset: int) -> None:
    found = data.find(b"\0")
    if found >= 0:
        raise DataError(f"file '{path}' is binary: byte {offset + found} is NUL; only UTF-8 text can be read")


def _not_utf8(path: Path, offset: int, error: UnicodeDecodeError) -> DataError:
    return DataError(f"file '{path}' is not UTF-8: byte {offset} ({error.reason}); convert it to UTF-8")
