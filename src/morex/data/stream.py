"""Token files: the tokens of one side of the split, back to back, with the places where documents start.

`SIDE.tokens` holds unsigned 16- or 32-bit integers, `SIDE.starts` 64-bit ones, both little-endian without a header; the
index of the folder keeps counts and checksums. Files are mapped into memory, not read.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from morex.data.encoding import Ids
from morex.files import sha256

# Larger files are checked by their size alone when they are opened: reading them all would cost too much each time.
CHECKED_BYTES = 1 << 28


@dataclass(frozen=True)
class TokenStream:
    """One side of the split."""

    tokens: Ids
    """[num_tokens] token ids, as a rule mapped from a file."""
    document_starts: NDArray[np.int64]
    """[documents] index of the first token of each document, ascending from 0."""
    num_bytes: int
    """UTF-8 bytes of the text; end-of-text tokens stand for none."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.document_starts)

    def head(self, tokens: int) -> "TokenStream":
        """Its first tokens, all of them where there are fewer; their bytes are taken as in proportion."""
        size = min(tokens, self.num_tokens)
        starts = self.document_starts[: int(np.searchsorted(self.document_starts, size))]
        return TokenStream(self.tokens[:size], starts, max(1, round(self.num_bytes * size / max(1, self.num_tokens))))


class StreamWriter:
    """Writes the token files of one side, a piece at a time."""

    def __init__(self, folder: Path, side: str, dtype: type[np.uint16] | type[np.uint32]) -> None:
        self._tokens = _HashedFile(folder / f"{side}.tokens")
        self._starts = _HashedFile(folder / f"{side}.starts")
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._num_tokens = self._num_documents = self._num_bytes = 0

    def add(self, ids: Ids, num_bytes: int, first: bool, end: int | None) -> None:
        """Appends a piece: its ids, the bytes of its text, whether it starts a document, the token that ends one."""
        if first:
            self._starts.write(np.array([self._num_tokens], "<i8").tobytes())
            self._num_documents += 1
        self._tokens.write(ids.astype(self._dtype, copy=False).tobytes())
        self._num_tokens += len(ids)
        self._num_bytes += num_bytes
        if end is not None:
            self._tokens.write(np.array([end], self._dtype).tobytes())
            self._num_tokens += 1

    def finish(self) -> dict[str, Any]:
        """Brings everything to the disk; returns the entry of this side in the index."""
        return {
            "tokens": self._num_tokens,
            "documents": self._num_documents,
            "num_bytes": self._num_bytes,
            "tokens_sha256": self._tokens.finish(),
            "starts_sha256": self._starts.finish(),
        }

    def close(self) -> None:
        """Lets the files go, finished or not."""
        self._tokens.close()
        self._starts.close()


def open_stream(folder: Path, side: str, entry: dict[str, Any], dtype: str) -> TokenStream | None:
    """Maps the token files of one side, or returns None where they are not what the index says."""
    kind = np.dtype(dtype).newbyteorder("<")
    files = ((f"{side}.tokens", kind, "tokens"), (f"{side}.starts", np.dtype("<i8"), "documents"))
    arrays = []
    for name, item, count in files:
        path, expected = folder / name, entry[count] * item.itemsize
        if not path.is_file() or path.stat().st_size != expected:
            return None
        if expected <= CHECKED_BYTES and sha256(path) != entry[_checksum(name)]:
            return None
        # An empty file cannot be mapped.
        arrays.append(np.memmap(path, item, "r") if expected else np.zeros(0, item))
    return TokenStream(arrays[0], arrays[1], entry["num_bytes"])


def _checksum(name: str) -> str:
    return f"{name.rpartition('.')[2]}_sha256"


class _HashedFile:
    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._hash = hashlib.sha256()

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)

    def finish(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()
