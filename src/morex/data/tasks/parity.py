"""`parity`: whether the number of ones is odd."""

import numpy as np

from morex.data.tasks.generated import GeneratedTask, Question


class Parity(GeneratedTask):
    """Bits, each 0 or 1 with equal chance; the answer is their sum modulo 2."""

    def draw(self, rng: np.random.Generator, difficulty: int) -> Question:
        bits = rng.integers(0, 2, difficulty).tolist()
        return [str(bit) for bit in bits], [str(sum(bits) % 2)]
