"""A folder of token shards: both sides of a split in files of one size, the tokenizer, and the index of them all.

    shards.json       what the text, the split and the tokenizer are; counts and checksum of each shard
    tokenizer/        the tokenizer that made the tokens
    train-00000.tokens, ...   val-00000.tokens, ...

Shards are finished one after another and noted in the index at once, so a folder whose making was ended goes on behind
the last of them. What is in each follows from the text and the settings alone.
"""

import errno
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from morex.data.cache import TEMPORARY, key_of, sweep
from morex.data.encoded import Encoded
from morex.data.encoding import Tokenizer
from morex.data.errors import DataError
from morex.data.progress import Progress
from morex.data.split import SIDES, By, Side
from morex.data.stream import ShardWriter, TokenStream, chained, map_shard, shard_size
from morex.data.tokenizer import load_tokenizer
from morex.files import sha256, sync_folder, write_json

FORMAT = 2
INDEX = "shards.json"
TOKENIZER = "tokenizer"
SHARD_BYTES = 1 << 28
# More than this is checked by size alone when it is opened: reading it all would cost too much each time.
CHECKED_BYTES = 1 << 28
PREPARE = "morex data prepare"

Count = Annotated[int, Field(ge=0)]


class Shard(BaseModel):
    """What the index says of one shard."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tokens: Count
    documents: Count
    """Documents that start in it."""
    num_bytes: Count
    """UTF-8 bytes of its text."""
    batches: Count
    """Batches of the text that this shard and those before it hold this side of."""
    sha256: str


class Index(BaseModel):
    """What a folder of shards holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2]
    complete: bool
    content: str
    """Digest of the text."""
    documents: Count
    split: By
    seed: tuple[float, int] | None
    """The share and the seed that the split follows from; None where a corpus of its own is held out."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    dtype: Literal["uint16", "uint32"]
    shard_bytes: Annotated[int, Field(gt=0)]
    """A shard ends with the batch of text that makes it this large."""
    train: tuple[Shard, ...] = ()
    val: tuple[Shard, ...] = ()

    def shards(self, side: Side) -> tuple[Shard, ...]:
        """The shards of one side."""
        return self.train if side == "train" else self.val

    def named(self) -> dict[str, Shard]:
        """All shards, by the names of their files."""
        return {shard_name(side, number): shard for side in SIDES for number, shard in enumerate(self.shards(side))}

    def size(self, shard: Shard) -> int:
        """Bytes of the file of a shard."""
        return shard_size(shard.tokens, shard.documents, self.item)

    @property
    def item(self) -> np.dtype[np.unsignedinteger]:
        """Type of a token in the files."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def digest(self) -> str:
        """Equal for equal tokens on both sides."""
        return key_of(self.content, [[shard.sha256 for shard in self.shards(side)] for side in SIDES])

    def summary(self) -> dict[str, dict[str, int]]:
        """Shards, documents, bytes of text and tokens of each side."""
        return {
            side: {
                "shards": len(self.shards(side)),
                "documents": sum(shard.documents for shard in self.shards(side)),
                "bytes": sum(shard.num_bytes for shard in self.shards(side)),
                "tokens": sum(shard.tokens for shard in self.shards(side)),
            }
            for side in SIDES
        }


def shard_name(side: Side, number: int) -> str:
    """Name of the file of a shard."""
    return f"{side}-{number:05d}.tokens"


def is_shard_folder(path: Path) -> bool:
    """Whether a folder has an index of token shards, whole or not."""
    return (path / INDEX).is_file()


def read_index(folder: Path, title: str) -> Index:
    """The index of a folder of shards. Raises DataError where there is none or it is damaged."""
    try:
        return index_from((folder / INDEX).read_bytes(), title)
    except FileNotFoundError:
        raise DataError(f"{title} has no token shards: there is no {INDEX} in it") from None
    except OSError as error:
        raise DataError(f"{title} has an {INDEX} that cannot be read ({error.strerror or error})") from None


def index_from(content: bytes, title: str) -> Index:
    """The index that a file holds. Raises DataError where it is damaged or of another program."""
    try:
        return Index.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = f"{'.'.join(map(str, fault['loc']))}: " if fault["loc"] else ""
        raise DataError(f"{title} has an {INDEX} that is none of token shards ({where}{fault['msg']})") from None


def open_shards(folder: Path, title: str) -> tuple[Index, TokenStream, TokenStream]:
    """Maps both sides of a folder of shards into memory.

    Sizes are compared with the index; checksums too where a side is no larger than `CHECKED_BYTES`.

    Raises:
        DataError: the index is damaged or not complete, or a shard is missing or not what the index says.
    """
    index = read_index(folder, title)
    if not index.complete:
        raise DataError(
            f"{title} is not finished; run `{PREPARE}` again as it was begun, which goes on behind its shards"
        )
    train, val = (_opened(folder, index, side, title) for side in SIDES)
    return index, train, val


def _opened(folder: Path, index: Index, side: Side, title: str) -> TokenStream:
    shards = index.shards(side)
    sum_up = sum(map(index.size, shards)) <= CHECKED_BYTES
    streams = [TokenStream(np.zeros(0, index.item), np.zeros(0, np.int64), 0)]
    for number, shard in enumerate(shards):
        path = folder / shard_name(side, number)
        if fault := _fault(path, index, shard, sum_up):
            raise DataError(f"{title}: {fault}")
        try:
            arrays = map_shard(path, shard.tokens, shard.documents, index.item)
        except OSError as error:
            few = "; raise `ulimit -n`, or prepare larger shards" if error.errno == errno.EMFILE else ""
            raise DataError(f"{title}: '{path}' cannot be mapped ({error.strerror or error}){few}") from None
        streams.append(TokenStream(*arrays, shard.num_bytes))
    return chained(streams)


def check_shards(folder: Path, title: str) -> Index:
    """Compares every shard of a folder, read whole, with the index; returns the index.

    Raises:
        DataError: one is missing or not what the index says, or the tokenizer is not that of the index.
    """
    index = read_index(folder, title)
    tokenizer_of(folder, index, title)
    shards = index.named()
    with Progress("Checking", sum(map(index.size, shards.values()))) as progress:
        for name, shard in shards.items():
            if fault := _fault(folder / name, index, shard, True):
                raise DataError(f"{title}: {fault}")
            progress.advance(index.size(shard))
    return index


def tokenizer_of(folder: Path, index: Index, title: str) -> Tokenizer:
    """The tokenizer of a folder of shards. Raises DataError where it is damaged or another than the index says."""
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if tokenizer.fingerprint != index.tokenizer:
        raise DataError(f"{title} has another tokenizer than its shards were made with; restore '{folder / TOKENIZER}'")
    return tokenizer


def _fault(path: Path, index: Index, shard: Shard, sum_up: bool) -> str | None:
    """What is wrong with the file of a shard."""
    restore = "restore it, or prepare the folder again"
    try:
        size = path.stat().st_size
        if size != index.size(shard):
            return f"'{path}' has changed since it was indexed: {size} bytes, not {index.size(shard)}; {restore}"
        if sum_up and sha256(path) != shard.sha256:
            return f"'{path}' has changed since it was indexed: its SHA-256 is not {shard.sha256}; {restore}"
    except FileNotFoundError:
        return f"'{path}' is missing; {restore}"
    except OSError as error:
        return f"'{path}' cannot be read ({error.strerror or error})"
    return None


class ShardFolder:
    """A folder of shards in the making."""

    def __init__(self, folder: Path, plan: Index, tokenizer: Tokenizer) -> None:
        """Begins a folder, or goes on with one; shards that are finished and whole are kept.

        Args:
            folder: empty, not there, or begun with the same plan.
            plan: the index of a folder in which nothing is finished.

        Raises:
            DataError: the folder holds something else.
        """
        self._folder, self._index = folder, plan
        folder.mkdir(parents=True, exist_ok=True)
        if is_shard_folder(folder):
            self._index = self._kept(plan)
        elif any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise DataError(f"folder '{folder}' is not empty and holds no token shards; name another folder")
        self.kept = len(self._index.named())
        try:  # what is whole is left alone: somebody may be reading it
            tokenizer_of(folder, plan, f"folder '{folder}'")
        except DataError:
            tokenizer.save(folder / TOKENIZER)
        self._note()
        for pattern in (f"{TEMPORARY}*", f".{INDEX}.*"):
            sweep(folder, pattern)

    @property
    def index(self) -> Index:
        """What is finished."""
        return self._index

    def done(self, side: Side) -> int:
        """Batches of the text whose part of a side is in finished shards."""
        shards = self._index.shards(side)
        return shards[-1].batches if shards else 0

    def write(self, batches: Iterator[Mapping[Side, Encoded]]) -> None:
        """Writes the tokens of all batches of the text, those that are done already being empty."""
        with ExitStack() as open_files:
            writers: dict[Side, ShardWriter] = {}
            count = 0
            for count, batch in enumerate(batches, 1):
                for side, encoded in batch.items():
                    if side not in writers:
                        path = self._folder / shard_name(side, len(self._index.shards(side)))
                        writers[side] = ShardWriter(path, self._index.item)
                        open_files.callback(writers[side].close)
                    writers[side].add(*encoded)
                    if writers[side].size >= self._index.shard_bytes:
                        self._finish(side, writers.pop(side), count)
            for side, writer in writers.items():
                self._finish(side, writer, count)
        self._note(complete=True)

    def _finish(self, side: Side, writer: ShardWriter, batches: int) -> None:
        checksum = writer.finish()
        sync_folder(self._folder)
        shard = Shard(
            tokens=writer.tokens,
            documents=writer.documents,
            num_bytes=writer.num_bytes,
            batches=batches,
            sha256=checksum,
        )
        self._note(**{side: (*self._index.shards(side), shard)})

    def _note(self, **changes: object) -> None:
        """Writes the index, changed so."""
        self._index = self._index.model_copy(update=changes)
        write_json(self._folder / INDEX, self._index.model_dump())

    def _kept(self, plan: Index) -> Index:
        """The index of what is there, up to the first shard of each side that is not whole."""
        title = f"folder '{self._folder}'"
        there = read_index(self._folder, title)
        begun = there.model_copy(update={"complete": False, "train": (), "val": ()})
        for name, value in begun:
            if value != getattr(plan, name):
                raise DataError(
                    f"{title} holds token shards of something else: its {name} is {value!r} there and "
                    f"{getattr(plan, name)!r} here; name another folder"
                )
        sides: dict[str, tuple[Shard, ...]] = {}
        with Progress("Checking", sum(map(there.size, there.named().values()))) as progress:
            for side in SIDES:
                whole = 0
                for number, shard in enumerate(there.shards(side)):
                    if _fault(self._folder / shard_name(side, number), there, shard, True):
                        break
                    progress.advance(there.size(shard))
                    whole += 1
                sides[side] = there.shards(side)[:whole]
        complete = there.complete and all(sides[side] == there.shards(side) for side in SIDES)
        return there.model_copy(update={**sides, "complete": complete})
