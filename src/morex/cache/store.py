"""The contract of a store: the keys and values of many sequences.

A store holds a list of entries for each sequence and slot, one entry per visit, in the order of time. The slots of a
stream (`Schedule.stream`) are visited by the same tokens, so that a store works out once for all of them where these
tokens go: `lists` gives the lists of some rows in one stream, and attention writes to them and reads them slot by slot.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from morex.depth.schedule import Slot, Stream
from morex.nn.keys import Keys, PagedKeys, PagedSlots
from morex.nn.packing import Packing

Row = tuple[int, Slot]
"""A sequence, and the first slot of a stream: recursions differ where tokens at different depths share a pass."""


class OutOfPages(RuntimeError):
    """A store of a fixed size has no room left; nothing was written."""


class Lists(ABC):
    """The lists of B rows in streams of equal width, for the tokens of one packing of B rows."""

    @abstractmethod
    def append(self, place: int, k: Tensor, v: Tensor) -> bool:
        """Adds k, v [N, KV, dim] of the packing's tokens to the slot at this place of the stream.

        Returns:
            Whether the lists of all rows were empty before.
        """

    def reserve(self, dtype: torch.dtype) -> PagedSlots | None:
        """In place of `append` at every place: room for the packing's tokens, which the caller fills.

        None, and nothing is reserved, where there are no pages of numbers of this kind.
        """
        return None

    @abstractmethod
    def gather(self, place: int) -> Keys:
        """All entries of the slot at this place of the stream, right-padded."""

    def read(self, place: int) -> Keys | PagedKeys:
        """The same where they stand, if attention can read them there."""
        return self.gather(place)


class KVStore(ABC):
    """Holds the keys and values of sequences, which come and go."""

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}
        """Of each sequence that there is."""

    @abstractmethod
    def open(self) -> int:
        """A new sequence without entries."""

    @abstractmethod
    def lists(self, rows: Sequence[Row], width: int, packing: Packing | None) -> Lists:
        """The lists of rows.

        Args:
            rows: whose lists; none twice.
            width: slots of the streams.
            packing: the tokens that will be appended, row by row; None where they are only read.

        Raises:
            OutOfPages: there is no room for the packing's tokens.
        """

    @abstractmethod
    def num_entries(self, sequence: int, stream: Stream) -> int:
        """Entries of one sequence in the slot of a stream."""

    def tokens(self, sequence: int) -> int:
        """Tokens of a sequence that the model has taken in."""
        return self._tokens[sequence]

    def advance(self, sequence: int, tokens: int) -> None:
        """Counts tokens of a sequence that a finished forward pass has taken in."""
        self._tokens[sequence] += tokens

    def truncate(self, sequence: int, tokens: int) -> None:
        """Forgets all but the first so many tokens of a sequence, in every slot; what a broken pass left behind too.

        Raises:
            ValueError: it has not so many.
        """
        if not 0 <= tokens <= self.tokens(sequence):
            raise ValueError(f"a sequence of {self.tokens(sequence)} tokens cannot be truncated to {tokens}")
        self._tokens[sequence] = tokens
        self._cut(sequence, tokens)

    @abstractmethod
    def _cut(self, sequence: int, tokens: int) -> None:
        """Forgets the entries of a sequence from this time on."""

    @abstractmethod
    def fork(self, sequence: int) -> int:
        """A new sequence with the entries of another one; from here on each goes its own way."""

    @abstractmethod
    def free(self, sequence: int) -> None:
        """Forgets a sequence."""

    @abstractmethod
    def bytes(self) -> int:
        """Bytes of the keys and values stored, once where sequences share them; room that is not used is left out."""

    @abstractmethod
    def check(self) -> None:
        """Raises AssertionError where the store contradicts itself."""
