"""Adds up decisions batch by batch: memory does not grow with the tokens that are looked at.

Shapes: B windows, T tokens, R recursions, E experts, C choices of an expert layer.
"""

import math
from dataclasses import dataclass

import numpy as np

from morex.analysis.records import (
    NO_DEPTHS,
    Agreement,
    CallReport,
    ClassDepth,
    DepthReport,
    GroupReport,
    LayerReport,
    Missing,
    Spread,
    StepReport,
)
from morex.analysis.scores import distribution_entropy, read_scores
from morex.analysis.trace import Array, Decisions, GroupDecisions, LayerDecisions, Moves
from morex.analysis.vocabulary import CLASSES, RARITIES
from morex.config import ModelConfig
from morex.sections.depth import GatedConfig
from morex.sections.mixers import FeedForwardConfig


@dataclass
class Moments:
    """Mean and spread of numbers that come in batches (Chan, Golub, LeVeque 1983)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Squared distances from the mean, summed."""

    def add(self, values: Array) -> None:
        """Adds numbers [N]."""
        if not len(values):
            return
        values = values.astype(np.float64)
        mean, count = float(values.mean()), self.count + len(values)
        apart = mean - self.mean
        self.squares += float(np.square(values - mean).sum()) + apart**2 * self.count * len(values) / count
        self.mean += apart * len(values) / count
        self.count = count

    def spread(self, why: str) -> Spread | Missing:
        """Mean and standard deviation, or `why` there is none."""
        if not self.count:
            return Missing(why)
        if not math.isfinite(self.mean):
            return Missing("a value is not finite")
        return Spread(self.mean, math.sqrt(max(0.0, self.squares) / self.count), self.count)


@dataclass
class MoveMoments:
    """Changes of the state, step by step."""

    change: list[Moments]
    cosine: list[Moments]

    @classmethod
    def of(cls, steps: int) -> "MoveMoments":
        return cls([Moments() for _ in range(steps)], [Moments() for _ in range(steps)])

    def add(self, moves: Moves, taken: Array) -> None:
        """Adds the steps that were taken [steps, B, T]."""
        change = moves.change
        for s, mask in enumerate(taken):
            self.change[s].add(present(change[s][mask]))
            self.cosine[s].add(present(moves.cosine[s][mask]))


def present(values: Array) -> Array:
    """Numbers [N] without NaN, which stands for tokens that have none."""
    return values[~np.isnan(values)]


class GroupTally:
    """One routed group."""

    def __init__(self, name: str, config: ModelConfig, recursions: int, policy: str) -> None:
        self.name, self.config, self.recursions, self.policy = name, config, recursions, policy
        self.tokens = 0
        self.active = np.zeros(recursions, np.int64)
        self.depths = np.zeros(recursions + 1, np.int64)
        self.entropy: list[Moments] = []
        self.gate = [Moments() for _ in range(recursions)]
        self.moves, self.last = MoveMoments.of(recursions), Moments()
        self.why, self.why_no_gate, self.limit, self.missing = "", "", math.log(2), dict[int, str]()

    def add(self, group: GroupDecisions, real: Array) -> None:
        self.tokens += int(real.sum())
        taken = group.active & real
        self.active += taken.sum(axis=(1, 2))
        self.depths += np.bincount(taken.sum(0)[real], minlength=len(self.depths))
        self.moves.add(group.moves, taken)
        path = group.moves.moved.sum(0)
        whole = taken.all(0) & (path > 0)
        self.last.add(group.moves.moved[-1][whole] / path[whole])
        reading = read_scores(group, self.config, self.policy)
        self.why, self.why_no_gate, self.limit = reading.why, reading.why_no_gate, reading.limit
        self.missing = reading.missing or {}
        if reading.entropy is not None:
            self.entropy = self.entropy or [Moments() for _ in reading.entropy]
            for moments, values in zip(self.entropy, reading.entropy, strict=True):
                moments.add(present(values[real]))
        if reading.gate is not None:
            for moments, values in zip(self.gate, reading.gate, strict=True):
                moments.add(present(values[real]))

    def report(self) -> GroupReport:
        nobody = "no token takes this recursion"
        depth = self.config.depth
        wanted = depth.shares(self.recursions) if isinstance(depth, GatedConfig) else None
        if wanted is not None and len(wanted) != self.recursions:
            wanted = None
        entropy: list[Spread | Missing] = [
            moments.spread(self.missing.get(r, "no token was a candidate"))
            for r, moments in enumerate(self.entropy, start=1)
        ]
        return GroupReport(
            name=self.name,
            tokens=self.tokens,
            active_share=tuple((self.active / max(1, self.tokens)).tolist()),
            depths=shares(self.depths) or (),
            wanted_share=wanted,
            entropy=tuple(entropy) or Missing(self.why),
            entropy_limit=self.limit,
            gate=Missing(self.why_no_gate) if self.why_no_gate else tuple(m.spread(nobody) for m in self.gate),
            change=tuple(m.spread(nobody) for m in self.moves.change),
            cosine=tuple(m.spread(nobody) for m in self.moves.cosine),
            last_share=self._last_share(),
        )

    def _last_share(self) -> Spread | Missing:
        if self.recursions == 1:
            return Missing("there is one recursion")
        return self.last.spread("no token takes every recursion")


class LayerTally:
    """One expert layer."""

    def __init__(self, name: str, layer: LayerDecisions, experts: int, steps: int) -> None:
        """Args:
        experts: E of the layer.
        steps: S that a token takes at most in an expert.
        """
        self.name, self.calls, self.experts = name, layer.calls, experts
        count = len(layer.calls)
        self.tokens = np.zeros(count, np.int64)
        self.load = np.zeros((count, experts), np.int64)
        self.entropy, self.confidence, self.weight = ([Moments() for _ in range(count)] for _ in range(3))
        self.own_entropy = None if layer.entropy is None else [Moments() for _ in range(count)]
        self.path = None if layer.moves is None else PathTally(int(layer.calls[:, 0].max()), len(layer.moves.moved))
        self.steps = [Moments() for _ in range(count)]
        self.by_steps = None if layer.steps is None else np.zeros((count, steps + 1), np.int64)

    def add(self, layer: LayerDecisions, real: Array) -> None:
        came = (layer.experts[..., 0] >= 0) & real
        for c, mask in enumerate(came):
            chosen = layer.experts[c][mask].astype(np.int64)
            probabilities, entropy = distribution_entropy(layer.logits[c][mask])
            weights = np.take_along_axis(probabilities, chosen, 1)
            if chosen.shape[1] > 1:
                weights = weights / np.maximum(weights.sum(1, keepdims=True), np.finfo(np.float64).tiny)
            self.tokens[c] += len(chosen)
            self.load[c] += np.bincount(chosen.ravel(), minlength=self.experts)
            self.entropy[c].add(entropy)
            self.confidence[c].add(probabilities.max(1) if len(chosen) else np.zeros(0))
            self.weight[c].add(weights.max(1) if len(chosen) else np.zeros(0))
            if self.by_steps is not None and layer.steps is not None:
                taken = layer.steps[c][mask].ravel()
                self.steps[c].add(taken)
                self.by_steps[c] += np.bincount(taken, minlength=self.by_steps.shape[1])
            if self.own_entropy is not None and layer.entropy is not None:
                self.own_entropy[c].add(present(layer.entropy[c][mask]))
        if self.path is not None and layer.moves is not None:
            self.path.add(layer.moves, real)

    def report(self) -> LayerReport:
        nobody = "no token came by"
        no_steps = Missing("no router decides steps inside experts")
        calls = []
        for c, (recursion, step) in enumerate(self.calls.tolist()):
            own_entropy = self.entropy if self.own_entropy is None else self.own_entropy
            calls.append(
                CallReport(
                    recursion=recursion,
                    step=step,
                    tokens=int(self.tokens[c]),
                    load=shares(self.load[c]),
                    entropy=self.entropy[c].spread(nobody),
                    own_entropy=own_entropy[c].spread(nobody),
                    confidence=self.confidence[c].spread(nobody),
                    weight=self.weight[c].spread(nobody),
                    steps=no_steps if self.by_steps is None else shares(self.by_steps[c]) or Missing(nobody),
                    mean_steps=no_steps if self.by_steps is None else self.steps[c].spread(nobody),
                )
            )
        stateless = Missing("the experts have no state in the trace")
        return LayerReport(
            name=self.name,
            experts=self.experts,
            load=shares(self.load.sum(0)),
            calls=tuple(calls),
            moves=stateless if self.path is None else self.path.steps_report(),
            last_share=stateless if self.path is None else self.path.last_report(),
        )


class PathTally:
    """The steps of an expert layer with a state that recurs."""

    def __init__(self, recursions: int, moves: int) -> None:
        """Args:
        recursions: R of the layer.
        moves: R S.
        """
        self.recursions, self.steps = recursions, moves // recursions
        self.moves, self.last = MoveMoments.of(moves), [Moments() for _ in range(recursions)]
        self.came = np.zeros(moves, np.int64)

    def add(self, moves: Moves, real: Array) -> None:
        """Adds the steps [R S, B, T] of real tokens that came by."""
        taken = ~np.isnan(moves.moved) & real
        self.came += taken.sum(axis=(1, 2))
        self.moves.add(moves, taken)
        for r, last in enumerate(self.last):
            own = moves.moved[r * self.steps : (r + 1) * self.steps]
            path = own.sum(0)
            whole = real & (path > 0)
            last.add(own[-1][whole] / path[whole])

    def steps_report(self) -> tuple[StepReport, ...]:
        """One entry for each step, recursion by recursion."""
        entries = []
        for place, (change, cosine) in enumerate(zip(self.moves.change, self.moves.cosine, strict=True)):
            r, s = divmod(place, self.steps)
            why = self._why(r, "the state before the step is zero, or not in the trace")
            entries.append(StepReport(r + 1, s + 1, change.spread(why), cosine.spread(why)))
        return tuple(entries)

    def last_report(self) -> tuple[Spread | Missing, ...]:
        """One entry for each recursion."""
        if self.steps == 1:
            return (Missing("the experts take one step"),) * self.recursions
        why = "the state does not move, or the first step is not in the trace"
        return tuple(last.spread(self._why(r, why)) for r, last in enumerate(self.last))

    def _why(self, recursion: int, otherwise: str) -> str:
        """Why there is no value at a recursion, from 0. The last step is in every trace that has any."""
        return otherwise if self.came[(recursion + 1) * self.steps - 1] else "no token came by"


def shares(counts: Array) -> tuple[float, ...] | None:
    """Counts as shares of their sum; None where that is zero."""
    return tuple((counts / counts.sum()).tolist()) if counts.sum() else None


class Tally:
    """Everything about a model's decisions."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.tokens = self.windows = 0
        self.groups: dict[str, GroupTally] = {}
        self.layers: dict[str, LayerTally] = {}
        self.histogram = np.zeros(1, np.int64)
        self.by_class, self.by_rarity, self.by_difficulty = (dict[int, Array]() for _ in range(3))

    def add(self, batch: Decisions) -> None:
        """Adds a batch."""
        real = batch.real
        if not self.tokens:
            self._begin(batch)
        self.tokens += int(real.sum())
        self.windows += len(real)
        depth = batch.depth[real]
        self.histogram += np.bincount(depth, minlength=len(self.histogram))
        difficulty = None
        if batch.difficulty is not None:
            difficulty = np.broadcast_to(batch.difficulty[:, None], real.shape)
        for counts, kinds in (
            (self.by_class, batch.token_class),
            (self.by_rarity, batch.token_rarity),
            (self.by_difficulty, difficulty),
        ):
            if kinds is not None:
                self._count(counts, kinds[real], depth)
        for name, group in batch.groups.items():
            self.groups[name].add(group, real)
        for name, layer in batch.layers.items():
            self.layers[name].add(layer, real)

    def _begin(self, batch: Decisions) -> None:
        config = self.config
        self.histogram = np.zeros(1 + sum(len(group.active) for group in batch.groups.values()), np.int64)
        self.groups = {
            name: GroupTally(name, config, len(group.active), batch.policy) for name, group in batch.groups.items()
        }
        if not isinstance(config.mixer, FeedForwardConfig):
            experts, steps = config.mixer.router.experts, getattr(config.mixer, "steps", 1)
            self.layers = {name: LayerTally(name, layer, experts, steps) for name, layer in batch.layers.items()}

    def _count(self, counts: dict[int, Array], kinds: Array, depth: Array) -> None:
        """Adds tokens [N] to the depths of their kinds [N]."""
        for kind in np.unique(kinds).tolist():
            found = np.bincount(depth[kinds == kind], minlength=len(self.histogram))
            counts[kind] = counts.get(kind, 0) + found

    def depth_report(self, routed: bool) -> DepthReport | Missing:
        """How deep tokens went; `routed` whether anything decides that."""
        if not routed:
            return NO_DEPTHS
        by_class, by_rarity, by_difficulty = (
            {kind: ClassDepth(int(row.sum()), _mean_depth(row), shares(row) or ()) for kind, row in sorted(one.items())}
            for one in (self.by_class, self.by_rarity, self.by_difficulty)
        )
        return DepthReport(
            deepest=len(self.histogram) - 1,
            mean=_mean_depth(self.histogram),
            histogram=tuple(self.histogram.tolist()),
            by_class={CLASSES[kind]: one for kind, one in by_class.items()}
            or Missing("the texts of the tokens are not known"),
            by_rarity={RARITIES[kind]: one for kind, one in by_rarity.items()}
            or Missing("the training set is not known"),
            by_difficulty=by_difficulty or Missing("a text has no difficulty; examples of a task have one"),
        )


def _mean_depth(histogram: Array) -> float:
    return float((np.arange(len(histogram)) * histogram).sum() / max(1, histogram.sum()))


class AgreementTally:
    """Who is active by the causal rule, and who by top-k: counts of both, either and neither."""

    def __init__(self) -> None:
        self.counts: dict[str, Array] = {}
        """[R, 4]: both, causal alone, oracle alone, neither."""

    def add(self, causal: Decisions, oracle: Decisions) -> None:
        """Adds a batch that both rules saw."""
        real = causal.real
        for name, group in causal.groups.items():
            ours, theirs = group.active, oracle.groups[name].active
            cells = (ours & theirs, ours & ~theirs, ~ours & theirs, ~ours & ~theirs)
            found = np.stack([(cell & real).sum(axis=(1, 2)) for cell in cells], 1)
            self.counts[name] = self.counts.get(name, np.zeros_like(found)) + found

    def report(self, name: str) -> tuple[Agreement, ...]:
        """One entry for each recursion."""
        entries = []
        for both, causal, oracle, neither in self.counts[name].tolist():
            entries.append(
                Agreement(
                    accuracy=(both + neither) / max(1, both + causal + oracle + neither),
                    precision=both / (both + causal) if both + causal else Missing("the causal rule takes no token"),
                    recall=both / (both + oracle) if both + oracle else Missing("top-k takes no token"),
                )
            )
        return tuple(entries)
