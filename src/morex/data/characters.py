"""Tokenizers without learned pieces: bytes, and the characters of a corpus."""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from morex.data.encoding import UNKNOWN, Ids, Tokenizer
from morex.data.errors import DataError


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and an end-of-text token."""

    kind = "byte"
    vocab_size = 257
    eos_id = 256

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        unknown, text = UNKNOWN.encode("utf-8"), bytearray()
        for index in map(int, ids):
            if index != self.eos_id:
                text += bytes((index,)) if index < 256 else unknown
        return text.decode("utf-8", errors="replace")

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        return cls()


class CharTokenizer(Tokenizer):
    """The characters of a corpus in sorted order; no special token."""

    kind = "char"
    eos_id = None

    def __init__(self, characters: str) -> None:
        """`characters` has each character once, in the order of the ids."""
        if not characters or len(set(characters)) != len(characters):
            raise DataError("a char tokenizer needs at least one character, and each only once")
        self.characters = characters
        self.vocab_size = len(characters)
        points = _code_points(characters)
        self._ids = np.full(int(points.max()) + 1, self.vocab_size, np.uint32)
        self._ids[points] = np.arange(self.vocab_size, dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [self._encoded(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[index] if index < self.vocab_size else UNKNOWN for index in map(int, ids))

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        return cls(settings["characters"])

    def _encoded(self, text: str) -> Ids:
        points = _code_points(text)
        known = points < len(self._ids)
        ids = self._ids[np.where(known, points, 0)]
        missing = np.flatnonzero(~known | (ids == self.vocab_size))
        if len(missing):
            character = text[missing[0]]
            raise DataError(
                f"character {character!r} (U+{ord(character):04X}) is not among the {self.vocab_size} of the char "
                "tokenizer; leave it out, or train with data.tokenizer.kind byte or bpe, which know every character"
            )
        return ids.astype(self.dtype)


def characters_of(texts: Iterable[str]) -> str:
    """Each character of the texts once, sorted by code point."""
    seen = np.zeros(0x110000, bool)
    for text in texts:
        seen[_code_points(text)] = True
    return "".join(map(chr, np.flatnonzero(seen)))


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
