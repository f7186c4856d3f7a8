"""`addition`: two numbers of n digits each."""

import numpy as np

from morex.data.tasks.generated import GeneratedTask, Question


class Addition(GeneratedTask):
    """Two numbers of n digits, each first digit but that of a single one from 1 to 9; the answer is their sum.

    With its last digit first, each digit of the sum follows from what has been written already (Lee et al. 2023,
    "Teaching Arithmetic to Small Transformers").
    """

    def __init__(self, order: str) -> None:
        self.order = order

    def draw(self, rng: np.random.Generator, difficulty: int) -> Question:
        digits = rng.integers(0, 10, (2, difficulty))
        if difficulty > 1:
            digits[:, 0] = rng.integers(1, 10, 2)
        first, second = ("".join(map(str, row)) for row in digits.tolist())
        total = str(int(first) + int(second))
        if self.order == "reversed":
            first, second = first[::-1], second[::-1]
        return f"{first}+{second}", total if self.order == "plain" else total[::-1]
