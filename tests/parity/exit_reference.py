"""Models that may leave early, in the plain reference: one token at a time, nothing of morex imported."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parity.formulas import sigmoid, softmax
from parity.reference import Reference, States


@dataclass
class Exit:
    """What one token of a training pass did."""

    probabilities: list[float]
    """p_r of each recursion."""
    states: list[Tensor]
    """h_r of each recursion."""
    taken: int
    """Recursion, from 1, after which the rule lets it go."""


class ExitReference(Reference):
    """`exit_gate`: `exits` holds what the tokens of the last sequence did."""

    exits: dict[int, Exit]
    threshold: float | None = None
    """Threshold at call time."""

    def group(self, index: int, blocks: list[int], states: States) -> States:
        self.inputs[index] = states
        self.exits = {t: Exit([], [], 0) for t in states}
        running, result = dict(states), dict(states)
        left = dict.fromkeys(states, 1.0)
        kept: dict[int, States] = {}
        for recursion in range(1, self.recursions + 1):
            running = self.pass_core(index, blocks, recursion, running, kept) if running else {}
            for t, state in list(running.items()):
                seen = self.exits[t]
                gate = 1.0 if recursion == self.recursions else sigmoid(self.halting_logit(index, state))
                seen.probabilities.append(gate * left[t])
                seen.states.append(state)
                left[t] *= 1 - gate
                if not seen.taken and sum(seen.probabilities) >= self.border(recursion):
                    seen.taken, result[t] = recursion, state
                if seen.taken and not self.training:
                    del running[t]
        return result

    def border(self, recursion: int) -> float:
        """What the probabilities must sum to; at the last recursion all leave."""
        if recursion == self.recursions:
            return 0.0
        return float(self.threshold or self.config["depth"]["threshold"])

    def expected_loss(self, rows: Sequence[Sequence[int]]) -> tuple[float, float]:
        """Mean over predicted tokens of sum_r p_r CE_r, and of the entropy of p."""
        losses, entropies = [], []
        head = self.weights.get("head.weight", self.weights["embedding.weight"])
        for row in rows:
            self.logits(row)
            for t, seen in list(self.exits.items())[:-1]:
                loss = 0.0
                for p, state in zip(seen.probabilities, seen.states, strict=True):
                    likely = softmax((head @ self.norm("norm", state)).tolist())
                    loss -= p * math.log(likely[row[t + 1]])
                losses.append(loss)
                entropies.append(-sum(p * math.log(p) for p in seen.probabilities if p > 0))
        return sum(losses) / len(losses), sum(entropies) / len(entropies)


def stacked(exits: dict[int, Exit]) -> Tensor:
    """Recursions after which tokens leave [T]."""
    return torch.tensor([seen.taken for seen in exits.values()])


class RuleReference(Reference):
    """A model whose tokens leave by a rule at call time; `taken` holds the recursions of the last sequence."""

    rule: str
    threshold: float
    taken: dict[int, int]

    def group(self, index: int, blocks: list[int], states: States) -> States:
        self.inputs[index] = states
        running, result = dict(states), {}
        if self.config["depth"].get("state") == "random":
            running = {t: torch.zeros_like(x) for t, x in states.items()}
        self.taken, seen = {}, {}
        stable = dict.fromkeys(states, 0)
        kept: dict[int, States] = {}
        for recursion in range(1, self.recursions + 1):
            after = self.pass_core(index, blocks, recursion, running, kept) if running else {}
            before, running = running, {}
            for t, state in after.items():
                now = self.peek(t, state)
                change = self.change(before[t], state, seen.get(t), now)
                stable[t] = stable[t] + 1 if t in seen and best_of(seen[t]) == best_of(now) else 0
                leaves = stable[t] >= self.threshold if self.rule == "argmax" else change < self.threshold
                seen[t] = now
                if leaves or recursion == self.recursions:
                    result[t], self.taken[t] = state, recursion
                else:
                    running[t] = state
        return result

    def peek(self, t: int, state: Tensor) -> list[float]:
        """The distribution that a token alone would end with."""
        states, first = {t: state}, self.prelude + self.core
        for block in range(first, first + self.coda):
            states, _ = self.block(block, block + (self.recursions - 1) * self.core, states)
        head = self.weights.get("head.weight", self.weights["embedding.weight"])
        return softmax((head @ self.norm("norm", states[t])).tolist())

    def change(self, before: Tensor, after: Tensor, seen: list[float] | None, now: list[float]) -> float:
        if self.rule == "latent":
            return length(after - before) / length(after)
        if self.rule == "cosine":
            product = length(after) * length(before)
            return 1 - float(after @ before) / product if product else 1.0
        if seen is None:
            return math.inf
        if self.rule == "entropy":
            return abs(sum(p * math.log(p) for p in now) - sum(p * math.log(p) for p in seen))
        return sum(p * math.log(p / q) for p, q in zip(now, seen, strict=True))


def best_of(probabilities: list[float]) -> int:
    return probabilities.index(max(probabilities))


def length(x: Tensor) -> float:
    return math.sqrt(float(x @ x))
