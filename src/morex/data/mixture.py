"""Batches of windows from several corpora, each with its share.

Which corpus the k-th window is of, and which of its windows, is a function of the seed and k alone: of every `BLOCK`
windows each corpus has a fixed number, in an order that follows from the seed and the block. So the whole state of the
loader is k, as that of `morex.data.loader.Loader` is, and the order does not depend on ranks or processes.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from morex.data.errors import DataError
from morex.data.loader import WHOLE, Batch, EndlessLoader, Loader, Part
from morex.data.order import Counters, key_from, mixed, permuted
from morex.data.prepare import Member

# Windows in which each corpus has its share exactly, up to one window.
BLOCK = 1 << 16


class Shares:
    """Which corpus each window is of, and its number among the windows of that corpus."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """Raises DataError where a weight comes to less than one window of `BLOCK`."""
        self.quotas = _quotas(weights)
        self._key = key_from(f"mixture {seed}")
        self._blocks: dict[int, tuple[NDArray[np.intp], NDArray[np.int64]]] = {}

    def places(self, counters: Counters) -> tuple[NDArray[np.intp], Counters]:
        """Corpus [N], and number of the window in it [N], of the windows with these numbers."""
        blocks, within = np.divmod(counters.astype(np.int64), BLOCK)
        corpora, numbers = np.empty(len(counters), np.intp), np.empty(len(counters), np.int64)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            owners, before = self._block(block)
            corpora[here] = owners[within[here]]
            numbers[here] = before[within[here]] + block * self.quotas[corpora[here]]
        return corpora, numbers.astype(np.uint64)

    def windows_among(self, count: int) -> NDArray[np.int64]:
        """Windows of each corpus among the first `count`."""
        blocks, rest = divmod(count, BLOCK)
        return blocks * self.quotas + np.bincount(self._block(blocks)[0][:rest], minlength=len(self.quotas))

    def _block(self, block: int) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """Corpus of each window of a block, and how many of that corpus the block has before it [BLOCK]."""
        if block not in self._blocks:
            keys = np.full(BLOCK, mixed(self._key ^ np.array([block], np.uint64))[0])
            order = permuted(np.arange(BLOCK, dtype=np.uint64), BLOCK, keys)
            owners = np.searchsorted(np.cumsum(self.quotas), order.astype(np.int64), side="right")
            before = np.empty(BLOCK, np.int64)
            first = np.cumsum(self.quotas) - self.quotas
            sorted_places = np.argsort(owners, kind="stable")
            before[sorted_places] = np.arange(BLOCK) - np.repeat(first, self.quotas)
            # A batch is of one block, or of two that follow each other.
            self._blocks = {key: value for key, value in self._blocks.items() if key == block - 1}
            self._blocks[block] = (owners, before)
        return self._blocks[block]


def _quotas(weights: Sequence[float]) -> NDArray[np.int64]:
    """Windows of each corpus in `BLOCK`, by the largest remainders."""
    total = sum(map(Fraction, weights))
    exact = [Fraction(weight) / total * BLOCK for weight in weights]
    quotas = np.array([int(share) for share in exact], np.int64)
    by_remainder = sorted(range(len(exact)), key=lambda number: (int(exact[number]) - exact[number], number))
    quotas[by_remainder[: BLOCK - int(quotas.sum())]] += 1
    if not quotas.all():
        small = weights[int(np.argmin(quotas))]
        raise DataError(
            f"data.mixture: weight {small:g} of {float(total):g} in all is less than one window of {BLOCK:,}; raise it "
            "or leave that corpus out"
        )
    return quotas


class MixtureLoader(EndlessLoader):
    """Draws training windows from several corpora without end, each from its own as a `Loader` would."""

    _draws_from = "mixture"

    def __init__(
        self,
        members: Sequence[Member],
        seq_len: int,
        batch_size: int,
        windows: Literal["packed", "random"] = "packed",
        seed: int = 0,
        part: Part = WHOLE,
        documents: bool = True,
    ) -> None:
        """Raises DataError where a corpus is smaller than a window, a weight too small, or the batch not divisible."""
        self._members = tuple(members)
        # Seeds of their own, so that corpora of equal size do not go in step.
        self._loaders = [
            Loader(member.data.train, seq_len, batch_size, windows, seed + number, documents=documents)
            for number, member in enumerate(members)
        ]
        self._shares = Shares([member.config.weight for member in members], seed)
        self._seq_len, self._batch_size, self._documents = seq_len, batch_size, documents
        self._places = part.places(batch_size)

    def next_batch(self) -> Batch:
        """The next `batch_size` windows, or this rank's of them."""
        corpora, numbers = self._shares.places(np.uint64(self._drawn) + self._places)
        self._drawn += self._batch_size
        labels = np.empty((len(corpora), self._seq_len + 1), np.int64)
        documents = np.empty((len(corpora), self._seq_len), np.int64) if self._documents else None
        for number, loader in enumerate(self._loaders):
            mine = np.flatnonzero(corpora == number)
            if len(mine):
                batch = loader.windows_at(numbers[mine])
                labels[mine] = batch.labels.numpy()
                if documents is not None and batch.document_ids is not None:
                    documents[mine] = batch.document_ids.numpy()
        tokens = torch.from_numpy(labels[:, :-1].copy())
        return Batch(tokens, torch.from_numpy(labels), None if documents is None else torch.from_numpy(documents))

    def refuse_to_run_dry(self, steps: int) -> None:
        """Raises DataError where so many steps would see a corpus more often than it may be seen."""
        needed = self._shares.windows_among(steps * self._batch_size)
        for member, loader, windows in zip(self._members, self._loaders, needed.tolist(), strict=True):
            limit = member.config.epochs
            if limit is not None and windows > limit * loader.windows_per_epoch:
                there = int(limit * loader.windows_per_epoch)
                raise DataError(
                    f"data.mixture runs dry: {steps:,} steps of {self._batch_size:,} windows take {windows:,} of "
                    f"corpus '{member.config.corpus}', but its epochs {limit:g} have {there:,}; lower its weight or "
                    "train.steps, or raise its epochs"
                )

    def _identity(self) -> dict[str, Any]:
        """What must be the same where the loader goes on; names of corpora may change."""
        quotas = self._shares.quotas.tolist()
        own = [{**loader._identity(), "quota": quota} for loader, quota in zip(self._loaders, quotas, strict=True)]
        return {"mixture": own}
