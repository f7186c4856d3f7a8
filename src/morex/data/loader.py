"""Batches of windows: drawn for training, in order for evaluation.

A window is `seq_len` tokens and the token after them. The k-th window that a loader draws is a function of the seed and
k alone, so its whole state is k: nothing is shuffled in memory and a loader resumes exactly, at any batch size.
Shapes: B windows, T tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from morex.data.errors import DataError
from morex.data.order import Counters, key_from, mixed, permuted
from morex.data.stream import TokenStream
from morex.model.heads import IGNORED

PADDING = 0


@dataclass(frozen=True)
class Batch:
    """Windows, or examples of a task, of one training or evaluation step."""

    tokens: Tensor
    """[B, T] int64."""
    labels: Tensor
    """[B, T+1] int64: the tokens and the token after them; -100 where nothing is to be predicted. Or classes [B]."""
    document_ids: Tensor | None = None
    """[B, T] int64 number of the document that each token belongs to; None where nobody asked for it."""
    lengths: Tensor | None = None
    """[B] int64 true lengths where a window is padded on the right; None where all are full."""
    difficulty: Tensor | None = None
    """[B] int64 difficulties of the examples of a task; stays where it is."""

    @property
    def num_predicted(self) -> int:
        """Tokens, or classes, that have to be predicted."""
        targets = self.labels if self.labels.dim() == 1 else self.labels[:, 1:]
        return int((targets != IGNORED).sum())

    def rows(self, rows: slice) -> "Batch":
        """Some of the rows."""
        optional = (self.document_ids, self.lengths, self.difficulty)
        return Batch(self.tokens[rows], self.labels[rows], *(None if one is None else one[rows] for one in optional))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        numbers, lengths = self.document_ids, self.lengths
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            document_ids=None if numbers is None else numbers.to(device, non_blocking=True),
            lengths=None if lengths is None else lengths.to(device),
        )


@dataclass(frozen=True)
class Part:
    """The rows of every batch that one of several ranks draws: of each microbatch as many as every other."""

    rank: int = 0
    ranks: int = 1
    microbatches: int = 1

    def runs(self, batch_size: int) -> list[range]:
        """Places in the batch, microbatch by microbatch.

        Raises:
            DataError: the batch cannot be divided.
        """
        parts = self.ranks * self.microbatches
        if batch_size % parts:
            raise DataError(
                f"train.batch_size {batch_size} cannot be divided over {self.ranks} ranks and train.accumulation "
                f"{self.microbatches}; use a multiple of {parts}"
            )
        size = batch_size // parts
        firsts = [(microbatch * self.ranks + self.rank) * size for microbatch in range(self.microbatches)]
        return [range(first, first + size) for first in firsts]

    def places(self, batch_size: int) -> Counters:
        """The same places, one behind the other."""
        return np.concatenate([np.array(run, dtype=np.uint64) for run in self.runs(batch_size)])


WHOLE = Part()


class EndlessLoader(ABC):
    """Draws training batches without end. Its whole state is how much was drawn, so it goes on exactly.

    With several ranks each draws its part of every batch; what was drawn is counted for all of them, so that any number
    of ranks can go on from it.
    """

    _drawn = 0
    _draws, _draws_from = "data", "corpus"
    """Words for messages."""

    @abstractmethod
    def next_batch(self) -> Batch:
        """The next batch."""

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What must be the same where a loader goes on."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on exactly; plain JSON data."""
        return {"drawn": self._drawn, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another loader of the same kind stood; raises DataError where it is not the same."""
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise DataError(
                    f"the saved place in the {self._draws} has {name} {state.get(name)!r} but this run has {mine!r}; "
                    f"go on with the {self._draws_from} and the settings of the run that was saved"
                )
        self._drawn = int(state["drawn"])


class Loader(EndlessLoader):
    """Draws training windows without end.

    `packed`: the stream is cut into windows back to back; each epoch takes every window once in an order of its own and
    begins a little later, so that the tokens left over at the end are not always the same. `random`: every window
    starts at a uniformly random token.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        batch_size: int,
        windows: Literal["packed", "random"] = "packed",
        seed: int = 0,
        part: Part = WHOLE,
        documents: bool = True,
    ) -> None:
        """`documents`: batches say which document each token belongs to.

        Raises:
            DataError: the stream is smaller than one window, or the batch cannot be divided.
        """
        _check_size(stream, seq_len + 1, seq_len)
        if windows not in ("packed", "random"):
            raise DataError(f"data.windows {windows!r} is unknown; use packed or random")
        if batch_size < 1:
            raise DataError(f"a batch of {batch_size} windows cannot be drawn; train.batch_size must be at least 1")
        self._stream = stream
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._places = part.places(batch_size)
        self._windows = windows
        self._documents = documents
        self._seed = seed
        self._key = key_from(f"windows {seed}")

    @property
    def windows_per_epoch(self) -> int:
        """Windows that hold every token once, but for a remainder shorter than a window."""
        return (self._stream.num_tokens - 1) // self._seq_len

    @property
    def epoch(self) -> float:
        """How often the stream has been gone through, counted in windows."""
        return self._drawn / self.windows_per_epoch

    def next_batch(self) -> Batch:
        """The next `batch_size` windows, or this rank's of them; a batch may end one epoch and begin the next."""
        counters = np.uint64(self._drawn) + self._places
        self._drawn += self._batch_size
        return self.windows_at(counters)

    def windows_at(self, counters: Counters) -> Batch:
        """The windows with these numbers [B], wherever the loader stands."""
        starts = self._packed_starts(counters) if self._windows == "packed" else self._random_starts(counters)
        return _gather(self._stream, starts, self._seq_len, self._documents)

    def _identity(self) -> dict[str, Any]:
        return {
            "windows": self._windows,
            "seq_len": self._seq_len,
            "seed": self._seed,
            "num_tokens": self._stream.num_tokens,
        }

    def _packed_starts(self, counters: Counters) -> NDArray[np.int64]:
        count = self.windows_per_epoch
        spare = self._stream.num_tokens - 1 - count * self._seq_len
        epochs = counters // np.uint64(count)
        keys = mixed(self._key ^ epochs)
        order = permuted(counters % np.uint64(count), count, keys)
        offsets = mixed(keys) % np.uint64(spare + 1)
        return (order * np.uint64(self._seq_len) + offsets).astype(np.int64)

    def _random_starts(self, counters: Counters) -> NDArray[np.int64]:
        return (mixed(self._key ^ counters) % np.uint64(self._stream.num_tokens - self._seq_len)).astype(np.int64)


def num_windows(stream: TokenStream, seq_len: int) -> int:
    """Consecutive windows that a stream has, the last of which may be shorter."""
    return -(-(stream.num_tokens - 1) // seq_len)


def held_out_windows(stream: TokenStream, seq_len: int, batch_size: int, documents: bool = True) -> Iterator[Batch]:
    """Goes through a stream once in consecutive windows, so that every token but the first is predicted once.

    The last window may be shorter; it is padded on the right, with label -100 and its true length in `lengths`.
    `documents`: batches say which document each token belongs to.

    Raises:
        DataError: the stream has nothing to predict.
    """
    _check_size(stream, 2, 1)
    count = num_windows(stream, seq_len)
    for begin in range(0, count, batch_size):
        starts = np.arange(begin, min(begin + batch_size, count), dtype=np.int64) * seq_len
        yield _gather(stream, starts, seq_len, documents)


def _gather(stream: TokenStream, starts: NDArray[np.int64], seq_len: int, documents: bool) -> Batch:
    """The windows that start at `starts` [B], padded where the stream ends before they do."""
    window = stream.windows(starts, seq_len + 1)
    numbers = torch.from_numpy(stream.documents(starts, seq_len)) if documents else None
    tokens, true = window[:, :-1].copy(), stream.num_tokens - 1 - starts
    if (true >= seq_len).all():
        return Batch(torch.from_numpy(tokens), torch.from_numpy(window), numbers)
    lengths = np.minimum(true, seq_len)
    tokens[np.arange(seq_len) >= lengths[:, None]] = PADDING
    window[np.arange(seq_len + 1) > lengths[:, None]] = IGNORED
    return Batch(torch.from_numpy(tokens), torch.from_numpy(window), numbers, torch.from_numpy(lengths))


def _check_size(stream: TokenStream, least: int, seq_len: int) -> None:
    if stream.num_tokens < least:
        raise DataError(
            f"{stream.num_tokens} tokens are fewer than the {least} of one window (train.seq_len {seq_len} and the "
            "token after it); give more text or lower train.seq_len"
        )
