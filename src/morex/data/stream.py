"""Streams of tokens: documents back to back, with the places where they start, in memory or mapped from files.

A file, called a shard, holds token ids as unsigned 16- or 32-bit integers, zeros up to a multiple of 8 bytes, and the
places in it where documents start as 64-bit integers, all little-endian. How many there are stands in an index beside
it (`morex.data.shards`). Files are mapped into memory, not read.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from morex.data.cache import temporary_name
from morex.data.encoding import Ids

START = np.dtype("<i8")
Places = NDArray[np.int64]


class Joined:
    """Arrays one behind the other that read as one. Slices copy nothing; `np.asarray` copies all."""

    def __init__(self, parts: Sequence[NDArray[Any]], shifts: Sequence[int]) -> None:
        """`shifts` are added to the numbers of each part."""
        self._parts = tuple(parts)
        self._shifts = tuple(shifts)
        self._ends: list[int] = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: slice) -> "NDArray[Any] | Joined":
        begin, end, _ = index.indices(len(self))
        parts, shifts = [], []
        number = bisect_right(self._ends, begin)
        while begin < end:
            part, last = self._parts[number], self._ends[number]
            first = last - len(part)
            parts.append(part[begin - first : end - first])
            shifts.append(self._shifts[number])
            begin, number = last, number + 1
        return joined(parts or [self._parts[0][:0]], shifts or [0])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        shifted = [part + shift if shift else part for part, shift in zip(self._parts, self._shifts, strict=True)]
        return np.concatenate(shifted).astype(dtype or shifted[0].dtype, copy=False)

    def searchsorted(self, values: Places, side: Literal["left", "right"] = "left") -> Places:
        """Where values [N] belong, the numbers ascending: as that of numpy's arrays."""
        owners = np.maximum(np.searchsorted(self._heads, values, side=side) - 1, 0)
        found = np.empty(len(values), np.int64)
        for number in np.unique(owners):
            part, mine = self._parts[number], owners == number
            place = part.searchsorted(values[mine] - self._shifts[number], side=side)
            found[mine] = place + self._ends[number] - len(part)
        return found

    @cached_property
    def _heads(self) -> Places:
        """The first number of each part."""
        return np.array([int(part[0]) + shift for part, shift in zip(self._parts, self._shifts, strict=True)])

    def tolist(self) -> list[int]:
        """All numbers."""
        numbers: list[int] = np.asarray(self).tolist()
        return numbers


def joined(parts: Sequence[NDArray[Any]], shifts: Sequence[int]) -> NDArray[Any] | Joined:
    """One or more arrays as one; empty ones are left out."""
    filled = [(part, shift) for part, shift in zip(parts, shifts, strict=True) if len(part)]
    if not filled:
        return parts[0]
    if len(filled) == 1 and filled[0][1] == 0:
        return filled[0][0]
    return Joined(*zip(*filled, strict=True))


@dataclass(frozen=True)
class TokenStream:
    """Documents back to back: one side of a split."""

    tokens: Ids | Joined
    """[num_tokens] token ids, as a rule mapped from files."""
    document_starts: Places | Joined
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
        """Its first tokens, all of them where there are fewer."""
        return self.part(0, tokens)

    def part(self, begin: int, end: int) -> "TokenStream":
        """Tokens begin .. end - 1; their bytes are taken as in proportion. A document that is cut starts anew."""
        end = min(end, self.num_tokens)
        first, last = self.document_starts.searchsorted(np.array([begin + 1, end]))
        within = np.asarray(self.document_starts[first:last], np.int64) - begin
        starts = np.concatenate([np.zeros(min(1, end - begin), np.int64), within])
        size = max(1, round(self.num_bytes * (end - begin) / max(1, self.num_tokens)))
        return TokenStream(self.tokens[begin:end], starts, size)

    def windows(self, starts: Places, size: int) -> Places:
        """Tokens [B, size] from each of `starts` [B] on, with zeros behind the end of the stream."""
        windows = np.zeros((len(starts), size), np.int64)
        for window, start in zip(windows, starts.tolist(), strict=True):
            tokens = np.asarray(self.tokens[start : start + size])
            window[: len(tokens)] = tokens
        return windows

    def documents(self, starts: Places, size: int) -> Places:
        """The number of the document [B, size] that each of those tokens belongs to."""
        bounds = self.document_starts.searchsorted(np.concatenate([starts, starts + size]), side="right")
        numbers = np.empty((len(starts), size), np.int64)
        places = np.arange(size)
        for row, (first, last) in enumerate(bounds.reshape(2, -1).T.tolist()):
            within = np.asarray(self.document_starts[first:last], np.int64) - starts[row]
            numbers[row] = first - 1 + within.searchsorted(places, side="right")
        return numbers


def chained(streams: Sequence[TokenStream]) -> TokenStream:
    """Streams one behind the other, read as one."""
    before = np.cumsum([0, *(stream.num_tokens for stream in streams)])[:-1].tolist()
    tokens = [part for stream in streams for part, _ in _parts(stream.tokens)]
    starts = [
        (part, shift + offset)
        for stream, offset in zip(streams, before, strict=True)
        for part, shift in _parts(stream.document_starts)
    ]
    return TokenStream(
        joined(tokens, [0] * len(tokens)),
        joined(*zip(*starts, strict=True)),
        sum(stream.num_bytes for stream in streams),
    )


def _parts(array: NDArray[Any] | Joined) -> list[tuple[NDArray[Any], int]]:
    return list(zip(array._parts, array._shifts, strict=True)) if isinstance(array, Joined) else [(array, 0)]


class ShardWriter:
    """Writes one shard, a piece of the stream at a time; it has its name once it is finished."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self._temporary = path, temporary_name(path)
        self._file = self._temporary.open("wb")
        self._hash = hashlib.sha256()
        self._dtype = dtype
        self._starts: list[Places] = []
        self.tokens = self.documents = self.num_bytes = 0

    @property
    def size(self) -> int:
        """Bytes of the file, were it finished now."""
        return shard_size(self.tokens, self.documents, self._dtype)

    def add(self, tokens: Ids, starts: Places, num_bytes: int) -> None:
        """Appends tokens, the places among them where documents start, and the bytes of their text."""
        self._write(tokens.astype(self._dtype, copy=False).tobytes())
        self._starts.append(starts + self.tokens)
        self.tokens += len(tokens)
        self.documents += len(starts)
        self.num_bytes += num_bytes

    def finish(self) -> str:
        """Brings the shard to the disk under its name; returns its SHA-256."""
        self._write(bytes(_padding(self.tokens, self._dtype)))
        for starts in self._starts:
            self._write(starts.astype(START, copy=False).tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        return self._hash.hexdigest()

    def close(self) -> None:
        """Lets the file go; one that is not finished is removed."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)


def shard_size(tokens: int, documents: int, dtype: np.dtype[Any]) -> int:
    """Bytes of the file of a shard."""
    return tokens * dtype.itemsize + _padding(tokens, dtype) + documents * START.itemsize


def map_shard(path: Path, tokens: int, documents: int, dtype: np.dtype[Any]) -> tuple[Ids, Places]:
    """Maps the tokens of a shard and the places where documents start; raises OSError where the system cannot."""
    content = np.memmap(path, np.uint8, "r")
    end = tokens * dtype.itemsize
    starts = content[end + _padding(tokens, dtype) :].view(START)
    assert len(starts) == documents
    return content[:end].view(dtype), starts


def _padding(tokens: int, dtype: np.dtype[Any]) -> int:
    return -tokens * dtype.itemsize % START.itemsize
