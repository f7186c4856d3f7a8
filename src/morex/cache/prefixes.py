"""Texts that a store holds already: one that begins like another is not computed again up to where they part."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from morex.cache.store import KVStore


class Prefixes:
    """Sequences that are kept for those that begin alike; whoever was of use last is kept longest."""

    def __init__(self, store: KVStore, most: int) -> None:
        """Args:
        store: of the sequences.
        most: texts to keep.
        """
        self.store, self.most = store, most
        self._texts: OrderedDict[int, tuple[Hashable, list[int]]] = OrderedDict()
        """Kind and tokens of each sequence kept, who was of use last at the end."""

    def __len__(self) -> int:
        return len(self._texts)

    def find(self, tokens: Sequence[int], kind: Hashable) -> tuple[int, int] | None:
        """The sequence that has most of the beginning of a text, and how many tokens; None where no one has any.

        Args:
            kind: texts of different kinds have different entries, by the depth that was asked for say.
        """
        best, most = None, 0
        for sequence, (own, text) in self._texts.items():
            if own == kind and (shared := common(tokens, text)) > most:
                best, most = sequence, shared
        if best is None:
            return None
        self._texts.move_to_end(best)
        return best, most

    def keep(self, sequence: int, tokens: Sequence[int], kind: Hashable) -> None:
        """Takes over a sequence with the entries of these tokens. What it holds the beginning of is not kept twice."""
        text = list(tokens)
        for other, (own, known) in list(self._texts.items()):
            shared = common(text, known) if own == kind else 0
            if shared == len(text):
                self.store.free(sequence)
                return
            if shared == len(known):
                self._forget(other)
        self._texts[sequence] = kind, text
        while len(self) > self.most:
            self.drop_oldest()

    def clear(self) -> None:
        """Forgets all texts, after the store has forgotten their sequences."""
        self._texts.clear()

    def drop_oldest(self) -> bool:
        """Frees who was of no use for the longest time; whether there was one."""
        if not self._texts:
            return False
        self._forget(next(iter(self._texts)))
        return True

    def _forget(self, sequence: int) -> None:
        del self._texts[sequence]
        self.store.free(sequence)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common from the start."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
