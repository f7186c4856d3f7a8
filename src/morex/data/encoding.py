"""What every tokenizer can do: text to token ids and back, saved as JSON in a folder of its own.

Ids that no text belongs to, such as those of a model with a larger vocabulary, decode to U+FFFD; the end-of-text token
decodes to "".
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.unsignedinteger[Any]]
SETTINGS = "settings.json"
UNKNOWN = "\ufffd"


class Tokenizer(ABC):
    """What every tokenizer can do. Token ids are 0 .. vocab_size - 1."""

    kind: str
    vocab_size: int
    eos_id: int | None
    """The end-of-text token, or None where the tokenizer has none."""
    stretch: ClassVar[int] = 1 << 16
    """Characters of a long document that are encoded at a time."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any special token. Raises DataError for a character that has no id."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text as a 1-d array of unsigned integers."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids: a list, an array or a 1-d tensor."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that makes this tokenizer what it is, as plain data with its `kind`."""

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        """The inverse of `settings`. Raises ValueError, KeyError or TypeError where they describe no tokenizer."""

    @cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers that encode equally; a part of the name of token files."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:32]

    def encodes_as(self, other: "Tokenizer") -> bool:
        """Whether another gives the same token ids, by whichever way it came."""
        return {**self.settings(), "kind": None} == {**other.settings(), "kind": None}

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smaller integer type of numpy that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer into a folder, which is made where it is missing."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        (place / SETTINGS).write_text(json.dumps(self.settings(), ensure_ascii=False), encoding="utf-8")
