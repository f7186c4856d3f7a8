"""Where an engine's time goes, and how much goes through the model: a few additions a pass."""

import time
from collections import Counter

PARTS = ("admission", "prelude", "core", "coda and head", "sampling")


class Clock:
    """Seconds by part and counts, since the start or the last `reset`.

    On a GPU a part is charged with what it launches and waits for; on a CPU these are its seconds of work.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Back to nothing."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps = 0
        """Steps of the engine."""
        self.running = 0
        """Requests that ran in each step, summed."""
        self.entering = 0
        """Tokens that went through the prelude."""
        self.leaving = 0
        """Tokens that went through the coda."""
        self.visits: Counter[int] = Counter()
        """Tokens that took recursion r, summed over routed groups."""

    def part(self, name: str) -> "Part":
        """Around one of `PARTS`."""
        return Part(self, name)

    def mean_depth(self, groups: int) -> float:
        """Recursions that a token takes in each of so many routed groups, on average."""
        return self.visits.total() / (groups * max(1, self.entering))


class Part:
    """Adds what passes inside to a clock."""

    def __init__(self, clock: Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.clock.seconds[self.name] += time.perf_counter() - self.start
