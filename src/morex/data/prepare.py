"""Documents to token shards, made once: in the cache, or in a folder of one's own.

In the cache their name follows from the text itself, the split and the tokenizer, so that whatever asks for the same
data finds it. Text is read as a stream: once to know it and split it, once to train a tokenizer where one is trained,
once to encode it. Each document ends with the end-of-text token where the tokenizer has one.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from morex.data.cache import building, discard, key_of, read_json, write_faults, write_file
from morex.data.corpora import folder_of_shards, open_data
from morex.data.corpus import Corpus, SeparateCorpora
from morex.data.encoded import Encoders
from morex.data.encoding import Tokenizer
from morex.data.errors import DataError
from morex.data.progress import Progress
from morex.data.shards import FORMAT, SHARD_BYTES, Index, ShardFolder, open_shards, tokenizer_of
from morex.data.split import SIDES, By, Piece, Survey, pieces, survey
from morex.data.stream import TokenStream, chained
from morex.data.tokenizer import check_vocabulary, make_tokenizer, ready_tokenizer
from morex.files import cache_folder
from morex.sections.data import DataConfig, MemberConfig

# Part of every key of a record: raise it when the same files come to mean another text.
RECORD_FORMAT = 1
BATCH_CHARACTERS = 1 << 20
# More text than this teaches a tokenizer nothing new; larger corpora are sampled evenly.
BPE_CHARACTERS = 1 << 28
# A file touched this shortly before it was read may change again without its times showing it.
SETTLED_NANOSECONDS = 2_000_000_000


@dataclass(frozen=True)
class PreparedData:
    """A corpus, or a mixture of several, as tokens."""

    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream
    split: By | Literal["member"]
    """Whole documents are held out, or the end of the one text there is, or a corpus of its own; of a mixture, whatever
    is held out of each member."""
    documents: int
    """Documents of the corpus or of all corpora; one that is cut by position counts once."""
    content: str
    """Digest of the text, or of shards: two runs with equal digests saw the same corpus."""
    folder: Path | None
    """Where the shards are; None for a mixture."""
    members: "tuple[Member, ...]" = ()
    """The corpora of a mixture."""


@dataclass(frozen=True)
class Member:
    """One corpus of a mixture."""

    config: MemberConfig
    data: PreparedData


def prepare(data: DataConfig, vocab_size: int, seq_len: int, tokenizer: Tokenizer | None = None) -> PreparedData:
    """Brings a corpus into token shards, or finds those made before.

    Args:
        data: corpus, split and tokenizer.
        vocab_size: token ids that the model has; also the size of a trained `bpe` that names none.
        seq_len: tokens of a window; each side of the split must have one more.
        tokenizer: takes the place of `data.tokenizer`, for example that of a run that is resumed.

    Raises:
        DataError: the corpus or a file of it cannot be used, shards are damaged or of another tokenizer, ids do not fit
            the vocabulary, a side of the split is smaller than one window, or the cache cannot be written.
    """
    if data.mixture:
        return _mixed(data, vocab_size, seq_len, tokenizer)
    prepared = _prepared(data, vocab_size, tokenizer)
    _check_windows(prepared, prepared.train, "training", data, seq_len)
    _check_windows(prepared, prepared.val, "held-out", data, seq_len)
    return prepared


@dataclass(frozen=True)
class Written:
    """What `prepare_folder` has done."""

    folder: Path
    index: Index
    kept: int
    """Shards that were there already."""


def prepare_folder(
    data: DataConfig, vocab_size: int, folder: Path, workers: int = 0, shard_bytes: int = SHARD_BYTES
) -> Written:
    """Brings a corpus into a folder of token shards, or goes on with one that was begun.

    The files do not depend on `workers`, nor on where an earlier call was ended. Those of `workers` start with the
    module that has started this one, so a program calls this under `if __name__ == "__main__"`.

    Args:
        data: corpus, split and tokenizer.
        vocab_size: token ids that the model has; also the size of a trained `bpe` that names none.
        folder: empty, not there, or begun with the same text and settings.
        workers: processes that encode; 0: this one, with the tokenizer's own threads.
        shard_bytes: a shard ends with the batch of text that makes it this large.

    Raises:
        DataError: as `prepare`, or the folder holds something else.
    """
    if data.mixture or data.task is not None:
        raise DataError(f"{data.described} cannot be prepared; prepare each corpus by itself, with data.corpus")
    if folder_of_shards(data.corpus) is not None:
        raise DataError(f"data.corpus '{data.corpus}' holds token shards already; train on it as it is")
    source = _Source(data)
    tokenizer = make_tokenizer(data.tokenizer, vocab_size, source)
    check_vocabulary(tokenizer, vocab_size)
    with Encoders(tokenizer, workers) as encoders, write_faults(folder, "name another folder with --out"):
        shards = _write(source, tokenizer, folder, encoders, shard_bytes)
    return Written(folder, shards.index, shards.kept)


def _prepared(data: DataConfig, vocab_size: int, tokenizer: Tokenizer | None) -> PreparedData:
    """One corpus, whatever the size of its sides."""
    folder = folder_of_shards(data.corpus)
    if folder is not None:
        return _from_shards(data, folder, vocab_size, tokenizer)
    source = _Source(data)
    if tokenizer is None:
        tokenizer = make_tokenizer(data.tokenizer, vocab_size, source)
    check_vocabulary(tokenizer, vocab_size)
    key = key_of(FORMAT, source.content, *source.split, tokenizer.fingerprint)
    folder = cache_folder() / "tokens" / key
    prepared = _cached(folder, tokenizer)
    if prepared is None:
        discard(folder)
        with building(folder) as temporary, Encoders(tokenizer, 0) as encoders:
            _write(source, tokenizer, temporary, encoders, SHARD_BYTES)
        prepared = _cached(folder, tokenizer)
        if prepared is None:
            raise DataError(f"the token files in '{folder}' are not what was written; check the disk of MOREX_CACHE")
    return prepared


def _cached(folder: Path, tokenizer: Tokenizer) -> PreparedData | None:
    """The shards of a folder of the cache, or None where they are missing or not whole."""
    try:
        index, train, val = open_shards(folder, f"folder '{folder}'")
    except DataError:
        return None
    return PreparedData(tokenizer, train, val, index.split, index.documents, index.content, folder)


def _from_shards(data: DataConfig, folder: Path, vocab_size: int, tokenizer: Tokenizer | None) -> PreparedData:
    """The shards that `data.corpus` names."""
    title = f"data.corpus '{data.corpus}'"
    if data.val_corpus is not None:
        raise DataError(
            f"{title} holds token shards with held-out text of their own; leave data.val_corpus out, or give it to "
            "`morex data prepare`"
        )
    index, train, val = open_shards(folder, title)
    own = tokenizer_of(folder, index, title)
    asked = tokenizer or ready_tokenizer(data.tokenizer)
    if not own.encodes_as(asked or own) or (data.tokenizer.kind == "char" and own.kind != "char" and not tokenizer):
        other = data.tokenizer.kind if asked is None else f"{asked.kind}, {asked.vocab_size} ids"
        raise DataError(
            f"{title} has shards of another tokenizer ({own.kind}, {own.vocab_size} ids) than is asked for ({other}); "
            "prepare the text with that one, or leave data.tokenizer out"
        )
    check_vocabulary(own, vocab_size)
    return PreparedData(tokenizer or own, train, val, index.split, index.documents, index.digest, folder)


def _mixed(data: DataConfig, vocab_size: int, seq_len: int, tokenizer: Tokenizer | None) -> PreparedData:
    """Several corpora under one tokenizer: the given one, that of the first shards, or one that needs no text."""
    alone = [data.model_copy(update={"corpus": member.corpus, "mixture": ()}) for member in data.mixture]
    ready = [folder_of_shards(one.corpus) is not None for one in alone]
    if tokenizer is None and any(ready):
        tokenizer = _prepared(alone[ready.index(True)], vocab_size, None).tokenizer
    if tokenizer is None:
        tokenizer = ready_tokenizer(data.tokenizer)
    if tokenizer is None:
        raise DataError(
            f"data.tokenizer.kind '{data.tokenizer.kind}' is learned from one corpus, and data.mixture has "
            f"{len(alone)}; use kind hf or byte, or prepare a member with `morex data prepare`"
        )
    members = []
    for config, one in zip(data.mixture, alone, strict=True):
        prepared = _prepared(one, vocab_size, tokenizer)
        _check_windows(prepared, prepared.train, "training", one, seq_len)
        members.append(Member(config, prepared))
    mixed = PreparedData(
        tokenizer=tokenizer,
        train=chained([member.data.train for member in members]),
        val=chained([member.data.val for member in members]),
        split="member",
        documents=sum(member.data.documents for member in members),
        content=key_of([member.data.content for member in members]),
        folder=None,
        members=tuple(members),
    )
    _check_windows(mixed, mixed.val, "held-out", data, seq_len)
    return mixed


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
        record = cache_folder() / "corpora" / f"{key_of(RECORD_FORMAT, identity, self.data.column)}.json"
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


def _write(source: _Source, tokenizer: Tokenizer, folder: Path, encoders: Encoders, shard_bytes: int) -> ShardFolder:
    """Writes the shards of both sides that are not there yet."""
    text = source.survey
    plan = Index(
        format=FORMAT,
        complete=False,
        content=text.content,
        documents=text.documents,
        split=text.by,
        seed=None if text.by == "corpus" else source.split,
        tokenizer=tokenizer.fingerprint,
        dtype="uint16" if tokenizer.dtype is np.uint16 else "uint32",
        shard_bytes=shard_bytes,
    )
    shards = ShardFolder(folder, plan, tokenizer)
    if not shards.index.complete:
        with Progress("Encoding", text.num_bytes) as progress:
            done = {side: shards.done(side) for side in SIDES}
            batches = _batches(source.pieces(tokenizer.stretch), progress)
            left = ([piece for piece in batch if number >= done[piece.side]] for number, batch in batches)
            shards.write(encoders.encode(left))
    return shards


def _batches(stream: Iterable[Piece], progress: Progress) -> Iterator[tuple[int, list[Piece]]]:
    """Pieces in numbered lists of about a million characters, enough to keep all cores busy."""
    batch: list[Piece] = []
    number = characters = 0
    for piece in stream:
        batch.append(piece)
        characters += len(piece.text)
        progress.advance(len(piece.text) if piece.text.isascii() else len(piece.text.encode("utf-8")))
        if characters >= BATCH_CHARACTERS:
            yield number, batch
            batch, characters, number = [], 0, number + 1
    if batch:
        yield number, batch


def _check_windows(
    prepared: PreparedData, stream: TokenStream, side: Literal["training", "held-out"], data: DataConfig, seq_len: int
) -> None:
    """Raises DataError where a side has no window."""
    if stream.num_tokens >= seq_len + 1:
        return
    if prepared.split == "member":
        remedy = "lower train.seq_len or take in another member"
    elif folder_of_shards(data.corpus) is not None:
        remedy = "lower train.seq_len or prepare more text"
    elif prepared.split != "corpus":
        change = "raise" if side == "held-out" else "lower"
        remedy = f"lower train.seq_len or {change} data.val_fraction {data.val_fraction:g}"
    elif side == "training":
        remedy = "lower train.seq_len, or hold other text out: documents that are held out do not train"
    else:
        remedy = "lower train.seq_len or name another data.val_corpus"
    raise DataError(
        f"the {side} side of {data.described} has {stream.num_tokens} tokens, fewer than the {seq_len + 1} of one "
        f"window (train.seq_len {seq_len} and the token after it); give more text, {remedy}"
    )
