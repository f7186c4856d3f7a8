"""`pattern`: which of four runs is hidden in a sequence."""

import numpy as np

from morex.data.tasks.generated import GeneratedTask, Question
from morex.sections.tasks import RUN

RUNS = (range(1, RUN + 1), range(RUN, 0, -1), [1, 2] * (RUN // 2), [5] * RUN)


class Pattern(GeneratedTask):
    """T numbers from 1 .. numbers - 1 with one of the four runs at a random place before T - 10; the class is which."""

    def __init__(self, numbers: int) -> None:
        self.numbers = numbers

    def draw(self, rng: np.random.Generator, difficulty: int) -> Question:
        sequence = rng.integers(1, self.numbers, difficulty)
        label = int(rng.integers(len(RUNS)))
        start = rng.integers(0, difficulty - RUN)
        sequence[start : start + RUN] = RUNS[label]
        return [str(number) for number in sequence.tolist()], [str(label)]
