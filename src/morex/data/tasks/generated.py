"""What a generated task is, and its examples without end: the k-th is a function of (seed, k) alone.

Whether a question may be trained on or is held out follows from a hash of it, so that no question is ever on both
sides, however few there are. Training draws from a stream of the training's seed, held-out examples from a fixed one.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from morex.data.errors import DataError
from morex.data.order import key_from
from morex.data.symbols import SymbolTokenizer
from morex.data.tasks.example import Example
from morex.model.heads import IGNORED
from morex.sections.tasks import GeneratedTaskConfig

CUE = "="
"""Stands between question and answer."""
HELD_OUT_SHARE = 0.1
"""Share of all questions that are never trained on."""
MOST_DRAWS = 2000
"""Draws after which a side of the split is taken to have no question at all."""

Question = tuple[Sequence[str], Sequence[str]]
"""Symbols of a question, and of its answer."""


class GeneratedTask(ABC):
    """A task that makes its own examples. The constructor takes the task's own options."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, difficulty: int) -> Question:
        """A random question of this difficulty, and its answer. Raises DataError where none was found."""

    def targets(self, question: Sequence[str]) -> Sequence[str | None] | None:
        """What training asks at each symbol of a question, the answer at the last; None for nothing, here or at all."""
        return None


class Examples:
    """Numbered examples of one side of the split, without end."""

    def __init__(
        self,
        task: GeneratedTask,
        config: GeneratedTaskConfig,
        tokenizer: SymbolTokenizer,
        held_out: bool,
        seed: int = 0,
    ) -> None:
        """`seed` is that of the training; held-out examples have none."""
        self._span = (config.eval_difficulty if held_out else None) or config.difficulty
        self._task, self._tokenizer, self._held_out, self._is_cued = task, tokenizer, held_out, config.is_cued
        key = key_from("task, held out" if held_out else f"task, training {seed}")
        # A counter-based generator: to go to an example is to set the counter, which is cheaper than a new generator.
        self._bits = np.random.Philox(key=int(key))
        self._start = self._bits.state
        self._rng = np.random.Generator(self._bits)

    def take(self, first: int, count: int) -> list[Example]:
        """Examples first .. first + count - 1. Raises DataError where this side has no question."""
        return [self._at(number) for number in range(first, first + count)]

    def _at(self, number: int) -> Example:
        self._start["state"]["counter"][:] = 0, 0, 0, number
        self._bits.state = self._start
        rng, (low, high) = self._rng, self._span
        for _ in range(MOST_DRAWS):
            difficulty = int(rng.integers(low, high + 1))
            question, answer = self._task.draw(rng, difficulty)
            ids = self._tokenizer.ids_of(question)
            if is_held_out(ids) == self._held_out:
                targets = None if self._held_out else self._task.targets(question)
                return self._example(ids, self._tokenizer.ids_of(answer), difficulty, targets)
        side = "held out" if self._held_out else "left to train on"
        name = "eval_difficulty or difficulty" if self._held_out else "difficulty"
        raise DataError(
            f"data.task has so few questions at difficulty {low} to {high} that none of them is {side}; widen "
            f"data.task.{name}"
        )

    def _example(
        self, question: list[int], answer: list[int], difficulty: int, targets: Sequence[str | None] | None
    ) -> Example:
        end = self._tokenizer.eos_id
        if end is None:
            # The tokenizer of a classifier; the classes are the first symbols.
            return Example(question, answer, difficulty, label=answer[0])
        if self._is_cued:
            return Example([*question, *self._tokenizer.ids_of(CUE)], [*answer, end], difficulty)
        return Example(question, answer, difficulty, targets=None if targets is None else self._labels(targets[:-1]))

    def _labels(self, targets: Sequence[str | None]) -> list[int]:
        asked = iter(self._tokenizer.ids_of([symbol for symbol in targets if symbol is not None]))
        return [IGNORED if symbol is None else next(asked) for symbol in targets]


def is_held_out(question: Sequence[int]) -> bool:
    """Whether a question is never trained on: a matter of its symbols alone."""
    digest = hashlib.blake2b(np.array(question, np.uint32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def redrawn(draw: Callable[[], Question | None], what: str) -> Question:
    """The first of many draws that succeeds; raises DataError, which says `what`, where none does."""
    for _ in range(MOST_DRAWS):
        found = draw()
        if found is not None:
            return found
    raise DataError(f"data.task finds no example {what}")
