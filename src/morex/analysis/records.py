"""What an analysis finds, as typed records that become `analysis.json`.

A quantity that cannot be computed is a `Missing` with the reason, never a zero or NaN. Entropies are in nats, shares
between 0 and 1, states in no unit. Entry r - 1 of a list over recursions is recursion r.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Missing:
    """A quantity that cannot be computed here."""

    missing: str
    """Why."""


NO_DEPTHS = Missing("every token takes every recursion; no router decides depth")


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over tokens."""

    mean: float
    std: float
    count: int
    """Tokens that it was taken over."""


Found = Spread | Missing


@dataclass(frozen=True)
class GroupReport:
    """One routed group."""

    name: str
    tokens: int
    active_share: tuple[float, ...]
    """Share of the tokens that takes recursion r."""
    depths: tuple[float, ...]
    """Share of the tokens that takes 0, 1, ... R recursions here."""
    wanted_share: tuple[float, ...] | None
    """Capacities, for routers that have them."""
    entropy: tuple[Found, ...] | Missing
    """Of each decision: one for each recursion, or a single one over all depths."""
    entropy_limit: float
    """Largest possible entropy: ln 2 for a yes or no, ln R for a choice of depth."""
    gate: tuple[Found, ...] | Missing
    """Weight with which recursion r enters, over the tokens that it enters."""
    change: tuple[Found, ...]
    """Difference that recursion r makes to the state over the state before it, for active tokens."""
    cosine: tuple[Found, ...]
    """Cosine between the states before and after."""
    last_share: Found
    """The last recursion's difference over the sum of all differences, for tokens that take every recursion."""


@dataclass(frozen=True)
class CallReport:
    """One choice of an expert layer, at one recursion and one step."""

    recursion: int
    step: int
    tokens: int
    load: tuple[float, ...] | None
    """Share of the assignments of each expert; None where no token came by."""
    entropy: Found
    """As the choice was made."""
    own_entropy: Found
    """Before an entropy floor raised it; the same where there is none."""
    confidence: Found
    """Largest probability."""
    weight: Found
    """Weight of the expert that counts most."""
    steps: tuple[float, ...] | Missing
    """Share of the assignments that takes 0, 1, ... steps in the expert."""
    mean_steps: Found


@dataclass(frozen=True)
class StepReport:
    """One step of an expert layer with a state that recurs, at one recursion."""

    recursion: int
    step: int
    change: Found
    """Difference that the step makes to the state over the state before it."""
    cosine: Found
    """Cosine between the states before and after."""


@dataclass(frozen=True)
class LayerReport:
    """One expert layer."""

    name: str
    experts: int
    load: tuple[float, ...] | None
    """Over all its choices."""
    calls: tuple[CallReport, ...]
    moves: tuple[StepReport, ...] | Missing
    last_share: tuple[Found, ...] | Missing
    """At each recursion, the last step's difference over the sum of all differences."""


@dataclass(frozen=True)
class ClassDepth:
    """How deep the tokens of one class went."""

    tokens: int
    mean: float
    shares: tuple[float, ...]
    """Share of them at 0, 1, ... recursions."""


@dataclass(frozen=True)
class DepthReport:
    """How deep tokens went, summed over routed groups."""

    deepest: int
    mean: float
    histogram: tuple[int, ...]
    """Tokens that took 0, 1, ... recursions."""
    by_class: dict[str, ClassDepth] | Missing
    by_rarity: dict[str, ClassDepth] | Missing
    by_difficulty: dict[int, ClassDepth] | Missing
    """By the difficulty of the example that a token is in."""


@dataclass(frozen=True)
class Agreement:
    """Active sets of one recursion, the causal rule's against top-k's."""

    accuracy: float
    """Share of the tokens on which both rules agree."""
    precision: float | Missing
    """Share of the causal rule's active tokens that top-k takes too."""
    recall: float | Missing
    """Share of top-k's active tokens that the causal rule takes too."""


@dataclass(frozen=True)
class LossReport:
    """Held-out loss of what was looked at, in nats per predicted token, or per class of a classifier."""

    loss: float
    oracle_loss: float | None
    by_depth: dict[int, float] | Missing
    """Loss with every token at r = 1..R recursions."""
    by_steps: dict[int, float] | Missing
    """Loss with experts of one step less and of all steps."""


@dataclass(frozen=True)
class AccuracyReport:
    """Share of the answers to the examples that were looked at which are right from the first token to the last."""

    examples: int
    accuracy: float
    oracle_accuracy: float | None
    by_depth: dict[int, float] | Missing
    """Accuracy with every token at r = 1..R recursions."""
    by_difficulty: dict[int, float]


@dataclass(frozen=True)
class Drift:
    """Routing over the training, from the lines that the run logged; a series for each router."""

    steps: tuple[int, ...]
    mean_depth: dict[str, tuple[float, ...]]
    """Recursions that a token of the batch took, or that an exit gate expects it to."""
    mean_steps: dict[str, tuple[float, ...]]
    """Steps that a token of the batch took in an expert."""
    load_cv: dict[str, tuple[float, ...]]
    effective_experts: dict[str, tuple[float, ...]]
    entropy_share: dict[str, tuple[float, ...]]
    """Entropy over the largest possible."""


Status = Literal["ok", "warn", "info", "none"]


@dataclass(frozen=True)
class Health:
    """One quantity, judged."""

    quantity: str
    status: Status
    """`ok` and `warn`: inside and outside the range; `info`: there is none; `none`: there is no value."""
    text: str
    """A sentence for people, with the value that is worst."""
    value: float | None = None
    """The worst value; for `info` the largest."""
    reason: str | None = None
    """Why there is no value."""
    where: str | None = None
    """Router, recursion or class that it belongs to."""
    low: float | None = None
    high: float | None = None
    outside: int = 0
    """Places whose value is outside the range."""
    places: int = 0
    """Places that have a value."""


@dataclass(frozen=True)
class Analysis:
    """All of it."""

    source: str
    """Run folder, checkpoint folder or trace file."""
    step: int | None
    """Optimizer step of the checkpoint."""
    tokens: int
    windows: int
    policy: str
    """Who decided the depth."""
    model: dict[str, Any]
    """The model's config."""
    groups: tuple[GroupReport, ...]
    layers: tuple[LayerReport, ...]
    depth: DepthReport | Missing
    agreement: dict[str, tuple[Agreement, ...]] | Missing
    losses: LossReport | Missing
    accuracy: AccuracyReport | Missing
    drift: Drift | Missing
    health: tuple[Health, ...] = field(default=())

    def group(self, name: str) -> GroupReport:
        return next(group for group in self.groups if group.name == name)

    def layer(self, name: str) -> LayerReport:
        return next(layer for layer in self.layers if layer.name == name)
