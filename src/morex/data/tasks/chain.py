"""`chain`: pointers are followed to where they end, however many there are."""

from itertools import pairwise

import numpy as np

from morex.data.tasks.generated import GeneratedTask, Question
from morex.sections.tasks import LETTERS


class Chain(GeneratedTask):
    """The question is pairs of letters in random order, `:` and first letters; the answer the letters where they lead.

    The pair `ab` leads from a to b. The pairs form chains without a common letter. One chain has as many pairs as the
    difficulty says, and its first letter is among those asked for; from the others it is as far to the end or less.
    Nothing says how far it is: who follows pointers until there is none is right for all.
    """

    def __init__(self, pairs: int, queries: int) -> None:
        self.pairs, self.queries = pairs, queries

    def draw(self, rng: np.random.Generator, difficulty: int) -> Question:
        letters = iter([LETTERS[i] for i in rng.permutation(len(LETTERS))])
        chains: list[list[str]] = []
        left = self.pairs
        while left:
            # More than one chain, so that more than one letter is an end.
            size = int(rng.integers(1, left + 1)) if chains else difficulty
            chains.append([next(letters) for _ in range(size + 1)])
            left -= size
        ends = {
            letter: chain[-1]
            for chain in chains
            for place, letter in enumerate(chain[:-1])
            if len(chain) - 1 - place <= difficulty
        }
        asked = [chains[0][0], *rng.choice(list(ends), self.queries - 1)]
        rng.shuffle(asked)
        links = [first + second for chain in chains for first, second in pairwise(chain)]
        return (
            f"{','.join(rng.permutation(links))}:{''.join(asked)}",
            "".join(ends[letter] for letter in asked),
        )
