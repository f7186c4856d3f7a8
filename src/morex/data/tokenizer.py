"""Every kind of tokenizer: made as the config asks, kept in the cache where that takes learning, and read back."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from morex.data import subword
from morex.data.cache import building, discard, key_of
from morex.data.characters import ByteTokenizer, CharTokenizer, characters_of
from morex.data.encoding import SETTINGS, Tokenizer
from morex.data.errors import DataError
from morex.data.subword import BpeTokenizer, SubwordTokenizer
from morex.data.symbols import SymbolTokenizer
from morex.files import cache_folder
from morex.sections.data import TokenizerConfig

__all__ = ["KINDS", "Tokenizer", "check_vocabulary", "load_tokenizer", "make_tokenizer", "ready_tokenizer"]

# Part of every key: raise it when the same settings come to mean another tokenizer.
FORMAT = 1

KINDS: dict[str, type[Tokenizer]] = {
    "byte": ByteTokenizer,
    "char": CharTokenizer,
    "bpe": BpeTokenizer,
    "hf": SubwordTokenizer,
    "symbols": SymbolTokenizer,
}


class TextSource(Protocol):
    """Text that a tokenizer may be made from; read only where one is."""

    @property
    def content(self) -> str:
        """Digest of the text."""

    @property
    def split(self) -> tuple[float | str | int, ...]:
        """What the training side follows from, beside the text."""

    def texts(self) -> Iterable[str]:
        """All text, in pieces."""

    def training_texts(self) -> Iterable[str]:
        """The text of the training side, in pieces."""


def make_tokenizer(wanted: TokenizerConfig, vocab_size: int, source: TextSource) -> Tokenizer:
    """The tokenizer that the config asks for: made at once, or trained on the text and kept in the cache.

    Raises:
        DataError: there is no such tokenizer, or a trained one does not go with the model's `vocab_size`.
    """
    ready = ready_tokenizer(wanted)
    if ready is not None:
        return ready
    if wanted.kind == "char":
        return _cached(key_of(FORMAT, "char", source.content), lambda: CharTokenizer(characters_of(source.texts())))
    size = wanted.vocab_size or vocab_size
    subword.check_bpe_size(size)
    if size > vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size {size} is more than model.vocab_size {vocab_size}; lower the first or raise "
            "the second"
        )
    key = key_of(FORMAT, "bpe", source.content, *source.split, size)
    return _cached(key, lambda: subword.train_bpe(source.training_texts(), size))


def ready_tokenizer(wanted: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer that the config asks for, where it needs no text. Raises DataError where there is no such one."""
    if wanted.kind == "byte":
        return ByteTokenizer()
    if wanted.kind == "hf":
        assert wanted.path is not None
        return subword.read_hf(wanted.path)
    return None


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises DataError where a tokenizer has more ids than a model."""
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the {tokenizer.kind} tokenizer has {tokenizer.vocab_size} token ids but model.vocab_size is "
            f"{vocab_size}; set model.vocab_size to {tokenizer.vocab_size} or more, or choose another data.tokenizer"
        )


def _cached(key: str, make: Callable[[], Tokenizer]) -> Tokenizer:
    folder = cache_folder() / "tokenizers" / key
    try:
        return load_tokenizer(folder)
    except DataError:
        discard(folder)
    tokenizer = make()
    with building(folder) as temporary:
        tokenizer.save(temporary)
    return tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads what `Tokenizer.save` wrote.

    Raises:
        DataError: there is no tokenizer in the folder, or it is damaged.
    """
    path = Path(folder) / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings["kind"]
        if kind in KINDS:
            return KINDS[kind].from_settings(settings)
    except FileNotFoundError:
        raise DataError(f"folder '{folder}' has no tokenizer: there is no {SETTINGS} in it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"file '{path}' is no tokenizer of morex or is damaged ({error!r})") from None
    raise DataError(f"file '{path}' holds a tokenizer of unknown kind {kind!r}; known: {', '.join(KINDS)}")
