"""`counting`: how often a number occurs, from 0 to 3 or more."""

import numpy as np

from morex.data.tasks.generated import GeneratedTask, Question

MOST_COUNTED = 6
"""Greatest number of occurrences in balanced sequences."""


class Counting(GeneratedTask):
    """T numbers from 1 .. numbers - 1; the class is min(number of `target`s, 3).

    Balanced: the class is drawn first, evenly, and within class 3 the count evenly from 3 to 6; the targets then go to
    random places among other numbers.
    """

    def __init__(self, numbers: int, target: int, balanced: bool) -> None:
        self.numbers, self.target, self.balanced = numbers, target, balanced

    def draw(self, rng: np.random.Generator, difficulty: int) -> Question:
        if not self.balanced:
            sequence = rng.integers(1, self.numbers, difficulty)
        else:
            count = int(rng.integers(4))
            count = count if count < 3 else int(rng.integers(3, MOST_COUNTED + 1))
            # The numbers but the target: those from it on move up by one.
            sequence = rng.integers(1, self.numbers - 1, difficulty)
            sequence += sequence >= self.target
            sequence[rng.choice(difficulty, count, replace=False)] = self.target
        label = min(int((sequence == self.target).sum()), 3)
        return [str(number) for number in sequence.tolist()], [str(label)]
