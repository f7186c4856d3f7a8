"""Batches of text to tokens, in this process or in others; the result is the same and in the same order."""

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from itertools import starmap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Self

import numpy as np

from morex.data.encoding import Ids, Tokenizer
from morex.data.errors import DataError
from morex.data.split import SIDES, Piece, Side
from morex.data.stream import Places
from morex.data.tokenizer import KINDS
from morex.files import read_json

# Batches for each process that wait for it or to be written: enough that none is ever idle.
AHEAD = 3


class Encoded(NamedTuple):
    """Some of one side of a text as tokens."""

    tokens: Ids
    """[N], each document's end-of-text token included."""
    starts: Places
    """Places in them where documents start."""
    num_bytes: int
    """UTF-8 bytes of the text."""


def encode(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> dict[Side, Encoded]:
    """The tokens of pieces of text, side by side; a side without pieces has no entry."""
    ids = tokenizer.encode_batch([piece.text for piece in pieces]) if pieces else []
    sides: dict[Side, Encoded] = {}
    for side in SIDES:
        own = [(piece, tokens) for piece, tokens in zip(pieces, ids, strict=True) if piece.side == side]
        if own:
            sides[side] = _joined(tokenizer, own)
    return sides


def _joined(tokenizer: Tokenizer, pieces: Sequence[tuple[Piece, Ids]]) -> Encoded:
    end: Ids | None = None if tokenizer.eos_id is None else np.array([tokenizer.eos_id], tokenizer.dtype)
    parts: list[Ids] = []
    starts, place = [], 0
    for piece, tokens in pieces:
        if piece.first:
            starts.append(place)
        parts.append(tokens)
        place += len(tokens)
        if piece.last and end is not None:
            parts.append(end)
            place += 1
    num_bytes = len("".join([piece.text for piece, _ in pieces]).encode("utf-8"))
    return Encoded(np.concatenate(parts).astype(tokenizer.dtype, copy=False), np.array(starts, np.int64), num_bytes)


class Encoders:
    """Processes that encode, as a block in which they live; they begin to start at once, and encode when asked."""

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        """`workers`: how many; 0: this process encodes, with the tokenizer's own threads."""
        self._tokenizer, self._workers = tokenizer, workers
        self._pool: ProcessPoolExecutor | None = None
        self._held = ExitStack()

    def __enter__(self) -> Self:
        if self._workers:
            # A process that ends before it has read a large argument would leave this one waiting for ever.
            folder = self._held.enter_context(TemporaryDirectory())
            settings = Path(folder) / "settings.json"
            settings.write_text(json.dumps(self._tokenizer.settings()), encoding="utf-8")
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _start, (str(settings),))
            self._held.callback(self._pool.shutdown, cancel_futures=True)
            with suppress(BrokenProcessPool):  # which whoever gives them text will learn
                for _ in range(self._workers):  # each task has one more process start
                    self._pool.submit(int)
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def encode(self, batches: Iterable[Sequence[Piece]]) -> Iterator[Mapping[Side, Encoded]]:
        """The tokens of each batch of pieces, in order.

        Raises:
            DataError: a text has no tokens, or a process was ended from outside.
        """
        if self._pool is None:
            for batch in batches:
                yield encode(self._tokenizer, batch)
            return
        waiting: deque[Future[dict[Side, Encoded]]] = deque()
        try:
            for batch in batches:
                # Columns go to another process in a part of the time that named tuples take.
                waiting.append(self._pool.submit(_encode, list(zip(*batch, strict=True))))
                if len(waiting) >= AHEAD * self._workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                f"one of the {self._workers} processes that encode was ended, perhaps for want of memory; run the "
                "command again, with fewer --workers"
            ) from None


_own: list[Tokenizer] = []


def _start(path: str) -> None:
    """The start of a process that encodes: it works on one thread, and ends when the one that started it does."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = read_json(Path(path))
    _own[:] = [KINDS[settings["kind"]].from_settings(settings)]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(columns: Sequence[Sequence[Any]]) -> dict[Side, Encoded]:
    return encode(_own[0], list(starmap(Piece, zip(*columns, strict=True))))
