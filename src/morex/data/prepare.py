"""Documents to token files, made once and kept in the cache.

The name of the files follows from the text itself, the split and the tokenizer, so that whatever asks for the same data
finds it. Text is read as a stream: once to know it and split it, once to train a tokenizer where one is trained, once
to encode it. Each document ends with the end-of-text token where the tokenizer has one.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from morex.data.cache import building, discard, key_of, read_json, write_file
from morex.data.corpora import open_data
from morex.data.corpus import Corpus, SeparateCorpora
from morex.data.encoding import Tokenizer
from morex.data.errors import DataError
from morex.data.progress import Progress
from morex.data.split import SIDES, By, Piece, Side, Survey, pieces, survey
from morex.data.stream import StreamWriter, TokenStream, open_stream
from morex.data.tokenizer import check_vocabulary, make_tokenizer
from morex.files import cache_folder
from morex.sections.data import DataConfig

# Part of every key: raise it when the same settings come to mean other files.
FORMAT = 1
INDEX = "index.json"
BATCH_CHARACTERS = 1 << 20
# More text than this teaches a tokenizer nothing new; larger corpora are sampled evenly.
BPE_CHARACTERS = 1 << 28
# A file touched this shortly before it was read may change again without its times showing it.
SETTLED_NANOSECONDS = 2_000_000_000


@dataclass(frozen=True)
class PreparedData:
    """A corpus as tokens."""

    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream
    split: By
    """Whole documents are held out, or the end of the one text there is, or a corpus of its own."""
    documents: int
    """Documents of the corpus or of both corpora; one that is cut by position counts once."""
    content: str
    """Digest of the text: two runs with equal digests saw the same corpus."""
    folder: Path
    """Where the token files are."""


def prepare(data: DataConfig, vocab_size: int, seq_len: int, tokenizer: Tokenizer | None = None) -> PreparedData:
    """Brings a corpus into token files, or finds those made before.

    Args:
        data: corpus, split and tokenizer.
        vocab_size: token ids that the model has; also the size of a trained `bpe` that names none.
        seq_len: tokens of a window; each side of the split must have one more.
        tokenizer: takes the place of `data.tokenizer`, for example that of a run that is resumed.

    Raises:
        DataError: the corpus or a file of it cannot be used, ids do not fit the vocabulary, a side of the split is
            smaller than one window, or the cache cannot be written.
    """
    source = _Source(data)
    if tokenizer is None:
        tokenizer = make_tokenizer(data.tokenizer, vocab_size, source)
    check_vocabulary(tokenizer, vocab_size)
    key = key_of(FORMAT, source.content, *source.split, tokenizer.fingerprint)
    folder = cache_folder() / "tokens" / key
    prepared = _opened(folder, tokenizer)
    if prepared is None:
        discard(folder)
        with building(folder) as temporary:
            _encode(source, tokenizer, temporary)
        prepared = _opened(folder, tokenizer)
        if prepared is None:
            raise DataError(f"the token files in '{folder}' are not what was written; check the disk of MOREX_CACHE")
    _check_windows(prepared, data, seq_len)
    return prepared


class _Source:
    """A corpus, or two of which one is held out, with its split; read only when something has to be made from it."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.corpus: Corpus = open_data(data)

    @property
    def split(self) -> tuple[Any, Any]:
        """What decides, beside the content, which text is held out."""
        return (None, None) if isinstance(self.corpus, SeparateCorpora) else (self.data.val_fraction, self.data.seed)

    @cached_property
    def survey(self) -> Survey:
        return survey(self.corpus, self.data.val_fraction, self.data.seed)

    @cached_property
    def content(self) -> str:
        """Digest of the text; taken from a record in the cache while the corpus stays untouched."""
        identity = self.corpus.identity()
        record = cache_folder() / "corpora" / f"{key_of(FORMAT, identity, self.data.column)}.json"
        known = (read_json(record) or {}).get("content")
        if isinstance(known, str):
            return known
        began = time.time_ns()
        content = self.survey.content
        settled = self.corpus.touched_at() < began - SETTLED_NANOSECONDS
        if settled and identity == self.corpus.identity():
            # Without the record the corpus is read once more next time; a cache that is only read still serves.
            with suppress(DataError):
                write_file(record, json.dumps({"content": content}).encode())
        return content

    def pieces(self, size: int) -> Iterator[Piece]:
        return pieces(self.corpus, self.survey, size)

    def texts(self) -> Iterator[str]:
        """Pieces of all text."""
        return chain.from_iterable(self.corpus.documents())

    def training_texts(self) -> Iterator[str]:
        """Text of the training side; of a very large corpus an even sample."""
        share = min(1.0, BPE_CHARACTERS / self.survey.characters)
        with Progress("Learning the tokenizer", self.survey.num_bytes) as progress:
            taken = 0.0
            for piece in self.pieces(Tokenizer.stretch):
                progress.advance(len(piece.text))
                if piece.side == "train":
                    before, taken = taken, taken + share
                    if int(taken) > int(before) or share == 1.0:
                        yield piece.text


def _encode(source: _Source, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the token files of both sides and, last, the index that makes them valid."""
    with ExitStack() as files, Progress("Encoding", source.survey.num_bytes) as progress:
        writers: dict[Side, StreamWriter] = {}
        for side in SIDES:
            writers[side] = StreamWriter(folder, side, tokenizer.dtype)
            files.callback(writers[side].close)
        for batch in _batches(source.pieces(tokenizer.stretch)):
            encoded = tokenizer.encode_batch([piece.text for piece in batch])
            for piece, ids in zip(batch, encoded, strict=True):
                size = len(piece.text.encode("utf-8"))
                end = tokenizer.eos_id if piece.last else None
                writers[piece.side].add(ids, size, piece.first, end)
                progress.advance(size)
        sides = {side: writer.finish() for side, writer in writers.items()}
    index = {
        "format": FORMAT,
        "content": source.survey.content,
        "documents": source.survey.documents,
        "split": source.survey.by,
        "tokenizer": tokenizer.fingerprint,
        "dtype": np.dtype(tokenizer.dtype).name,
        "sides": sides,
    }
    write_file(folder / INDEX, json.dumps(index, indent=1).encode())


def _batches(stream: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists of about a million characters, enough to keep all cores busy."""
    batch: list[Piece] = []
    characters = 0
    for piece in stream:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _opened(folder: Path, tokenizer: Tokenizer) -> PreparedData | None:
    """The token files of a folder, or None where they are missing or not whole."""
    index = read_json(folder / INDEX)
    if index is None or index.get("format") != FORMAT:
        return None
    train, val = (open_stream(folder, side, index["sides"][side], index["dtype"]) for side in SIDES)
    if train is None or val is None:
        return None
    return PreparedData(tokenizer, train, val, index["split"], index["documents"], index["content"], folder)


def _check_windows(prepared: PreparedData, data: DataConfig, seq_len: int) -> None:
    sides: Mapping[str, TokenStream] = {"training": prepared.train, "held-out": prepared.val}
    for name, stream in sides.items():
        if stream.num_tokens < seq_len + 1:
            if prepared.split != "corpus":
                change = "raise" if name == "held-out" else "lower"
                remedy = f"lower train.seq_len or {change} data.val_fraction {data.val_fraction:g}"
            elif name == "training":
                remedy = "lower train.seq_len, or hold other text out: documents that are held out do not train"
            else:
                remedy = "lower train.seq_len or name another data.val_corpus"
            raise DataError(
                f"the {name} side of data.corpus '{data.corpus}' has {stream.num_tokens} tokens, fewer than the "
                f"{seq_len + 1} of one window (train.seq_len {seq_len} and the token after it); give more text, "
                f"{remedy}"
            )
