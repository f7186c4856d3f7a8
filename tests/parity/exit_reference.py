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
