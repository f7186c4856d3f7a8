"""How far steps move states, for the trace: three numbers for each token and step, and no states."""

from collections.abc import Callable

import torch
from torch import Tensor


def move(before: Tensor, after: Tensor) -> Tensor:
    """From states [..., D] to those after a step [..., D]: [..., 3], in float32 or better.

    These are the norm before, the norm of the difference, and the cosine; that is NaN where one of the states is zero.
    """
    before, after = _wide(before), _wide(after)
    start, end = before.norm(dim=-1), after.norm(dim=-1)
    scale = start * end
    cosine = ((before * after).sum(-1) / scale).clamp(-1, 1).masked_fill(~(scale > 0), torch.nan)
    return torch.stack((start, (after - before).norm(dim=-1), cosine), -1)


class Watch:
    """Measures each step of an expert layer as it is made."""

    def __init__(self, state: Tensor, of_tokens: Callable[[Tensor], Tensor] | None = None) -> None:
        """Args:
        state: the first state [M, D].
        of_tokens: from states [M, D] to one vector for each token [N, ...]; default: they are that already.
        """
        self._of_tokens = of_tokens
        self._before = self._vectors(state)
        self._moves: list[Tensor] = []

    def see(self, state: Tensor) -> None:
        """Takes the state after the next step [M, D]."""
        after = self._vectors(state)
        self._moves.append(move(self._before, after))
        self._before = after

    @property
    def moves(self) -> Tensor:
        """Of all steps so far, as `move` gives them [N, S, 3]."""
        return torch.stack(self._moves, 1)

    def _vectors(self, state: Tensor) -> Tensor:
        state = state.detach()
        return state if self._of_tokens is None else self._of_tokens(state)


def _wide(x: Tensor) -> Tensor:
    """Norms of half-precision states are rounded too much."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
