"""One example of a task, and batches of them. Shapes: B examples, T tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from morex.data.loader import PADDING, Batch
from morex.model.heads import IGNORED

Ids = Sequence[int] | NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Example:
    """A question and its answer, as token ids."""

    prompt: Ids
    """What is read before the answer: by a language model up to a cue for it, by a classifier the bare question."""
    answer: Ids
    """What a language model has to answer, the end of the text included."""
    difficulty: int
    label: int | None = None
    """Class of the question, for a classifier."""
    targets: Sequence[int] | None = None
    """What training asks at each token of the prompt but the last, where the answer is asked; -100 for nothing."""

    @property
    def num_read(self) -> int:
        """Tokens that a model reads: all but the last of the answer, which it predicts; a classifier no answer."""
        return len(self.prompt) + (len(self.answer) - 1 if self.label is None else 0)


def answer_batch(examples: Sequence[Example], predict_prompt: bool = False) -> Batch:
    """Prompts and answers for a language model, padded on the right; labels [B, T + 1] are -100 outside the answers
    and the examples' targets.

    Args:
        examples: at least one.
        predict_prompt: label the prompts too.
    """
    rows = [np.concatenate([example.prompt, example.answer]) for example in examples]
    tokens, lengths = _padded([row[:-1] for row in rows])
    labels = np.full((len(rows), tokens.shape[1] + 1), IGNORED, np.int64)
    for label, row, example in zip(labels, rows, examples, strict=True):
        first = 0 if predict_prompt else len(example.prompt)
        label[first : len(row)] = row[first:]
        if example.targets is not None:
            label[1 : len(example.prompt)] = example.targets
    return _batch(examples, tokens, labels, lengths)


def class_batch(examples: Sequence[Example]) -> Batch:
    """Questions for a classifier, padded on the right, and their classes [B]."""
    tokens, lengths = _padded([example.prompt for example in examples])
    return _batch(examples, tokens, np.array([example.label for example in examples], np.int64), lengths)


def _padded(rows: Sequence[Ids]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths = np.array([len(row) for row in rows], np.int64)
    tokens = np.full((len(rows), int(lengths.max())), PADDING, np.int64)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return tokens, lengths


def _batch(
    examples: Sequence[Example], tokens: NDArray[np.int64], labels: NDArray[np.int64], lengths: NDArray[np.int64]
) -> Batch:
    full = bool((lengths == tokens.shape[1]).all())
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        document_ids=torch.zeros(tokens.shape, dtype=torch.int64),
        lengths=None if full else torch.from_numpy(lengths),
        difficulty=torch.tensor([example.difficulty for example in examples]),
    )
