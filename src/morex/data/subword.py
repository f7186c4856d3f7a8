"""Tokenizers with learned pieces: byte-level BPE trained on a corpus, and Hugging Face tokenizers of any kind.

Text is only text: special tokens written out in it are encoded letter by letter, and none is added.
"""

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from morex.data.encoding import UNKNOWN, Ids, Tokenizer
from morex.data.errors import DataError

END_OF_TEXT = "<|endoftext|>"
# Names under which published tokenizers keep their end of text, where no config beside them says so.
END_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>")
SMALLEST_BPE = 257
# A pair of pieces that occurs once in the corpus tells nothing about other text.
LEAST_OCCURRENCES = 2
AT_ONCE = 256
"""Texts that are encoded at a time: of more the processor's caches would not hold what the library makes of them."""
WORDS = 1 << 16
"""Words whose tokens are kept, some megabytes; the library keeps ten thousand, fewer than a book has."""


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`."""

    # Long, because an imported tokenizer may look further than to the next word.
    stretch = 1 << 20

    def __init__(self, backend: Backend, eos_id: int | None, kind: str) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        keep = getattr(backend.model, "_resize_cache", None)  # which the library does not promise to have
        if keep is not None:
            keep(WORDS)
        self._backend = backend
        self.kind = kind
        self.eos_id = eos_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        together, ends = array("I"), [0]
        for start in range(0, len(texts), AT_ONCE):
            part = list(texts[start : start + AT_ONCE])
            for encoded in self._backend.encode_batch_fast(part, add_special_tokens=False):
                together.fromlist(encoded.ids)
                ends.append(len(together))
        ids: Ids = np.array(together, self.dtype)
        return [ids[start:end] for start, end in pairwise(ends)]

    def decode(self, ids: Iterable[int]) -> str:
        parts = []
        for known, run in groupby(map(int, ids), lambda index: index < self.vocab_size):
            members = list(run)
            parts.append(self._backend.decode(members, skip_special_tokens=True) if known else UNKNOWN * len(members))
        return "".join(parts)

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "eos_id": self.eos_id, "tokenizer": json.loads(self._backend.to_str())}

    def save(self, folder: str | Path) -> None:
        """Writes settings.json, and beside it a tokenizer.json that other programs read."""
        super().save(folder)
        self._backend.save(str(Path(folder) / "tokenizer.json"))

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        return cls(_parsed(json.dumps(settings["tokenizer"])), settings["eos_id"], settings["kind"])


class BpeTokenizer(SubwordTokenizer):
    """Byte-level BPE: words never join, so long documents can be encoded in short stretches, on all cores."""

    stretch = Tokenizer.stretch


def train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """Byte-level BPE with an end-of-text token; equal texts give equal tokenizers.

    Small corpora may have fewer pieces worth learning than `vocab_size` - 257; the tokenizer is then smaller.

    Raises:
        DataError: `vocab_size` has no room for the 256 bytes and the end-of-text token.
    """
    check_bpe_size(vocab_size)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=LEAST_OCCURRENCES,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return BpeTokenizer(backend, backend.token_to_id(END_OF_TEXT), "bpe")


def check_bpe_size(vocab_size: int) -> None:
    """Raises DataError where a byte-level BPE of this size cannot be."""
    if vocab_size < SMALLEST_BPE:
        raise DataError(
            f"data.tokenizer.kind bpe needs a vocabulary of at least {SMALLEST_BPE} (256 bytes and end of text), got "
            f"{vocab_size}; raise model.vocab_size (or data.tokenizer.vocab_size), or use data.tokenizer.kind char"
        )


def read_hf(source: str) -> SubwordTokenizer:
    """A tokenizer made elsewhere.

    Args:
        source: a tokenizer.json; a folder with one, or with GPT-2's encoder.json and vocab.bpe (or vocab.json and
            merges.txt); or the name of a model on the Hugging Face hub, which needs the extra `hf`.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path)
    return _read_hub(source)


def _read_folder(folder: Path) -> SubwordTokenizer:
    if (folder / "tokenizer.json").is_file():
        return _read_file(folder / "tokenizer.json")
    for vocabulary, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return _read_gpt2(folder / vocabulary, folder / merges)
    raise DataError(
        f"data.tokenizer.path '{folder}' has neither tokenizer.json, nor encoder.json with vocab.bpe, nor vocab.json "
        "with merges.txt"
    )


def _read_file(path: Path) -> SubwordTokenizer:
    try:
        backend = _parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"data.tokenizer.path '{path}' cannot be read as a tokenizer.json: {error}") from None
    return SubwordTokenizer(backend, _end_of_text(backend, path.parent), "hf")


def _read_gpt2(vocabulary: Path, merges: Path) -> SubwordTokenizer:
    try:
        backend = Backend(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises no narrower type
        raise DataError(f"'{vocabulary}' and '{merges}' cannot be read as a GPT-2 tokenizer: {error}") from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_special_tokens([END_OF_TEXT])
    return SubwordTokenizer(backend, _end_of_text(backend, vocabulary.parent), "hf")


def _read_hub(name: str) -> SubwordTokenizer:
    missing = f"data.tokenizer.path '{name}' is neither a file nor a folder"
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise DataError(
            f"{missing}, and a name on the Hugging Face hub needs transformers; install it with pip install 'morex[hf]'"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        backend = _parsed(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), "").strip().rstrip(".")
        raise DataError(f"{missing}, and the Hugging Face hub gives no tokenizer of that name ({reason})") from None
    return SubwordTokenizer(backend, tokenizer.eos_token_id, "hf")


def _parsed(text: str) -> Backend:
    try:
        return Backend.from_str(text)
    except Exception as error:  # the library raises no narrower type
        raise ValueError(str(error)) from None


def _end_of_text(backend: Backend, folder: Path) -> int | None:
    """The end-of-text token that a tokenizer_config.json names, or the first of the usual names that has an id."""
    for name in (*_configured_end(folder), *END_NAMES):
        index: int | None = backend.token_to_id(name)
        if index is not None:
            return index
    return None


def _configured_end(folder: Path) -> Iterator[str]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"file '{path}' is not a JSON object ({error}); repair it or take it away") from None
    if isinstance(named, dict):
        named = named.get("content")
    if isinstance(named, str):
        yield named
