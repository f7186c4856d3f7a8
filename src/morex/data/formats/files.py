"""Files as UTF-8 text, a piece or a line at a time, so that memory does not grow with the file.

Each may be gzipped (.gz). Text is kept as it is, line ends included; only a byte order mark at the start is dropped.
"""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from morex.data.errors import DataError

CHUNK_BYTES = 1 << 20
BYTE_ORDER_MARK = "\ufeff"


def is_packed(path: Path) -> bool:
    """Whether a file is gzipped, by its name."""
    return path.name.lower().endswith(".gz")


def decoded(path: Path) -> Iterator[str]:
    """The text of a file in non-empty pieces of about a million characters.

    Raises:
        DataError: the file is empty, binary, not UTF-8 (with the offset of the byte) or cannot be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, empty = 0, True
    with opened(path) as file:
        while True:
            chunk = file.read(CHUNK_BYTES)
            _refuse_nul(path, chunk, offset)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset - pending + error.start, error) from None
            if empty:
                text = text.removeprefix(BYTE_ORDER_MARK)
            offset += len(chunk)
            if text:
                empty = False
                yield text
            if not chunk:
                break
    if empty:
        raise empty_file(path)


def decoded_lines(path: Path) -> Iterator[str]:
    """The lines of a file, line ends included. Raises DataError as `decoded` does."""
    offset = 0
    with opened(path) as file:
        for line in file:
            _refuse_nul(path, line, offset)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + error.start, error) from None
            yield text if offset else text.removeprefix(BYTE_ORDER_MARK)
            offset += len(line)
    if offset == 0:
        raise empty_file(path)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked where it is gzipped; faults of the disk or of the packing become sentences."""
    try:
        with path.open("rb") as raw:
            if is_packed(path):
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


def empty_file(path: Path) -> DataError:
    """The fault of a file without content."""
    return DataError(f"file '{path}' is empty; give a file with text in it")


def _refuse_nul(path: Path, data: bytes, offset: int) -> None:
    found = data.find(b"\0")
    if found >= 0:
        raise DataError(f"file '{path}' is binary: byte {offset + found} is NUL; only UTF-8 text can be read")


def _not_utf8(path: Path, offset: int, error: UnicodeDecodeError) -> DataError:
    return DataError(f"file '{path}' is not UTF-8: byte {offset} ({error.reason}); convert it to UTF-8")
