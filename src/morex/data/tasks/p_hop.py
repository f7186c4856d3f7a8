"""`p_hop`: induction heads in a row.

Sanford, Hsu and Telgarsky 2024, "Transformers, Parallel Computation, and Logarithmic Depth" (arXiv 2402.09268): their
hop_k is the letter where k hops lead, from each place. Their program draws letters as this one does, each evenly from
those that its neighbour is not; there k goes from 0 to 16 for 100 letters out of 4, and a sign of its own stands for
hops that lead nowhere. Here k is at least 1 and the last place is asked, from which all k hops exist; `places: all`
has training ask each other such place as well.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from morex.data.tasks.generated import GeneratedTask, Question, redrawn
from morex.sections.tasks import LETTERS


class PHop(GeneratedTask):
    """The question is the number p of hops, `:` and a sequence X_1 .. X_N; the answer the letter where p hops lead.

    A hop goes from i to the place after the latest earlier letter that equals X_i: the greatest j <= i with
    X_{j-1} = X_i. Starting at N, p hops must exist. Neighbours differ, so that every hop leads to an earlier place, and
    p hops are really p.
    """

    def __init__(self, length: int, letters: int, count: str, places: str) -> None:
        self.length, self.letters, self.is_unary, self.places = length, letters, count == "unary", places

    def draw(self, rng: np.random.Generator, difficulty: int) -> Question:
        return redrawn(
            lambda: self._attempt(rng, difficulty),
            f"with {difficulty} hops among {self.length} letters; raise data.task.length",
        )

    def targets(self, question: Sequence[str]) -> Sequence[str | None] | None:
        if self.places == "last":
            return None
        count, _, text = "".join(question).partition(":")
        ends = destinations(text, len(count) if self.is_unary else int(count))
        return [*(None for _ in f"{count}:"), *(None if end is None else text[end] for end in ends)]

    def _attempt(self, rng: np.random.Generator, hops: int) -> Question | None:
        # Each letter is its neighbour's plus 1 .. letters - 1, so all others are equally likely.
        steps = rng.integers(1, self.letters, self.length)
        text = "".join(LETTERS[letter] for letter in (np.cumsum(steps) % self.letters).tolist())
        end = destinations(text, hops)[-1]
        count = "1" * hops if self.is_unary else str(hops)
        return None if end is None else (f"{count}:{text}", text[end])


def destinations(sequence: Sequence[Hashable], hops: int) -> list[int | None]:
    """Where `hops` hops from each place lead, or None where one of them has nowhere to go."""
    after: dict[Hashable, int] = {}
    # The hop from each place, found in one pass: `after` has the place after the latest occurrence of each letter.
    target: list[int | None] = []
    for place, letter in enumerate(sequence):
        target.append(after.get(letter))
        after[letter] = place + 1
    ends: list[int | None] = list(range(len(sequence)))
    for _ in range(hops):
        ends = [None if end is None else target[end] for end in ends]
    return ends
