"""Depth at call time: what `depth=` of a forward call means.

Besides a router's own decision (None) and the oracle's, a caller can fix the depth of each token as a function of its
absolute position t: `uniform:N` gives N everywhere, `adaptive:span` gives 1 + floor((R - 1) min(1, t / span)), and
`progressive:span` gives R equal steps over the span.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Depth = int | str | None
EXAMPLES = "an integer, 'uniform:N', 'adaptive', 'adaptive:SPAN', 'progressive', 'progressive:SPAN' or 'oracle'"


@dataclass(frozen=True)
class DepthPolicy:
    """A parsed `depth=`; `kind` 'router' leaves the decision to the router."""

    kind: Literal["router", "oracle", "uniform", "adaptive", "progressive"] = "router"
    recursions: int = 1
    """Recursions that are run at most."""
    span: int = 1
    """Positions over which `adaptive` and `progressive` go from 1 to R."""

    @property
    def is_forced(self) -> bool:
        """Whether the caller decides, and not the router."""
        return self.kind in ("uniform", "adaptive", "progressive")

    def depths(self, position: Tensor) -> Tensor:
        """Recursions of each token [N] from its position [N]."""
        reach = self.recursions - 1
        if self.kind == "uniform":
            return torch.full_like(position, self.recursions)
        if self.kind == "adaptive":
            return 1 + reach * position.clamp(max=self.span) // self.span
        return 1 + (self.recursions * position // self.span).clamp(max=reach)


def parse_depth(depth: Depth, recursions: int, span: int, any_depth: bool) -> DepthPolicy:
    """Reads `depth=`.

    Args:
        depth: None, an integer N (the same as `uniform:N`), or a policy by name.
        recursions: R of the model.
        span: default span of the position-based policies.
        any_depth: whether more than R recursions make sense.

    Raises:
        ValueError: it is none of these, or N is out of range.
    """
    if depth is None:
        return DepthPolicy("router", recursions)
    name, _, argument = str(depth).partition(":")
    if name.isdigit() and not argument:
        name, argument = "uniform", name
    if name == "oracle" and not argument:
        return DepthPolicy("oracle", recursions)
    if name == "uniform" and argument.isdigit():
        wanted = int(argument)
        if wanted < 1 or (wanted > recursions and not any_depth):
            limit = "1 or more" if any_depth else f"1 to {recursions}" if recursions > 1 else "1 alone, having no more"
            raise ValueError(f"depth {depth!r} asks for {wanted} recursions; this model takes {limit}")
        return DepthPolicy("uniform", wanted)
    if name in ("adaptive", "progressive") and (not argument or (argument.isdigit() and int(argument) > 0)):
        kind: Literal["adaptive", "progressive"] = "adaptive" if name == "adaptive" else "progressive"
        return DepthPolicy(kind, recursions, int(argument or span))
    raise ValueError(f"depth {depth!r} is not understood; use {EXAMPLES}")
