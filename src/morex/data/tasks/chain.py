"""`chain`: pointers are followed to where they end, however many there are."""

from itertools import pairwise

import numpy as np

from morex.data.tasks.generated import GeneratedTask, Question
from morex.sections.tasks import LETTERS


class Chain(GeneratedTask):
    """The question is pairs of letters in random order, `:` and a first letter; the answer the letter where it ends.

    The pair `ab` leads from a to b. The pairs form chains without a common letter; the one that begins with the first
    letter has as many pairs as the difficulty says. Nothing says how many those are: who follows pointers until there
    is none is right for all of them.
    """

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs

    def draw(self, rng: np.random.Generator, difficulty: int) -> Question:
        order = rng.permutation(len(LETTERS))
        letters = iter([LETTERS[i] for i in order])
        asked = [next(letters) for _ in range(difficulty + 1)]
        links = list(pairwise(asked))
        while len(links) < self.pairs:
            # The rest is chains too, so that more than one letter is an end.
            size = int(rng.integers(1, self.pairs - len(links) + 1))
            other = [next(letters) for _ in range(size + 1)]
            links += pairwise(other)
        text = ",".join("".join(links[i]) for i in rng.permutation(len(links)))
        return f"{text}:{asked[0]}", asked[-1]
