"""`copy`: the class of a hidden run of small numbers. Nothing is copied; name and label are those of the seed."""

import numpy as np

from morex.data.tasks.generated import GeneratedTask, Question
from morex.sections.tasks import RUN

SMALL = 50
"""Numbers of the run are below this."""


class Copy(GeneratedTask):
    """T numbers from 1 .. numbers - 1; a run of 10 from 1 .. min(50, numbers) - 1 at a random place before T - 10.

    The class is the sum of the run modulo 4.
    """

    def __init__(self, numbers: int) -> None:
        self.numbers = numbers

    def draw(self, rng: np.random.Generator, difficulty: int) -> Question:
        sequence = rng.integers(1, self.numbers, difficulty)
        run = rng.integers(1, min(SMALL, self.numbers), RUN)
        start = rng.integers(0, difficulty - RUN)
        sequence[start : start + RUN] = run
        return [str(number) for number in sequence.tolist()], [str(int(run.sum()) % 4)]
