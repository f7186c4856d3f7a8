"""What a task in words is: questions and answers on both sides of its official split, found in $MOREX_DATA."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from morex.data.encoding import Tokenizer
from morex.data.errors import DataError
from morex.data.order import key_from, mixed, permuted
from morex.data.tasks.example import Example

Split = Literal["train", "test"]
LINE_END = "\n"


@dataclass(frozen=True)
class TextExample:
    """A question and its answer in words."""

    prompt: str
    """Up to where the answer begins."""
    answer: str
    difficulty: int


class TextTask(ABC):
    """A task that is read from files. The constructor takes the task's own options."""

    kind: ClassVar[str]

    @abstractmethod
    def read(self, split: Split) -> Iterator[TextExample]:
        """The examples of one side, in the order of the files. Raises DataError where they are not there."""


def find(kind: str, *names: str) -> Path:
    """The first file of these names in the folder of a task; raises DataError where there is none."""
    given = os.environ.get("MOREX_DATA")
    wanted = " or ".join(f"{kind}/{name}" for name in names)
    if not given:
        raise DataError(f"data.task.kind '{kind}' reads {wanted} from a folder of yours; set MOREX_DATA to that folder")
    folder = Path(given).expanduser()
    for name in names:
        if (folder / kind / name).is_file():
            return folder / kind / name
    raise DataError(f"data.task.kind '{kind}' needs {wanted} in MOREX_DATA, and '{folder}' does not have it")


@dataclass(frozen=True)
class Texts:
    """Both sides of a task in words, as `make_tokenizer` wants them."""

    kind: str
    train: Sequence[TextExample]
    val: Sequence[TextExample]

    @cached_property
    def content(self) -> str:
        """Digest of all examples."""
        digest = hashlib.sha256()
        for side in (self.train, self.val):
            for example in side:
                digest.update(repr((example.prompt, example.answer, example.difficulty)).encode())
            digest.update(b"\n")
        return digest.hexdigest()[:32]

    @property
    def split(self) -> tuple[str, ...]:
        return ("official",)

    def texts(self) -> Iterator[str]:
        """All text, and what ends an answer."""
        yield LINE_END
        for example in chain(self.train, self.val):
            yield example.prompt
            yield example.answer

    def training_texts(self) -> Iterator[str]:
        """The text of the training side."""
        for example in self.train:
            yield example.prompt + example.answer


def read_texts(task: TextTask) -> Texts:
    """Reads both sides. Raises DataError where a task is not there or has no examples."""
    texts = Texts(task.kind, *(list(task.read(split)) for split in ("train", "test")))
    for name, side in (("training", texts.train), ("test", texts.val)):
        if not side:
            raise DataError(
                f"data.task.kind '{task.kind}' has no {name} examples; put the original files into MOREX_DATA"
            )
    return texts


@dataclass(frozen=True)
class Encoded:
    """One side as token ids."""

    examples: list[Example]
    shortened: int
    """Examples that lost tokens at the beginning."""


def encoded(texts: Sequence[TextExample], tokenizer: Tokenizer, seq_len: int) -> Encoded:
    """Examples as token ids, each answer with the end-of-text token, or a line end where there is none.

    A prompt that leaves too little room for the answer loses its first tokens, as the end of a text is nearer to the
    question. Raises DataError where an answer alone does not fit.
    """
    end = LINE_END if tokenizer.eos_id is None else ""
    prompts = tokenizer.encode_batch([text.prompt for text in texts])
    answers = tokenizer.encode_batch([text.answer + end for text in texts])
    examples, shortened = [], 0
    for text, prompt, answer in zip(texts, prompts, answers, strict=True):
        if tokenizer.eos_id is not None:
            answer = np.append(answer, tokenizer.dtype(tokenizer.eos_id))
        # The last token of an answer is predicted and never read.
        room = seq_len + 1 - len(answer)
        if room < 1:
            raise DataError(
                f"an answer of data.task has {len(answer)} tokens and begins {text.answer[:20]!r}; with its question "
                f"it does not fit into train.seq_len {seq_len}, use {len(answer)} or more"
            )
        shortened += len(prompt) > room
        examples.append(Example(prompt[-room:], answer, text.difficulty))
    return Encoded(examples, shortened)


class Shuffled:
    """Examples without end: each epoch has all of them once, in an order of its own."""

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        self._examples, self._key = examples, key_from(f"examples {seed}")

    def take(self, first: int, count: int) -> list[Example]:
        """Examples first .. first + count - 1."""
        counters, size = np.arange(first, first + count, dtype=np.uint64), len(self._examples)
        keys = mixed(self._key ^ (counters // np.uint64(size)))
        order = permuted(counters % np.uint64(size), size, keys)
        return [self._examples[place] for place in order.tolist()]
