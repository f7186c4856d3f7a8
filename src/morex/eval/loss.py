"""Loss over a whole held-out set, each predicted token with the same weight; of a task accuracy too.

`expert_choice` trains with a rule that sees later tokens. It is measured twice: by the causal rule, which decoding uses
(`loss`), and by the rule of training (`oracle_loss`). A model without a causal rule has only the second; then `loss`
repeats it and `is_oracle` says so.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from morex.config import ModelConfig
from morex.data.loader import Batch
from morex.data.source import held_out_batches
from morex.data.stream import TokenStream
from morex.data.tasks.prepared import HeldOut
from morex.depth.policy import BY_DIFFICULTY, Depth
from morex.eval.accuracy import Answered, Scores, answered, scores
from morex.loading import ConfigError
from morex.model.lm import LanguageModel, takes_any_depth
from morex.nn import ranks
from morex.sections.depth import ExpertChoiceConfig


@dataclass(frozen=True)
class EvalResult:
    """What a model makes of a held-out set."""

    loss: float
    """Mean negative log-likelihood of a token, or of a class, in nats."""
    perplexity: float
    bits_per_byte: float | None
    """Bits per UTF-8 byte of the text: loss / ln 2 * tokens per byte; None for a task."""
    tokens: int
    """Predicted tokens, or classes."""
    oracle_loss: float | None = None
    """Loss under top-k routing, which sees later tokens; None for models whose training rule is causal."""
    is_oracle: bool = False
    """Whether `loss` itself is the oracle's, because the model has no causal rule."""
    by_depth: dict[int, float] | None = None
    """Loss with every token at r = 1..R recursions, where it was asked for and the model recurs."""
    scores: Scores | None = None
    """Accuracy, where the set is of a task, under the rule of `loss`."""
    oracle_scores: Scores | None = None
    """Accuracy under the rule of `oracle_loss`."""
    scores_by_depth: dict[int, Scores] | None = None
    """Accuracy with every token at r = 1..R recursions."""


@dataclass(frozen=True)
class Measured:
    """One pass over a held-out set under one depth policy."""

    loss: float
    tokens: int
    scores: Scores | None


def depths_to_measure(config: ModelConfig, deepest: int | None = None) -> list[int]:
    """The fixed depths 1..R, or up to `deepest`; none where the model does not recur.

    Raises:
        ConfigError: `deepest` is more than the model can take.
    """
    recursions = config.schedule.resolved.recursions
    if config.schedule.sharing == "none":
        return []
    if deepest is not None and deepest > recursions and not takes_any_depth(config):
        raise ConfigError(f"eval.deepest {deepest} is more than the {recursions} recursions that this model can take")
    last = recursions if deepest is None else deepest
    return list(range(1, last + 1)) if last > 1 else []


def evaluate(
    model: LanguageModel,
    held_out: TokenStream | HeldOut,
    seq_len: int,
    batch_size: int,
    depth: Depth = None,
    autocast: torch.dtype | None = None,
    by_depth: bool = False,
    mask_documents: bool = False,
    deepest: int | None = None,
) -> EvalResult:
    """Evaluates on every token of a stream but the first, in consecutive windows, or on every answer of a task.

    The model's mode is put back.

    Args:
        held_out: the held-out tokens, or examples.
        seq_len: window of a stream in tokens; a token sees at most the seq_len - 1 before it.
        batch_size: windows or examples per forward call; the result does not depend on it.
        depth: depth policy of `model.forward`, or 'difficulty': as many recursions for each example of a task as it is
            difficult. With one, only that policy is measured.
        autocast: format that autocast computes in; None computes in the format of the weights.
        by_depth: also measure r = 1..R recursions for every token.
        mask_documents: tokens attend only to their own document.
        deepest: last depth that `by_depth` measures; default: R.

    Raises:
        ConfigError: `deepest` is more than the model can take, or depth is 'difficulty' where there is no task.
        ValueError: the model cannot take this depth.
    """
    config = model.config
    depths = depths_to_measure(config, deepest) if by_depth else []

    def measure(policy: Depth) -> Measured:
        return _measure(
            model, held_out_batches(held_out, seq_len, batch_size, mask_documents), policy, autocast, mask_documents
        )

    was_training = model.training
    model.eval()
    try:
        oracle, is_oracle = None, False
        if depth is None and isinstance(config.depth, ExpertChoiceConfig):
            oracle = measure("oracle")
            is_oracle = config.depth.causal == "none"
        found = oracle if oracle is not None and is_oracle else measure(depth)
        measured = {r: measure(r) for r in depths}
    finally:
        model.train(was_training)
    loss, bits = found.loss, None
    if isinstance(held_out, TokenStream):
        bits = loss / math.log(2) * held_out.num_tokens / held_out.num_bytes
    scored = {r: one.scores for r, one in measured.items() if one.scores is not None}
    return EvalResult(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=bits,
        tokens=found.tokens,
        oracle_loss=oracle.loss if oracle is not None else None,
        is_oracle=is_oracle,
        by_depth={r: one.loss for r, one in measured.items()} or None,
        scores=found.scores,
        oracle_scores=None if oracle is None else oracle.scores,
        scores_by_depth=scored or None,
    )


def depth_of(batch: Batch, depth: Depth) -> Depth | Tensor:
    """What `model.forward` is given for a depth policy, which may be 'difficulty'.

    Raises:
        ConfigError: it is, and the batch is of no task.
    """
    if depth != BY_DIFFICULTY:
        return depth
    if batch.difficulty is None:
        raise ConfigError("depth 'difficulty' is for the examples of a task, and this run has a corpus")
    return batch.difficulty


@torch.no_grad()
def _measure(
    model: LanguageModel, batches: Iterator[Batch], depth: Depth, autocast: torch.dtype | None, mask_documents: bool
) -> Measured:
    """Loss of a predicted token in nats, how many were predicted, and of a task its scores.

    Several ranks divide the rows of each batch; all have the same result.
    """
    device = next(model.parameters()).device
    total, predicted = 0.0, 0
    answers: list[Answered] = []
    for everyone in batches:
        own = slice(ranks.rank(), None, ranks.num_ranks())
        is_mine = ranks.rank() < everyone.tokens.shape[0]
        # Ranks that share weights have to make as many passes: one without rows takes a row that does not count.
        batch = everyone.rows(own if is_mine else slice(1))
        count = batch.num_predicted if is_mine else 0
        batch = batch.to(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            out = model(
                batch.tokens,
                labels=batch.labels,
                lengths=batch.lengths,
                document_ids=batch.document_ids if mask_documents else None,
                depth=depth_of(batch, depth),
            )
        total += float(out.losses[out.objective]) * count
        predicted += count
        if batch.difficulty is not None and is_mine:
            answers.append(answered(out.logits, batch.labels, batch.difficulty))
    total, predicted_by_all = ranks.totals([total, predicted])
    predicted = round(predicted_by_all)
    assert predicted, "the data layer refuses a held-out set of one token"
    answers = [answer for rank in ranks.gathered(answers) for answer in rank]
    return Measured(total / predicted, predicted, scores(answers) if answers else None)
