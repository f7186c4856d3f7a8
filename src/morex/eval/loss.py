"""Loss over a whole held-out set, each predicted token with the same weight.

`expert_choice` trains with a rule that sees later tokens. It is measured twice: by the causal rule, which decoding uses
(`loss`), and by the rule of training (`oracle_loss`). A model without a causal rule has only the second; then `loss`
repeats it and `is_oracle` says so.
"""

import math
from dataclasses import dataclass

import torch

from morex.data.loader import IGNORED, held_out_windows
from morex.data.stream import TokenStream
from morex.depth.policy import Depth
from morex.model.lm import LanguageModel
from morex.sections.depth import ExpertChoiceConfig


@dataclass(frozen=True)
class EvalResult:
    """What a model makes of a held-out set."""

    loss: float
    """Mean negative log-likelihood of a token in nats."""
    perplexity: float
    bits_per_byte: float
    """Bits per UTF-8 byte of the text: loss / ln 2 * tokens per byte."""
    tokens: int
    """Predicted tokens."""
    oracle_loss: float | None = None
    """Loss under top-k routing, which sees later tokens; None for models whose training rule is causal."""
    is_oracle: bool = False
    """Whether `loss` itself is the oracle's, because the model has no causal rule."""
    by_depth: dict[int, float] | None = None
    """Loss with every token at r = 1..R recursions, where it was asked for and the model recurs."""


def evaluate(
    model: LanguageModel,
    stream: TokenStream,
    seq_len: int,
    batch_size: int,
    depth: Depth = None,
    autocast: torch.dtype | None = None,
    by_depth: bool = False,
    mask_documents: bool = False,
) -> EvalResult:
    """Evaluates on every token of `stream` but the first, in consecutive windows; the model's mode is put back.

    Args:
        stream: the held-out tokens.
        seq_len: window in tokens; a token sees at most the seq_len - 1 before it.
        batch_size: windows per forward call; the result does not depend on it.
        depth: depth policy of `model.forward`; with one, only that policy is measured.
        autocast: format that autocast computes in; None computes in the format of the weights.
        by_depth: also measure r = 1..R recursions for every token.
        mask_documents: tokens attend only to their own document.
    """
    config = model.config

    def measure(policy: Depth) -> tuple[float, int]:
        return _mean_loss(model, stream, seq_len, batch_size, policy, autocast, mask_documents)

    was_training = model.training
    model.eval()
    try:
        oracle, is_oracle = None, False
        if depth is None and isinstance(config.depth, ExpertChoiceConfig):
            oracle, tokens = measure("oracle")
            is_oracle = config.depth.causal == "none"
        loss, tokens = (oracle, tokens) if oracle is not None and is_oracle else measure(depth)
        recursions = config.schedule.resolved.recursions
        depths = {r: measure(r)[0] for r in range(1, recursions + 1)} if by_depth and recursions > 1 else None
    finally:
        model.train(was_training)
    return EvalResult(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=loss / math.log(2) * stream.num_tokens / stream.num_bytes,
        tokens=tokens,
        oracle_loss=oracle,
        is_oracle=is_oracle,
        by_depth=depths,
    )


@torch.no_grad()
def _mean_loss(
    model: LanguageModel,
    stream: TokenStream,
    seq_len: int,
    batch_size: int,
    depth: Depth,
    autocast: torch.dtype | None,
    mask_documents: bool,
) -> tuple[float, int]:
    """Mean loss of a predicted token in nats, and how many were predicted."""
    device = next(model.parameters()).device
    total, predicted = 0.0, 0
    for batch in held_out_windows(stream, seq_len, batch_size):
        count = int((batch.labels[:, 1:] != IGNORED).sum())
        batch = batch.to(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            out = model(
                batch.tokens,
                labels=batch.labels,
                lengths=batch.lengths,
                document_ids=batch.document_ids if mask_documents else None,
                depth=depth,
            )
        total += float(out.losses["lm"]) * count
        predicted += count
    assert predicted, "the data layer refuses a held-out set of one token"
    return total / predicted, predicted
