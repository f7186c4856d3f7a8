"""What routers report beside their output. Nothing here is written to a module during a forward pass."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

STEP_ROUTER = "mixer.depth"
"""End of the path of a depth router that decides about the steps inside experts."""


def loss_name(path: str, name: str) -> str:
    """Name in the model's losses of what the router at `path` calls `name`: steps inside experts stand apart."""
    return f"step_{name}" if path.endswith(STEP_ROUTER) else name


@dataclass(frozen=True)
class Choice:
    """One choice of experts for N tokens, for the trace."""

    experts: Tensor
    """[N, K]."""
    logits: Tensor
    """[N, E], on which the choice was made."""
    state: Tensor | None = None
    """What the experts made of the tokens [N, D], where the layer chooses again on it; for a trace alone."""
    steps: Tensor | None = None
    """Steps that each token took in each of its experts [N, K], where a depth router decides."""
    moves: Tensor | None = None
    """How far each step after this choice moved the state, as `morex.nn.moves.move` gives it [N, S, 3], where the layer
    has a state; for a trace alone."""
    entropy: Tensor | None = None
    """Entropy of the router in nats [N] before a floor raised it, where there may be one; for a trace alone."""

    def each(self, change: Callable[[Tensor, float], Tensor]) -> "Choice":
        """This choice with every tensor changed; the function also gets what stands for a token that is not there."""
        missing = {name: math.nan if x.is_floating_point() else -1 for name, x in vars(self).items() if x is not None}
        return Choice(**{name: change(getattr(self, name), value) for name, value in missing.items()})


@dataclass(frozen=True)
class Exits:
    """Where tokens may leave the recursions, for a loss over all exits."""

    states: list[Tensor]
    """State after each of the R recursions [N, D]."""
    log_probabilities: Tensor
    """ln of the probability of each exit [N, R]."""
    taken: Tensor
    """Exit that inference takes, from 0 [N]."""


@dataclass
class Signals:
    """One router's report on one call: raw auxiliary losses, statistics that add up, and decisions for the trace."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalars by name; the weights stand in the router's `loss_weights`."""
    stats: dict[str, Tensor] = field(default_factory=dict)
    """Statistics; fields that begin with `samples` are lists of values, all others are sums."""
    choices: list[Choice] = field(default_factory=list)
    """Choices of experts, in their order."""
    exits: Exits | None = None

    @staticmethod
    def join(reports: "Sequence[Signals]") -> "Signals":
        """The reports of a router that was asked several times in one call: means of losses, sums of statistics."""
        stats = RouterStats()
        for report in reports:
            stats.include("", report.stats)
        losses = {name: torch.stack([one.losses[name] for one in reports]).mean() for name in reports[0].losses}
        return Signals(losses, stats[""], [choice for one in reports for choice in one.choices])


Reports = dict[str, Signals]
"""What the routers of a mixer report, by their name in it; empty without routers."""


class RouterStats(dict[str, dict[str, Tensor]]):
    """Statistics of all routers, by module path; `a + b` joins microbatches, recursions and ranks."""

    def __add__(self, other: "RouterStats") -> "RouterStats":
        joined = RouterStats({name: dict(fields) for name, fields in self.items()})
        for name, fields in other.items():
            joined.include(name, fields)
        return joined

    @property
    def active_shares(self) -> tuple[float, ...] | None:
        """Share of the tokens active at recursion r = 1..R, the mean over depth routers; None without any."""
        return self._shares(of_steps=False)

    @property
    def step_shares(self) -> tuple[float, ...] | None:
        """Share of an expert's tokens that takes step s = 1..S, the mean over layers; None where all take all."""
        return self._shares(of_steps=True)

    def _shares(self, of_steps: bool) -> tuple[float, ...] | None:
        shares = [
            fields["active"].double().cpu() / max(int(fields["tokens"]), 1)
            for name, fields in self.items()
            if "active" in fields and name.endswith(STEP_ROUTER) == of_steps
        ]
        return tuple(torch.stack(shares).mean(0).tolist()) if shares else None

    def include(self, name: str, fields: dict[str, Tensor]) -> None:
        """Adds one router's statistics in place."""
        known = self.setdefault(name, {})
        for key, value in fields.items():
            if key not in known:
                known[key] = value
            elif key.startswith("samples"):
                known[key] = torch.cat((known[key], value))
            else:
                known[key] = known[key] + value
