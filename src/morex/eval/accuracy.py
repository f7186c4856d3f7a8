"""Accuracy on a task's held-out examples, by difficulty.

An answer is right where the model's likeliest token is right at each of its places, given the true tokens before it.
That is so exactly where greedy decoding writes the answer: up to its first mistake it reads the same tokens.
Shapes: B examples, T tokens, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from morex.model.heads import IGNORED


@dataclass(frozen=True)
class Score:
    """How a set of examples was answered."""

    examples: int
    accuracy: float
    """Share of the answers that are right from the first token to the last."""
    token_accuracy: float
    """Share of the answers' tokens that are right, given the true ones before them."""
    loss: float
    """Mean negative log-likelihood of an answer's token in nats."""
    tokens: int
    """Tokens of the answers, or classes."""


@dataclass(frozen=True)
class Scores:
    """How a task's held-out examples were answered."""

    all: Score
    by_difficulty: dict[int, Score]
    """In ascending order."""


@dataclass(frozen=True)
class Answered:
    """What a model made of one batch; a row for each example."""

    difficulty: Tensor
    """[B] int64."""
    sums: Tensor
    """[B, 4] float64: whether the answer is right, right tokens, tokens, negative log-likelihood."""


def answered(logits: Tensor, labels: Tensor, difficulty: Tensor) -> Answered:
    """Compares predictions with what should have been predicted.

    Args:
        logits: of the next token [B, T, V], or of the class [B, C].
        labels: the batch's, [B, T + 1] or [B].
        difficulty: [B].
    """
    if labels.dim() == 1:
        logits, targets = logits[:, None], labels[:, None]
    else:
        targets = labels[:, 1:]
    wanted = targets != IGNORED
    right = (logits.argmax(-1) == targets) & wanted
    exact = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(exact.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    tokens = wanted.sum(1)
    columns = (right.sum(1) == tokens, right.sum(1), tokens, losses.double().sum(1))
    return Answered(difficulty, torch.stack([column.double() for column in columns], 1).cpu())


def scores(batches: Iterable[Answered]) -> Scores:
    """Of all examples together, and by difficulty."""
    found = list(batches)
    difficulty = torch.cat([batch.difficulty for batch in found])
    sums = torch.cat([batch.sums for batch in found])
    levels = difficulty.unique().tolist()
    return Scores(_score(sums), {level: _score(sums[difficulty == level]) for level in levels})


def _score(sums: Tensor) -> Score:
    exact, right, tokens, loss = sums.sum(0).tolist()
    return Score(
        examples=len(sums),
        accuracy=exact / len(sums),
        token_accuracy=right / tokens,
        loss=loss / tokens,
        tokens=round(tokens),
    )
