"""A task, ready to train on: its tokenizer, and examples on both sides of the split."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

from morex.data.cache import key_of
from morex.data.encoding import Tokenizer
from morex.data.loader import Batch
from morex.data.symbols import SymbolTokenizer
from morex.data.tasks.example import Example, answer_batch, class_batch
from morex.data.tasks.generated import CUE, Examples, GeneratedTask
from morex.data.tasks.kinds import TASKS
from morex.data.tasks.text import Shuffled, TextTask, encoded, read_texts
from morex.data.tokenizer import check_vocabulary, make_tokenizer
from morex.sections.data import DataConfig
from morex.sections.tasks import GeneratedTaskConfig

# Part of every digest: raise it when the same settings come to mean other examples.
FORMAT = 1


class TrainingExamples(Protocol):
    """Training examples without end, in the order of one seed; the k-th is a function of the seed and k."""

    def take(self, first: int, count: int) -> list[Example]:
        """Examples first .. first + count - 1."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out examples, in a fixed order."""

    examples: Sequence[Example]
    classifies: bool = False
    """Whether batches are for a classifier."""

    @property
    def hardest(self) -> int:
        """The greatest difficulty."""
        return max(example.difficulty for example in self.examples)

    def head(self, num_tokens: int) -> "HeldOut":
        """The first examples of which a model reads so many tokens in all, or all of them."""
        before = accumulate((example.num_read for example in self.examples), initial=0)
        return replace(
            self, examples=[one for one, done in zip(self.examples, before, strict=False) if done < num_tokens]
        )

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All of them once; what is labelled are the answers, or the classes."""
        make = class_batch if self.classifies else answer_batch
        for first in range(0, len(self.examples), batch_size):
            yield make(self.examples[first : first + batch_size])


@dataclass(frozen=True)
class PreparedTask:
    """A task as token ids."""

    tokenizer: Tokenizer
    training: Callable[[int], TrainingExamples]
    """The training examples in the order of a seed."""
    val: HeldOut
    predicts_prompt: bool
    """Whether training predicts the tokens of prompts too."""
    content: str
    """Digest of what the examples are made from."""
    num_train: int | None = None
    """Training examples; None where they have no end."""
    shortened: int = 0
    """Examples that lost tokens at the beginning because a sequence has no room for them."""


def prepare_task(
    data: DataConfig, vocab_size: int, seq_len: int, tokenizer: Tokenizer | None = None, classifies: bool = False
) -> PreparedTask:
    """Makes or reads the examples of `data.task`.

    Args:
        data: the task, and the tokenizer of tasks in words.
        vocab_size: token ids that the model has.
        seq_len: tokens of a sequence. Examples in words that are longer lose tokens at the beginning.
        tokenizer: takes the place of `data.tokenizer`, for example that of a run that is resumed.
        classifies: make examples for a classifier head.

    Raises:
        DataError: a task is not there or has no questions of some difficulty, an answer is longer than a sequence, or
            ids do not fit the vocabulary.
    """
    task = data.task
    assert task is not None
    made = TASKS[task.kind](**task.options())
    if isinstance(task, GeneratedTaskConfig):
        assert isinstance(made, GeneratedTask)
        return _generated(task, made, classifies)
    assert isinstance(made, TextTask)
    texts = read_texts(made)
    if tokenizer is None:
        tokenizer = make_tokenizer(data.tokenizer, vocab_size, texts)
    check_vocabulary(tokenizer, vocab_size)
    train, val = (encoded(side, tokenizer, seq_len) for side in (texts.train, texts.val))
    return PreparedTask(
        tokenizer=tokenizer,
        training=lambda seed: Shuffled(train.examples, seed),
        val=HeldOut(val.examples),
        predicts_prompt=task.loss == "all",
        content=texts.content,
        num_train=len(train.examples),
        shortened=train.shortened + val.shortened,
    )


def _generated(task: GeneratedTaskConfig, made: GeneratedTask, classifies: bool) -> PreparedTask:
    tokenizer = SymbolTokenizer(task.symbols if classifies else (*task.symbols, CUE), has_end=not classifies)
    held_out = Examples(made, task, tokenizer, held_out=True).take(0, task.held_out)
    return PreparedTask(
        tokenizer=tokenizer,
        training=lambda seed: Examples(made, task, tokenizer, held_out=False, seed=seed),
        val=HeldOut(held_out, classifies),
        predicts_prompt=False,
        content=key_of(FORMAT, task.model_dump(mode="json")),
    )
