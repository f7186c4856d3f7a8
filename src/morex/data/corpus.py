"""What a corpus is: documents in a fixed order, and a way to tell whether they are still the same."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from morex.data.formats.files import is_packed
from morex.data.formats.kinds import COMPRESSED_SUFFIXES, documents_of, format_of


class Corpus(ABC):
    """Documents in the order in which they are read."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The option and its value, for messages: `data.corpus 'sotu'`."""

    @abstractmethod
    def documents(self) -> Iterator[Iterator[str]]:
        """Each document as an iterator of non-empty pieces of its text; use one up before asking for the next."""

    @abstractmethod
    def identity(self) -> Any:
        """Plain data for JSON, found without reading the text: equal as long as the text is the same."""

    @abstractmethod
    def touched_at(self) -> int:
        """When the newest part changed, in nanoseconds since the epoch; 0 where nothing can change."""

    def num_bytes(self) -> int | None:
        """Bytes of text to come, or None where they are packed and nobody knows."""
        return None


@dataclass(frozen=True)
class FileCorpus(Corpus):
    """The documents of files."""

    name: str
    """As the user gave it."""
    files: tuple[Path, ...]
    column: str = "text"
    """Column, or field of a JSON object, that holds the text."""
    option: str = "data.corpus"
    """Where the user gave it."""

    @property
    def title(self) -> str:
        return f"{self.option} '{self.name}'"

    def documents(self) -> Iterator[Iterator[str]]:
        return chain.from_iterable(documents_of(path, self.column) for path in self.files)

    def identity(self) -> list[tuple[str, int, int, int]]:
        """Path, size and times of each file: equal as long as no file was touched."""
        found = [(path, path.stat()) for path in self.files]
        return [(str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in found]

    def touched_at(self) -> int:
        return max(max(stat.st_mtime_ns, stat.st_ctime_ns) for stat in (path.stat() for path in self.files))

    def num_bytes(self) -> int | None:
        if any(is_packed(path) or format_of(path) in COMPRESSED_SUFFIXES for path in self.files):
            return None
        return sum(path.stat().st_size for path in self.files)


@dataclass(frozen=True)
class SeparateCorpora(Corpus):
    """A corpus to train on and another that is held out, which comes first."""

    train: Corpus
    val: Corpus

    @property
    def title(self) -> str:
        return f"{self.train.title} or {self.val.title}"

    def documents(self) -> Iterator[Iterator[str]]:
        return chain(self.val.documents(), self.train.documents())

    def identity(self) -> dict[str, Any]:
        return {"train": self.train.identity(), "val": self.val.identity()}

    def touched_at(self) -> int:
        return max(self.train.touched_at(), self.val.touched_at())

    def num_bytes(self) -> int | None:
        sizes = (self.train.num_bytes(), self.val.num_bytes())
        return None if None in sizes else sum(size for size in sizes if size is not None)
