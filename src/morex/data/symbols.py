"""The tokenizer of generated tasks: a fixed set of symbols."""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np

from morex.data.encoding import UNKNOWN, Ids, Tokenizer
from morex.data.errors import DataError


class SymbolTokenizer(Tokenizer):
    """Symbols in the order of their ids, then an end-of-text token, where there is one.

    Where each symbol is one character they are written without spaces, else with a space between two.
    """

    kind = "symbols"
    eos_id: int | None

    def __init__(self, symbols: Sequence[str], has_end: bool = True) -> None:
        """Raises DataError where a symbol is there twice or not to be told from white space."""
        if not symbols or len(set(symbols)) != len(symbols) or any(symbol.split() != [symbol] for symbol in symbols):
            raise DataError("a symbols tokenizer needs at least one symbol, each only once and without white space")
        self.symbols = tuple(symbols)
        self.eos_id = len(symbols) if has_end else None
        self.vocab_size = len(symbols) + has_end
        self._separator = "" if all(len(symbol) == 1 for symbol in symbols) else " "
        self._ids = {symbol: index for index, symbol in enumerate(symbols)}

    def ids_of(self, symbols: Iterable[str]) -> list[int]:
        """Token ids of symbols. Raises DataError for an unknown one."""
        try:
            return [self._ids[symbol] for symbol in symbols]
        except KeyError as unknown:
            few = self.symbols if len(self.symbols) <= 40 else (*self.symbols[:3], "...", *self.symbols[-3:])
            raise DataError(
                f"{unknown} is not among the {len(self.symbols)} symbols of this task: {' '.join(few)}"
            ) from None

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        split = [text.split() if self._separator else "".join(text.split()) for text in texts]
        return [np.array(self.ids_of(symbols), self.dtype) for symbols in split]

    def decode(self, ids: Iterable[int]) -> str:
        known = (index for index in map(int, ids) if index != self.eos_id)
        size = len(self.symbols)
        return self._separator.join(self.symbols[index] if index < size else UNKNOWN for index in known)

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "symbols": list(self.symbols), "has_end": self.eos_id is not None}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        return cls(settings["symbols"], settings["has_end"])
