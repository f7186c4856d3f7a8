"""What each token of a request did on its way through the model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass
class RequestTrace:
    """Of each token that the model has taken in, the newest left out: depth, router scores, experts.

    The names of routers are their module paths, as in the trace of a forward pass.
    """

    depth: list[int] = field(default_factory=list)
    """Recursions that the token took, summed over routed groups."""
    scores: dict[str, list[list[float | None]]] = field(default_factory=dict)
    """By depth router and token, the scores at recursions 1, 2, ...; None where the token was no candidate."""
    experts: dict[str, list[list[list[int]]]] = field(default_factory=dict)
    """By expert router and token, the experts of each of its choices, in their order."""

    def begin(self, start: int, tokens: int) -> None:
        """So many tokens from this one on go through the model, perhaps once more."""
        self.depth[start:] = [0] * tokens
        for scores in self.scores.values():
            del scores[start:]
        for experts in self.experts.values():
            del experts[start:]

    def note_depths(self, name: str, times: Iterable[int], masks: Sequence[Tensor], scores: Sequence[Tensor]) -> None:
        """What a routed group made of some tokens.

        Args:
            name: of the group's router.
            times: of the tokens.
            masks, scores: of these tokens [n], by recursion.
        """
        by_token = list(zip(*(score.tolist() for score in scores), strict=True))
        taken = [sum(own) for own in zip(*(mask.tolist() for mask in masks), strict=True)]
        for i, time in enumerate(times):
            self.depth[time] += taken[i] if taken else 0
            if by_token:
                own = [None if isnan(score) else score for score in by_token[i]]
                _at(self.scores.setdefault(name, []), time).extend(own)

    def note_choice(self, name: str, times: Iterable[int], experts: Tensor) -> None:
        """One choice of experts [n, K] for some tokens."""
        for time, own in zip(times, experts.tolist(), strict=True):
            _at(self.experts.setdefault(name, []), time).append(own)


def _at(found: list[list[T]], time: int) -> list[T]:
    """What is known of the token at this time; those before it that are not known have nothing."""
    found.extend([] for _ in range(time + 1 - len(found)))
    return found[time]
