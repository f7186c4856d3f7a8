"""Data sets of the Hugging Face hub, `hf:NAME[:CONFIG][#SPLIT]`, through the package datasets of the extra `data`.

The package downloads a data set once into its own cache and maps it into memory, so that reading it two or three times,
as preparing does, needs neither the network nor memory that grows with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from morex.data.corpus import Corpus
from morex.data.errors import DataError
from morex.data.formats.columnar import check_column, texts_of

HUB_PREFIX = "hf:"
# Rows that the package hands over at a time, as Arrow, not yet as Python text.
SLICE_ROWS = 1024


@dataclass(frozen=True)
class HubCorpus(Corpus):
    """One split of a data set, one document a row."""

    name: str
    dataset: Any
    """`datasets.Dataset`."""
    column: str
    option: str

    @property
    def title(self) -> str:
        return f"{self.option} '{self.name}'"

    def documents(self) -> Iterator[Iterator[str]]:
        slices = self.dataset.select_columns([self.column]).with_format("arrow").iter(SLICE_ROWS)
        return (iter((text,)) for text in texts_of(slices, self.column, self.title))

    def identity(self) -> dict[str, Any]:
        """The fingerprint: that of the revision, the configuration and the split."""
        return {"hub": self.dataset._fingerprint, "rows": len(self.dataset)}

    def touched_at(self) -> int:
        return 0


def open_hub(name: str, column: str, option: str) -> HubCorpus:
    """Finds a data set in the cache of the package datasets, or downloads it.

    Raises:
        DataError: the package is not installed, there is no such data set, configuration or split, the hub cannot be
            reached, or the column is not there or is not of text.
    """
    path, _, split = name.removeprefix(HUB_PREFIX).partition("#")
    path, _, configuration = path.partition(":")
    title = f"{option} '{name}'"
    if not path:
        raise DataError(f"{title} names no data set; write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG#SPLIT")
    try:
        import datasets
    except ImportError:
        raise DataError(f"{title} needs the package datasets; install it with pip install 'morex[data]'") from None
    try:
        dataset = datasets.load_dataset(path, configuration or None, split=split or "train")
    except Exception as error:  # the package raises those of several others
        raise _fault(title, error) from None
    check_column(dataset.features.arrow_schema, column, title)
    return HubCorpus(name, dataset, column, option)


def _fault(title: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, ConnectionError):
        return DataError(
            f"{title} is not in the cache of the package datasets and the hub cannot be reached ({reason}); load it "
            "once with a network, or give files"
        )
    if isinstance(error, FileNotFoundError):
        return DataError(f"{title} is not to be found ({reason}); check its name, or log in where access is granted")
    return DataError(f"{title} cannot be loaded ({reason}); write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG#SPLIT")
