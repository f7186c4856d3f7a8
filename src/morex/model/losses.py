"""The loss of the next token: at one state, and expected over the exits of a model that may leave early."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from morex.nn.packing import Packing
from morex.nn.signals import Exits


def next_tokens(labels: Tensor, packing: Packing, time: int) -> Tensor:
    """What each real token should be followed by [N]; -100 where there is nothing to predict.

    Args:
        labels: the tokens themselves [B, T], or with the next one [B, T + 1].
        packing: the real tokens of the batch.
        time: T.
    """
    targets = labels[:, 1:]
    if targets.shape[1] < time:
        targets = F.pad(targets, (0, 1), value=-100)
    return packing.gather(targets.reshape(-1))


def language_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [N, V] over the tokens with a target, in nats."""
    return _mean(_cross_entropy(logits, targets), targets)


def exit_losses(exits: Exits, read: Callable[[Tensor], Tensor], targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over all exits (Ouro, arXiv 2510.25741, section 3).

    Args:
        exits: states and probabilities of the exits.
        read: norm and head, from states [N, D] to logits [N, V].
        targets: next tokens [N].

    Returns:
        Logits at the exits that the rule of inference takes [N, V], and the losses: `lm`, the mean over tokens of
        sum_r p_r CE_r; `lm_at_exit`, that of the logits; `exit_entropy`, the mean entropy of p in nats.
    """
    probabilities = exits.log_probabilities.exp()
    entropy = -(probabilities * exits.log_probabilities).sum(1)
    expected, logits = torch.zeros_like(entropy), exits.states[0]
    for r, state in enumerate(exits.states):
        own = read(state)
        expected = expected + probabilities[:, r] * _cross_entropy(own, targets)
        logits = own if r == 0 else torch.where((exits.taken == r)[:, None], own, logits)
    at_exit = language_loss(logits.detach(), targets)
    return logits, {
        "lm": _mean(expected, targets),
        "lm_at_exit": at_exit,
        "exit_entropy": _mean(entropy, targets),
    }


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token [N] in full precision; 0 without a target."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, reduction="none")


def _mean(values: Tensor, targets: Tensor) -> Tensor:
    """Mean of values [N] over the tokens with a target; 0 and not NaN without any."""
    counted = targets != -100
    return (values * counted).sum() / counted.sum().clamp(min=1)
