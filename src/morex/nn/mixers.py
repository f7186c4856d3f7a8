"""Feed-forward mixers: the channel part of a block."""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morex.nn import fast
from morex.nn.costs import Costs, Kept, linear_costs
from morex.nn.keys import KeyView
from morex.nn.linear import Linear, linear
from morex.nn.low_rank import Changes, changed
from morex.nn.packing import Packing
from morex.nn.signals import Reports


class ExpertViews(Protocol):
    """The cache slots of the experts of one step."""

    def expert(self, expert: int, step: int) -> KeyView | None:
        """The slot of one expert's step."""


class Mixer(Protocol):
    """The channel part of a block: a feed-forward net or an expert layer."""

    def __call__(
        self, x: Tensor, packing: Packing, views: ExpertViews | None, *, traces: bool = False
    ) -> tuple[Tensor, Reports]:
        """x [N, D] -> the branch's output [N, D], and what its routers report, with `traces` for the trace too."""


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x) (Shazeer 2020, eq. 6); x [N, D], weights as in `nn.Linear`."""
    # It keeps less for the backward pass; without one there is nothing to keep.
    if torch.is_grad_enabled() and fast.usable(x, gate, up, down):
        return fast.swiglu(x, gate, up, down)
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def geglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(gelu(gate x) * up x) (Shazeer 2020, eq. 6), gelu in its tanh form as in Gemma; shapes as for `swiglu`."""
    return linear(_gelu_tanh(linear(x, gate)) * linear(x, up), down)


GATED: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {"swiglu": swiglu, "geglu": geglu}
OF_GATE: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": _gelu_tanh}


class GatedFeedForward(nn.Module):
    """Feed-forward net with three matrices, `swiglu` or `geglu`."""

    def __init__(self, d_model: int, d_ff: int, kind: str) -> None:
        super().__init__()
        self.function, self.of_gate = GATED[kind], OF_GATE[kind]
        self.gate = Linear(d_model, d_ff, bias=False)
        self.up = Linear(d_model, d_ff, bias=False)
        self.down = Linear(d_ff, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        views: ExpertViews | None = None,
        changes: Changes | None = None,
        traces: bool = False,
    ) -> tuple[Tensor, Reports]:
        """x [N, D] -> [N, D]. `changes`: of the maps `gate`, `up` and `down` at this step."""
        if not changes:
            return self.function(x, self.gate.weight, self.up.weight, self.down.weight), {}
        hidden = self.of_gate(changed(self.gate, x, changes["gate"])) * changed(self.up, x, changes["up"])
        return changed(self.down, hidden, changes["down"]), {}


class FeedForward(nn.Module):
    """Feed-forward net with two matrices and `gelu` or `relu` between."""

    def __init__(self, d_model: int, d_ff: int, activation: str) -> None:
        super().__init__()
        self.up = Linear(d_model, d_ff, bias=False)
        self.down = Linear(d_ff, d_model, bias=False)
        self.activation = ACTIVATIONS[activation]

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        views: ExpertViews | None = None,
        changes: Changes | None = None,
        traces: bool = False,
    ) -> tuple[Tensor, Reports]:
        """x [N, D] -> [N, D]. `changes`: of the maps `up` and `down` at this step."""
        own = changes or {}
        return changed(self.down, self.activation(changed(self.up, x, own.get("up"))), own.get("down")), {}


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


def feed_forward_maps(kind: str, d_model: int, d_ff: int) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear maps of a feed-forward mixer, by name."""
    gate = {"gate": (d_model, d_ff)} if kind in GATED else {}
    return gate | {"up": (d_model, d_ff), "down": (d_ff, d_model)}


HIDDEN = {"swiglu": 4, "geglu": 4, "gelu": 2, "relu": 1}
"""Tensors of the hidden width that are kept by kind; the fast swiglu keeps two."""


def feed_forward_costs(kind: str, d_model: int, d_ff: int) -> Costs:
    """Closed-form costs of a feed-forward mixer; its input counts as kept where it is cast."""
    own = linear_costs(d_model, (2 if kind in GATED else 1) * d_ff) + linear_costs(d_ff, d_model)
    values, copies = HIDDEN[kind] * d_ff, (2 if kind in GATED else 1) * d_model
    cast = 2.0 * (values + copies)
    return own + Costs(kept=Kept(4.0 * values, cast, 4.0 * (2 * d_ff if kind == "swiglu" else values), cast))
