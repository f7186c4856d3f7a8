"""What every depth router is: it decides which tokens take recursion r of one routed group, and merges what comes back.

The stack drives a router through one forward pass like this:

    h, routing = router.begin(h, packing, policy)
    for r = 1..R:
        visit = router.visit(h, routing, r)       # who goes, and their tokens: ask, packed
        y = core(visit's tokens)
        h = router.bring_back(h, y, routing, visit)
    h, signals = router.finish(h, routing)

`h` holds all N tokens of the group as flat rows [N, D]; a visit packs the active ones. Routers write no buffer in a
forward pass: they return statistics, and `update` moves biases, thresholds and warm-ups after an optimizer step.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morex.depth.policy import DepthPolicy
from morex.nn import ranks
from morex.nn.costs import Costs
from morex.nn.packing import Packing
from morex.nn.signals import Signals

ScoreKind = Literal["logits", "halting", "exits", "depths"] | None
"""`logits`: of going on at recursion r; `halting`, `exits`: probability of stopping after it, that adds up or that is
asked of those who are left; `depths`: score of the depth r, one decision for all; None: there are none."""


@dataclass
class Visit:
    """The active tokens of one recursion."""

    recursion: int
    packing: Packing
    gate: Tensor | float | None = None
    """g of each active token [M], or one for all, where the router gates this recursion."""
    is_dummy: bool = False
    """True: nobody is active, and one token passes with weight 0 so that no gradient is missing."""


@dataclass
class Routing:
    """One forward pass of one group, as its router keeps it."""

    packing: Packing
    """All N tokens of the group."""
    policy: DepthPolicy
    active: Tensor
    """Tokens active at the last recursion [N]; all of them before the first."""
    depths: Tensor | None = None
    """Recursions of each token [N], where they are decided beforehand."""
    start: Tensor | None = None
    """The group's input [N, D], where the router needs it again."""
    gates: Tensor | None = None
    peek: Callable[[Tensor, Packing], Tensor] | None = None
    """Next-token logits [M, V] that the states [M, D] of a packing's tokens would give now, each token by itself."""
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    masks: list[Tensor] = field(default_factory=list)
    """Active tokens of each recursion [N]."""
    scores: list[Tensor] = field(default_factory=list)
    """Scores of each recursion [N], NaN for tokens that were no candidates."""

    is_full: bool = True
    """Whether all tokens are known to be active at the last recursion."""
    with_stats: bool = True
    """Whether anybody asks for statistics."""

    def add_loss(self, name: str, value: Tensor) -> None:
        self.losses.setdefault(name, []).append(value)

    def forget(self) -> None:
        """Drops masks and scores of the recursions so far, which only traces and statistics need."""
        self.masks, self.scores = [], []

    def select(self, index: Tensor, packing: Packing) -> Self:
        """What is kept of the tokens at `index` [N'], those of `packing`; what was counted stays behind."""

        def chosen(value: Any) -> Any:
            if isinstance(value, list):
                return [part[index] for part in value]
            return value[index] if _is_per_token(value) else value

        own = object.__new__(type(self))  # `replace` would ask all fields again
        own.__dict__.update(self.__dict__, packing=packing, losses={}, stats={})
        for name in self._of_tokens():
            value = getattr(self, name)
            if value is not None:
                setattr(own, name, chosen(value))
        return own

    @classmethod
    def join(cls, parts: "Sequence[Self]", packing: Packing) -> Self:
        """What is kept of the tokens of several passes, which are at the same recursion under the same policy."""

        def joined(values: list[Any]) -> Any:
            if isinstance(values[0], list):
                return [torch.cat(part) for part in zip(*values, strict=True)]
            assert len({value is None for value in values}) == 1, "passes at the same recursion know the same"
            return torch.cat(values) if _is_per_token(values[0]) else values[0]

        kept = {name: joined([getattr(part, name) for part in parts]) for name in parts[0]._of_tokens()}
        is_full = all(part.is_full for part in parts)
        return replace(parts[0], packing=packing, losses={}, stats={}, is_full=is_full, **kept)

    def _of_tokens(self) -> list[str]:
        """The fields that hold something for each token, or nothing yet."""
        kind = type(self)
        if kind not in _OF_TOKENS:
            others = {"packing", "policy", "losses", "stats", "peek", "is_full", "with_stats"}
            _OF_TOKENS[kind] = [field.name for field in fields(self) if field.name not in others]
        return _OF_TOKENS[kind]


_OF_TOKENS: dict[type[Routing], list[str]] = {}
"""What `Routing._of_tokens` has found."""


class DepthRouter(nn.Module):
    """Base: no decision of its own, depths may be forced by the caller."""

    any_depth = False
    """Whether the group can recur more often than in training."""
    exit_rules: tuple[str, ...] = ()
    """Rules by which tokens can leave at call time (`depth="exit:..."`)."""
    reads_every_state = False
    """Whether the loss of training reads norm and head on the state of every recursion."""
    is_causal = True
    """Whether eval mode has a rule that sees no later token."""
    is_nested = True
    """Whether a token that takes no recursion r takes none after it."""
    warmth: Tensor
    """Share of the losses in `warming` that counts, [1], where there are any."""
    warming: tuple[str, ...] = ()
    scores_are: ClassVar[ScoreKind] = None
    """What `Routing.scores` mean, for those who read them in a trace."""

    def __init__(self, d_model: int, recursions: int) -> None:
        """Args:
        d_model: width D of the hidden states.
        recursions: R.
        """
        super().__init__()
        self.recursions = recursions
        self.loss_weights: dict[str, float] = {}

    def takes_all(self, policy: DepthPolicy) -> bool:
        """Whether every token takes every recursion, known before any is run."""
        return policy.kind == "uniform"

    def settle(self, policy: DepthPolicy) -> DepthPolicy:
        """The policy of a forward pass, after what is drawn once a pass has been drawn; all ranks recur as often."""
        if policy.kind == "rows" and ranks.num_ranks() > 1:
            return replace(policy, recursions=ranks.largest(policy.recursions))
        return policy

    def gradient(self, policy: DepthPolicy, r: int) -> AbstractContextManager[None]:
        """Around recursion r: whether gradients go through it."""
        return nullcontext()

    def begin(self, h: Tensor, packing: Packing, policy: DepthPolicy) -> tuple[Tensor, Routing]:
        """Starts a forward pass over the group's input h [N, D]."""
        routing = Routing(packing, policy, torch.ones(h.shape[0], dtype=torch.bool, device=h.device))
        if policy.is_forced and policy.kind != "uniform":
            routing.depths = policy.depths(packing.positions, packing.row)
        return h, routing

    def visit(self, h: Tensor, routing: Routing, r: int) -> Visit | None:
        """The tokens that take recursion r, or None if nobody does and neither a gradient nor another rank needs it."""
        self.ask(h, routing, r)
        return self.packed(h, routing, r)

    def ask(self, h: Tensor, routing: Routing, r: int) -> None:
        """Decides which tokens take recursion r; `routing.active` says it."""
        active = self.decide(h, routing, r)
        if active is not None:
            routing.active = active
        elif not routing.is_full:
            routing.active = torch.ones_like(routing.active)
        routing.is_full = active is None
        routing.masks.append(routing.active)

    def packed(self, h: Tensor, routing: Routing, r: int) -> Visit | None:
        """The visit of those who take recursion r, after `ask`."""
        if routing.is_full:
            return Visit(r, routing.packing.root())
        index = routing.active.nonzero().squeeze(1)
        if index.shape[0]:
            return Visit(r, routing.packing.root().select(index))
        has_gradient = self.training and torch.is_grad_enabled()
        if not (has_gradient or ranks.num_ranks() > 1) or not h.shape[0]:
            return None
        stand_in = replace(routing.packing.root().select(index.new_zeros(1)), is_dummy=True)
        return Visit(r, stand_in, is_dummy=True)

    def decide(self, h: Tensor, routing: Routing, r: int) -> Tensor | None:
        """Active tokens of recursion r [N], or None for all."""
        return None if routing.depths is None else routing.depths >= r

    def bring_back(self, h: Tensor, y: Tensor, routing: Routing, visit: Visit) -> Tensor:
        """`merge`, or for a dummy visit h as it was, with a gradient of zero into everything that ran."""
        if visit.is_dummy:
            return h + 0.0 * (y.sum() * visit.gate.sum() if isinstance(visit.gate, Tensor) else y.sum())
        return self.merge(h, y, routing, visit)

    def merge(self, h: Tensor, y: Tensor, routing: Routing, visit: Visit) -> Tensor:
        """Brings the core's output y [M, D] for the visiting tokens back into h [N, D]."""
        return put_rows(h, visit.packing.index, y)

    def finish(self, h: Tensor, routing: Routing) -> tuple[Tensor, Signals]:
        """Ends the pass: the group's output and the router's report."""
        if not routing.with_stats:
            return h, Signals()
        counts = [mask.sum() for mask in routing.masks]
        counts += [routing.active.new_zeros((), dtype=torch.int64)] * (self.recursions - len(counts))
        tokens = torch.tensor(h.shape[0], device=h.device)
        stats = {"active": torch.stack(counts[: self.recursions]), "tokens": tokens, **routing.stats}
        losses = {name: torch.stack(values).mean() for name, values in routing.losses.items()}
        return h, Signals(losses, stats)

    @torch.no_grad()
    def update(self, stats: dict[str, Tensor], step: int) -> None:
        """Moves biases, thresholds and warm-ups after optimizer step `step` (counted from 1)."""

    @staticmethod
    def shares(recursions: int, **options: Any) -> tuple[float, ...]:
        """Expected share of the tokens that takes recursion r = 1..R, from the constructor's options.

        A router whose shares only its input decides takes all recursions here: an upper bound, which training and
        `bench` replace by the shares that they measure.
        """
        return (1.0,) * recursions

    @staticmethod
    def train_visits(taken: int | None, recursions: int, **options: Any) -> tuple[float, float] | None:
        """Recursions of a token in training, and those of them with a gradient, on average.

        None where these are the ones of inference, all with a gradient.

        Args:
            taken: recursions that were run, where it is known.
            options: of the constructor.
        """
        return None

    @staticmethod
    def costs(
        d_model: int, recursions: int, taken: int | None = None, *, shares: tuple[float, ...] = (), **options: Any
    ) -> Costs:
        """Closed-form costs of the router itself, for all recursions together.

        Args:
            taken: recursions that are run where the caller fixes the depth.
            shares: share of the tokens active at each recursion that is run.
            options: of the constructor.
        """
        return Costs()


class ScoreNet(nn.Module):
    """Scores of hidden states in full precision: one linear map, or two with GELU between (arXiv 2507.10524, G.1)."""

    def __init__(self, d_model: int, outputs: int, kind: str) -> None:
        super().__init__()
        width = d_model
        if kind == "mlp":
            width = 2 * d_model
            self.hidden = nn.Parameter(torch.empty(width, d_model))
        self.weight = nn.Parameter(torch.empty(outputs, width))
        self.kind = kind

    def forward(self, h: Tensor) -> Tensor:
        """h [N, D] -> scores [N, outputs], never in half precision: a rule at zero must not flip with the dtype."""
        with torch.autocast(h.device.type, enabled=False):
            x = h.to(self.weight.dtype)
            if self.kind == "mlp":
                x = F.gelu(F.linear(x, self.hidden))
            return F.linear(x, self.weight)


def _is_per_token(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def score_costs(d_model: int, outputs: int, kind: str) -> Costs:
    """Closed-form costs of a `ScoreNet`."""
    weights = d_model * outputs if kind == "linear" else 2 * d_model * (d_model + outputs)
    return Costs(weights, 2.0 * weights)


def replace_rows(h: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """h [N, D] with the rows at `index` [M] replaced by `rows` [M, D]."""
    return h.index_copy(0, index, rows.to(h.dtype))


def put_rows(h: Tensor, index: Tensor | None, rows: Tensor) -> Tensor:
    """`replace_rows`, or all rows where there is no index."""
    return rows if index is None else replace_rows(h, index, rows)


def add_rows(h: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """h [N, D] with `rows` [M, D] added at `index` [M]."""
    return h.index_add(0, index, rows.to(h.dtype))
