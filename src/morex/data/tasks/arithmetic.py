"""`arithmetic`: nested expressions modulo a small number.

As in Deletang et al. 2023, "Neural Networks and the Chomsky Hierarchy", with a depth that is known.
"""

import numpy as np

from morex.data.tasks.generated import GeneratedTask, Question

OPERATIONS = "+-*"


class Arithmetic(GeneratedTask):
    """A number is of depth 0; `(a+b)`, `(a-b)` or `(a*b)` is one deeper than the deeper operand.

    One operand, on either side, is of depth d - 1, the other of an even draw from 0 .. min(d - 1, side_depth). Numbers
    are drawn evenly from 0 .. modulus - 1; the answer is the value modulo `modulus`.
    """

    def __init__(self, modulus: int, side_depth: int) -> None:
        self.modulus, self.side_depth = modulus, side_depth

    def draw(self, rng: np.random.Generator, difficulty: int) -> Question:
        text, value = self._expression(rng, difficulty)
        return text, str(value)

    def _expression(self, rng: np.random.Generator, depth: int) -> tuple[str, int]:
        """Text and value of an expression of exactly this depth."""
        if depth == 0:
            value = int(rng.integers(self.modulus))
            return str(value), value
        deep = self._expression(rng, depth - 1)
        shallow = self._expression(rng, int(rng.integers(min(depth - 1, self.side_depth) + 1)))
        (left, a), (right, b) = (deep, shallow) if rng.integers(2) else (shallow, deep)
        operation = OPERATIONS[rng.integers(len(OPERATIONS))]
        value = {"+": a + b, "-": a - b, "*": a * b}[operation]
        return f"({left}{operation}{right})", value % self.modulus
