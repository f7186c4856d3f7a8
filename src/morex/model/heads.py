"""Heads: what the last states of the tokens become, logits of the next token or of a class, and the loss on them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morex.model.checks import check_below
from morex.nn.costs import Costs, linear_costs
from morex.nn.linear import linear
from morex.nn.packing import Packing
from morex.nn.signals import Exits

IGNORED = -100
"""Label that counts nowhere."""


class Head(nn.Module):
    """Base of the heads."""

    objective = ""
    """Name of the loss that the model learns from."""

    def __init__(self, cap: float | None, scale: float = 1.0) -> None:
        """Args:
        cap: keeps logits within this bound, cap * tanh(logits / cap); None: no bound.
        scale: of the states that become logits.
        """
        super().__init__()
        self.cap, self.scale = cap, scale

    def check(self, labels: Tensor | None, shape: tuple[int, int], keep: int | Tensor) -> None:
        """Refuses labels and `keep` that do not go with a batch of this shape [B, T]. Raises ValueError."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, packing: Packing, time: int, embedding: Tensor, labels: Tensor | None, keep: int | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of a batch, and with labels the mean loss over those that are not ignored.

        Args:
            x: last states of the packing's tokens [N, D], normed.
            time: columns T of the batch.
            embedding: weights of the token embedding [V, D].
            labels, keep: as `labels` and `logits_to_keep` of the model's forward.
        """
        raise NotImplementedError

    def loss(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Mean loss of logits [N, C] on ids [N]."""
        return mean_cross_entropy(logits, wanted)

    def scaled(self, x: Tensor) -> Tensor:
        """States as the linear map of the head takes them."""
        return x if self.scale == 1 else x * self.scale

    def capped(self, logits: Tensor) -> Tensor:
        """Logits within the bound, where there is one."""
        if self.cap is None:
            return logits
        # Near the cap a slope of tanh that was rounded to bf16 is mostly error.
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (self.cap * torch.tanh(wide / self.cap)).to(logits.dtype)


class LanguageModelHead(Head):
    """Logits of the next token [B, T, V], with the weights of the embedding or with its own."""

    objective = "lm"
    weight: nn.Parameter | None

    def __init__(self, d_model: int, vocab_size: int, tied: bool, cap: float | None, scale: float = 1.0) -> None:
        super().__init__(cap, scale)
        self.vocab_size = vocab_size
        self.register_parameter("weight", None if tied else nn.Parameter(torch.empty(vocab_size, d_model)))

    def check(self, labels: Tensor | None, shape: tuple[int, int], keep: int | Tensor) -> None:
        batch, time = shape
        if isinstance(keep, int) and keep < 0:
            raise ValueError(f"logits_to_keep {keep} must be 0 or more")
        if labels is None:
            return
        _check_integers(labels, self.vocab_size, f"the vocabulary of {self.vocab_size} (model.vocab_size)")
        if tuple(labels.shape) not in ((batch, time), (batch, time + 1)):
            raise ValueError(
                f"labels must have the shape {[batch, time]} or {[batch, time + 1]}, not {list(labels.shape)}"
            )

    def logits(self, x: Tensor, embedding: Tensor) -> Tensor:
        """States [N, D] -> logits [N, V]."""
        return self.capped(linear(self.scaled(x), embedding if self.weight is None else self.weight))

    def forward(
        self, x: Tensor, packing: Packing, time: int, embedding: Tensor, labels: Tensor | None, keep: int | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        kept = _kept_rows(packing, min(keep, time) if isinstance(keep, int) else keep)
        if kept is not None and labels is None:
            return self.logits(x[kept], embedding).view(packing.rows, -1, embedding.shape[0]), None
        flat = self.logits(x, embedding)
        loss = None if labels is None else self.loss(flat, packing.gather(_next_tokens(labels, time)))
        return _arranged(flat, kept, packing, time), loss

    def read_exits(
        self,
        exits: Exits,
        norm: nn.Module,
        packing: Packing,
        time: int,
        embedding: Tensor,
        labels: Tensor,
        keep: int | Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits at the exits that the rule of inference takes, and the losses over all exits.

        The losses (Ouro, arXiv 2510.25741, section 3) are `lm`, the mean over tokens of sum_r p_r CE_r; `lm_at_exit`,
        that of the logits; `exit_entropy`, the mean entropy of p in nats.

        Args:
            exits: states, not normed, and probabilities.
            norm: the model's last norm.
            packing, time, embedding, labels, keep: as in `forward`.
        """
        wanted = packing.gather(_next_tokens(labels, time))
        probabilities = exits.log_probabilities.exp()
        entropy = -(probabilities * exits.log_probabilities).sum(1)
        expected, flat = torch.zeros_like(entropy), exits.states[0]
        for r, state in enumerate(exits.states):
            own = self.logits(norm(state), embedding)
            expected = expected + probabilities[:, r] * F.cross_entropy(_wide(own), wanted, reduction="none")
            flat = own if r == 0 else torch.where((exits.taken == r)[:, None], own, flat)
        counted = wanted != IGNORED
        tokens = counted.sum().clamp(min=1)
        losses = {
            self.objective: (expected * counted).sum() / tokens,
            "lm_at_exit": mean_cross_entropy(flat.detach(), wanted),
            "exit_entropy": (entropy * counted).sum() / tokens,
        }
        kept = _kept_rows(packing, min(keep, time) if isinstance(keep, int) else keep)
        return _arranged(flat, kept, packing, time), losses


class ClassifierHead(Head):
    """Logits of the classes of each sequence [B, C]."""

    objective = "classification"

    def __init__(self, d_model: int, classes: int, pooling: str, cap: float | None, scale: float = 1.0) -> None:
        """Args:
        pooling: `last` or `mean`, what a sequence's tokens become.
        """
        super().__init__(cap, scale)
        self.weight, self.bias = nn.Parameter(torch.empty(classes, d_model)), nn.Parameter(torch.empty(classes))
        self.classes, self.pooling = classes, pooling

    def check(self, labels: Tensor | None, shape: tuple[int, int], keep: int | Tensor) -> None:
        if isinstance(keep, Tensor) or keep:
            raise ValueError("logits_to_keep is for a language model: a classifier has one row of logits a sequence")
        if labels is None:
            return
        _check_integers(labels, self.classes, f"the {self.classes} classes (model.head.classes)")
        if tuple(labels.shape) != shape[:1]:
            raise ValueError(f"labels of a classifier must have the shape {[shape[0]]}, not {list(labels.shape)}")

    def pool(self, x: Tensor, packing: Packing) -> Tensor:
        """States of the packing's tokens [N, D] -> one of each sequence [B, D]; zeros for a sequence of no tokens."""
        lengths = packing.lengths
        if self.pooling == "mean":
            return packing.pad(x).sum(1) / lengths.clamp(min=1)[:, None].to(x.dtype)
        # With zeros in front, the sum of lengths up to a row is the place of its last token.
        return F.pad(x, (0, 0, 1, 0))[torch.where(lengths > 0, lengths.cumsum(0), 0)]

    def forward(
        self, x: Tensor, packing: Packing, time: int, embedding: Tensor, labels: Tensor | None, keep: int | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        logits = self.capped(F.linear(self.scaled(self.pool(x, packing)), self.weight, self.bias))
        return logits, None if labels is None else mean_cross_entropy(logits, labels)


def mean_cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of logits [N, C] against ids [N], the mean over those that are not -100; zero without any."""
    # The sum over a count of at least one keeps a batch without targets at zero, not NaN.
    return F.cross_entropy(_wide(logits), wanted, reduction="sum") / (wanted != IGNORED).sum().clamp(min=1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _arranged(flat: Tensor, kept: Tensor | None, packing: Packing, time: int) -> Tensor:
    """Logits of all tokens [N, V] in the frame of the batch [B, T, V], or of those kept [B, k, V]."""
    if kept is not None:
        return flat[kept].view(packing.rows, -1, flat.shape[-1])
    frame = packing.pad(flat)
    # The frame is as wide as the longest row, and the batch may be wider.
    return frame if packing.width == time else F.pad(frame, (0, 0, 0, time - packing.width))


def classifier_costs(d_model: int, classes: int) -> Costs:
    """Closed-form costs of a `ClassifierHead`, whose one visit is that of a sequence, not of a token."""
    return linear_costs(d_model, classes) + Costs(classes)


def _check_integers(labels: Tensor, end: int, place: str) -> None:
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers, not {labels.dtype}")
    check_below(end, "label", labels.masked_fill(labels == IGNORED, 0), place)


def _next_tokens(labels: Tensor, time: int) -> Tensor:
    """The token after each of the batch [B * T], from labels [B, T] or [B, T + 1]."""
    targets = labels[:, 1:]
    if targets.shape[1] < time:
        targets = F.pad(targets, (0, 1), value=IGNORED)
    return targets.reshape(-1)


def _kept_rows(packing: Packing, keep: int | Tensor) -> Tensor | None:
    """Flat tokens whose logits are kept [B * k], or None for all."""
    if isinstance(keep, int) and (keep == 0 or (keep == packing.width and packing.is_full)):
        return None
    lengths = packing.lengths
    first = lengths.cumsum(0) - lengths
    if isinstance(keep, Tensor):
        offset = keep.to(lengths.device).expand(packing.rows, -1)
        offset = torch.where(offset < 0, offset + lengths[:, None], offset)
    else:
        offset = lengths[:, None] - keep + torch.arange(keep, device=lengths.device)
    last = (lengths - 1).clamp(min=0)[:, None]
    return (first[:, None] + offset.clamp(min=0).minimum(last)).flatten().clamp(max=packing.num_tokens - 1)
