"""Every kind of tokenizer, and reading back what one of them saved."""

import json
from pathlib import Path

from morex.data.characters import ByteTokenizer, CharTokenizer
from morex.data.encoding import SETTINGS, Tokenizer
from morex.data.errors import DataError
from morex.data.subword import BpeTokenizer, SubwordTokenizer

__all__ = ["KINDS", "Tokenizer", "load_tokenizer"]

KINDS: dict[str, type[Tokenizer]] = {
    "byte": ByteTokenizer,
    "char": CharTokenizer,
    "bpe": BpeTokenizer,
    "hf": SubwordTokenizer,
}


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
