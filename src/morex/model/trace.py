"""What every token did in one forward pass. Shapes: B batch, T tokens, D width, E experts, K chosen, R recursions."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from morex.nn.signals import Choice


@dataclass
class GroupTrace:
    """What one routed group did: entry r - 1 of each list is recursion r, in the frame of the batch [B, T]."""

    active: list[Tensor]
    """Tokens that took the recursion, bool."""
    scores: list[Tensor]
    """Scores of the candidates, NaN elsewhere; empty for routers that score nothing."""
    states: list[Tensor]
    """Hidden states after the recursion [B, T, D]."""
    start: Tensor
    """Hidden states before recursion 1 [B, T, D]."""


@dataclass
class Trace:
    """What every token did in one forward pass."""

    depth: Tensor
    """Recursions that each token took, summed over routed groups [B, T]; 0 for padding."""
    groups: dict[str, GroupTrace]
    """Active tokens, scores and states of each routed group, by module path."""
    choices: dict[str, list[Choice]]
    """Choices of experts in the order in which a layer made them, by module path of its router. A layer in the core
    makes one at every recursion that somebody takes, and one at each of its steps where it chooses again at every step.
    """
    num_experts: int = 0
    """Experts E of a layer; 0 without expert layers."""

    @property
    def active(self) -> dict[str, list[Tensor]]:
        """Tokens active at recursion r [B, T], bool, by group."""
        return {name: group.active for name, group in self.groups.items()}

    @property
    def scores(self) -> dict[str, list[Tensor]]:
        """Scores at recursion r [B, T], NaN where a token was no candidate, by group."""
        return {name: group.scores for name, group in self.groups.items()}

    @property
    def states(self) -> dict[str, list[Tensor]]:
        """Hidden states after recursion r [B, T, D], by group."""
        return {name: group.states for name, group in self.groups.items()}

    @property
    def experts(self) -> dict[str, list[Tensor]]:
        """Experts chosen in each choice of an expert layer [B, T, K]; -1 where a token did not come by."""
        return {name: [choice.experts for choice in choices] for name, choices in self.choices.items()}

    @property
    def expert_logits(self) -> dict[str, list[Tensor]]:
        """Logits of each choice of an expert layer [B, T, E]; NaN where a token did not come by."""
        return {name: [choice.logits for choice in choices] for name, choices in self.choices.items()}

    @property
    def expert_states(self) -> dict[str, list[Tensor]]:
        """States after each step of the layers that choose again at every step [B, T, D]; NaN likewise."""
        return {
            name: [choice.state for choice in choices if choice.state is not None]
            for name, choices in self.choices.items()
        }

    @property
    def expert_steps(self) -> dict[str, list[Tensor]]:
        """Steps that a token took in each of its experts [B, T, K], where a depth router decides; -1 likewise."""
        return {
            name: [choice.steps for choice in choices if choice.steps is not None]
            for name, choices in self.choices.items()
        }

    @property
    def loads(self) -> dict[str, list[Tensor]]:
        """Tokens that came to each expert in each choice [E], by expert layer."""
        return {
            name: [torch.bincount(chosen[chosen >= 0], minlength=self.num_experts) for chosen in calls]
            for name, calls in self.experts.items()
        }


def full_trace(
    groups: dict[str, GroupTrace], choices: dict[str, list[Choice]], tokens: Tensor, num_experts: int
) -> Trace:
    """The trace of a pass, in the frame of its tokens [B, T]: that of the packing is as wide as the longest row."""

    def widen(frame: Tensor, value: float) -> Tensor:
        missing = tokens.shape[1] - frame.shape[1]
        return frame if missing == 0 else F.pad(frame, (0, 0) * (frame.dim() - 2) + (0, missing), value=value)

    wide = {
        name: GroupTrace(
            [widen(mask, 0) for mask in group.active],
            [widen(score, torch.nan) for score in group.scores],
            [widen(state, 0) for state in group.states],
            widen(group.start, 0),
        )
        for name, group in groups.items()
    }
    made = {name: [choice.each(widen) for choice in found] for name, found in choices.items()}
    active = [mask for group in wide.values() for mask in group.active]
    depth = torch.stack(active).sum(0) if active else torch.zeros_like(tokens)
    return Trace(depth, wide, made, num_experts)
