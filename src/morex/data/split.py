"""Which text trains and which is held out.

A document is held out when a keyed hash of its text falls below `val_fraction`: the choice depends on nothing but the
text and the seed, so equal texts are always on the same side and a document stays on its side when others are added.
Where that leaves a side empty, the text whose size comes nearest to the wished share is held out. A corpus with one
distinct text is cut by position instead: its last `val_fraction` of characters is held out.

Where a corpus of its own is held out, all of it is, and documents of the other with a text that is in it are left out.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from morex.data.corpus import Corpus, SeparateCorpora
from morex.data.errors import DataError
from morex.data.progress import Progress

Side = Literal["train", "val"]
SIDES: tuple[Side, Side] = ("train", "val")
By = Literal["document", "position", "corpus"]
# In place of the index of a side: a document to train on that is held out too.
LEFT_OUT = 2


@dataclass(frozen=True)
class Survey:
    """What one reading of a corpus has found, and the split that follows."""

    content: str
    """Digest of all documents in order: equal for equal text, whatever the files are called."""
    documents: int
    characters: int
    num_bytes: int
    """UTF-8 bytes of the text."""
    by: By
    """Whole documents are held out, or the end of the one text there is, or a corpus of its own."""
    sides: bytes
    """One byte a document, its index in SIDES or LEFT_OUT; unused where the corpus is cut."""
    cut: int | None = None
    """Where the corpus has one distinct text: characters that train, counted over all documents."""

    def side(self, document: int) -> Side:
        """Side of a whole document of a corpus that is not cut."""
        return SIDES[self.sides[document]]

    def leaves_out(self, document: int) -> bool:
        """Whether a document is on neither side."""
        return self.sides[document] == LEFT_OUT


class Piece(NamedTuple):
    """A stretch of one document on one side, never empty."""

    side: Side
    text: str
    first: bool
    """The document, or the held-out part of a cut one, starts here."""
    last: bool
    """The document ends here; a part that a cut leaves behind has no such piece."""


def survey(corpus: Corpus, val_fraction: float, seed: int) -> Survey:
    """Reads the corpus once and splits it; memory grows by a byte a document, a hundred for one of a held-out corpus.

    Raises:
        DataError: any fault of the files, or no text at all.
    """
    if isinstance(corpus, SeparateCorpora):
        return _survey_separate(corpus)
    whole, first = hashlib.sha256(), b""
    characters = num_bytes = 0
    distinct = False
    flags = bytearray()
    with Progress("Reading", corpus.num_bytes()) as progress:
        for digest, length, size in _digests(corpus):
            first = first or digest
            distinct = distinct or digest != first
            whole.update(digest)
            characters += length
            num_bytes += size
            flags.append(_place(digest, seed) < val_fraction)
            progress.advance(size)
    if not flags:
        raise _no_text(corpus)
    counts = (whole.hexdigest()[:32], len(flags), characters, num_bytes)
    if not distinct:
        cut = min(max(int((1 - val_fraction) * characters), 1), max(characters - 1, 1))
        return Survey(*counts, "position", bytes(flags), cut)
    if not 0 < sum(flags) < len(flags):
        flags = _nearest(corpus, val_fraction * num_bytes, seed, len(flags))
    return Survey(*counts, "document", bytes(flags))


def _survey_separate(corpora: SeparateCorpora) -> Survey:
    """Reads what is held out and then what trains; the content of both and which is which make the digest."""
    whole = hashlib.sha256()
    characters = num_bytes = 0
    sides, held_out = bytearray(), set[bytes]()
    with Progress("Reading", corpora.num_bytes()) as progress:
        for side, corpus in (("val", corpora.val), ("train", corpora.train)):
            before = len(sides)
            for digest, length, size in _digests(corpus):
                if side == "val":
                    held_out.add(digest)
                    sides.append(SIDES.index("val"))
                else:
                    sides.append(LEFT_OUT if digest in held_out else SIDES.index("train"))
                whole.update(digest)
                characters += length
                num_bytes += size
                progress.advance(size)
            if len(sides) == before:
                raise _no_text(corpus)
            whole.update(side.encode())
    return Survey(whole.hexdigest()[:32], len(sides), characters, num_bytes, "corpus", bytes(sides))


def pieces(corpus: Corpus, split: Survey, size: int) -> Iterator[Piece]:
    """The corpus in pieces of at most `size` characters, longer documents cut where a word begins.

    Raises:
        DataError: any fault of the files, or they have changed since the survey.
    """
    documents = characters = 0
    for index, document in enumerate(corpus.documents()):
        if index >= split.documents:
            raise _changed(corpus)
        documents += 1
        if split.leaves_out(index):
            characters += sum(map(len, document))
            continue
        for piece in _parts(index, document, split, size):
            characters += len(piece.text)
            yield piece
    if (documents, characters) != (split.documents, split.characters):
        raise _changed(corpus)


def stretches(texts: Iterable[str], size: int) -> Iterator[str]:
    """The same text in stretches of at most `size` characters.

    A stretch ends before the first space after a word where it can: there every byte-level tokenizer starts afresh, so
    that the stretches encode to what the whole text encodes to.
    """
    left = ""
    for text in texts:
        buffer, start = left + text, 0
        while len(buffer) - start > size:
            end = _word_end(buffer, start + max(1, size // 2), start + size)
            yield buffer[start:end]
            start = end
        left = buffer[start:]
    if left:
        yield left


def _digests(corpus: Corpus) -> Iterator[tuple[bytes, int, int]]:
    """Digest of the text, characters and UTF-8 bytes of each document."""
    for document in corpus.documents():
        hashed, characters, size = hashlib.blake2b(digest_size=16), 0, 0
        for text in document:
            encoded = text.encode("utf-8")
            hashed.update(encoded)
            characters += len(text)
            size += len(encoded)
        yield hashed.digest(), characters, size


def _place(digest: bytes, seed: int) -> float:
    """A place in [0, 1) that depends on the text and the seed alone."""
    keyed = _keyed(seed).copy()
    keyed.update(digest)
    return int.from_bytes(keyed.digest(), "big") / 2**64


@cache
def _keyed(seed: int) -> "hashlib.blake2b":
    return hashlib.blake2b(digest_size=8, key=hashlib.sha256(f"split {seed}".encode()).digest())


def _nearest(corpus: Corpus, wished: float, seed: int, documents: int) -> bytearray:
    """Holds out the one text, with its copies, whose size in bytes is nearest to `wished`."""
    flags = bytearray(documents)
    best: tuple[float, float] | None = None
    for index, (digest, _, size) in enumerate(_digests(corpus)):
        if index >= documents:
            raise _changed(corpus)
        rank = (abs(size - wished), _place(digest, seed))
        if best is None or rank < best:
            best = rank
            flags = bytearray(documents)
        if rank == best:
            flags[index] = 1
    return flags


def _parts(index: int, document: Iterator[str], split: Survey, size: int) -> Iterator[Piece]:
    """The pieces of one document, of one side or of both."""
    if split.cut is None:
        yield from _marked(split.side(index), stretches(document, size), ends=True)
        return
    # All documents are equal here, so their length is known before they are read.
    length = split.characters // split.documents
    trained = min(max(split.cut - index * length, 0), length)
    if trained in (0, length):
        yield from _marked("train" if trained else "val", stretches(document, size), ends=True)
        return
    cut = _Cut(document, trained)
    yield from _marked("train", stretches(cut.before(), size), ends=False)
    yield from _marked("val", stretches(cut.after(), size), ends=False)


def _marked(side: Side, texts: Iterator[str], ends: bool) -> Iterator[Piece]:
    """Marks the first and the last of the texts; looks one ahead to know the last."""
    held: str | None = None
    first = True
    for text in texts:
        if held is not None:
            yield Piece(side, held, first, False)
            first = False
        held = text
    if held is not None:
        yield Piece(side, held, first, ends)


class _Cut:
    """A document cut after some characters; `before` must be used up before `after`."""

    def __init__(self, texts: Iterator[str], characters: int) -> None:
        self._texts = texts
        self._left = characters
        self._rest = ""

    def before(self) -> Iterator[str]:
        for text in self._texts:
            if len(text) >= self._left:
                self._rest = text[self._left :]
                yield text[: self._left]
                return
            self._left -= len(text)
            yield text

    def after(self) -> Iterator[str]:
        if self._rest:
            yield self._rest
        yield from self._texts


def _word_end(text: str, low: int, high: int) -> int:
    """The last place in [low, high) between a word and a space, or `high` where there is none."""
    place = text.rfind(" ", low, high)
    while place >= low:
        if not text[place - 1].isspace():
            return place
        place = text.rfind(" ", low, place)
    return high


def _no_text(corpus: Corpus) -> DataError:
    return DataError(f"{corpus.title} is empty: there is no text in it")


def _changed(corpus: Corpus) -> DataError:
    return DataError(f"{corpus.title} changed while it was read; run again when its files are at rest")
