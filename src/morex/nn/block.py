"""The block, assembled from built parts. It owns weights and knows no depth."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from morex.nn import ranks
from morex.nn.attention import Attention, Local
from morex.nn.dropout import dropped
from morex.nn.keys import KeyView
from morex.nn.linear import Linear
from morex.nn.low_rank import Changes
from morex.nn.mixers import ExpertViews, GatedFeedForward, swiglu
from morex.nn.norm import RMSNorm
from morex.nn.packing import Packing
from morex.nn.signals import Reports, Signals

NormPlacement = Literal["pre", "sandwich", "pre_post"]
NORM_NAMES = ("norm1", "norm2", "norm1_after", "norm2_after")
"""Norms of a block; the last two stand behind attention and mixer, where there are any."""


class StepViews(ExpertViews, Protocol):
    """The cache slots of one step."""

    attention: KeyView | None


@dataclass(frozen=True)
class StepParts:
    """What belongs to one step of a shared block, and not to the block: handed to it from outside."""

    scale: float = 1.0
    """Factor on what attention and mixer add."""
    norms: Mapping[str, nn.Module] = field(default_factory=dict)
    """Norms of a block that has none, by its names for them."""
    changes: Changes = field(default_factory=dict)
    """Low-rank changes of the linear maps of attention and feed-forward net, by their names."""
    traces: bool = False
    """Whether the mixer reports for a trace."""


WHOLE = StepParts()
"""A step that brings nothing."""


class Block(nn.Module):
    """x <- x + f(norm(x)), f attention and then the mixer.

    A second norm may stand behind each: `sandwich` norm(x + f(norm(x))) (Geiping et al. 2025, section 3.2), `pre_post`
    x + norm(f(norm(x))) (Gemma Team 2024, section 2).
    """

    def __init__(
        self,
        attention: Attention,
        mixer: nn.Module,
        placement: NormPlacement,
        norms: Mapping[str, nn.Module],
        dropout: float = 0.0,
    ) -> None:
        """Args:
        norms: `norm1` and `norm2` before attention and mixer, and where `placement` is not `pre`, `norm1_after` and
            `norm2_after` behind them; empty where every step brings its own.
        dropout: share of what attention and mixer add that training drops.
        """
        super().__init__()
        self.norm1, self.attention = norms.get("norm1"), attention
        self.norm2, self.mixer = norms.get("norm2"), mixer
        self.norm1_after, self.norm2_after = norms.get("norm1_after"), norms.get("norm2_after")
        self.placement, self.dropout = placement, dropout

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        views: StepViews | None = None,
        local: Local | None = None,
        parts: StepParts = WHOLE,
    ) -> tuple[Tensor, Reports]:
        """x [N, D] -> [N, D], and what the mixer's routers report.

        Args:
            local: of a step with a sliding window.
            parts: what the step brings.
        """
        changes = (parts.changes,) if parts.changes else ()  # which expert layers do not know
        view = None if views is None else views.attention
        branch = self.attention(self.norm("norm1", parts, x), packing, view, local, *changes)
        x = self.join(x, branch, "norm1_after", parts)
        branch, reports = self.mix(self.norm("norm2", parts, x), packing, views, parts)
        return self.join(x, branch, "norm2_after", parts), reports

    def mix(
        self, x: Tensor, packing: Packing, views: StepViews | None = None, parts: StepParts = WHOLE
    ) -> tuple[Tensor, Reports]:
        """The mixer's output for x [N, D], and what its routers report; of a dummy only what other ranks count."""
        changes = (parts.changes,) if parts.changes else ()  # which expert layers do not know
        mixed = partial(self.mixer, x, packing, views, *changes, traces=parts.traces)
        if not packing.is_dummy:
            y, reports = mixed()
            return y, reports
        with ranks.aside() as aside:
            y, reports = mixed()
        return y, {name: Signals(one.losses) for name, one in reports.items() if aside.meets_others}

    def plain_weights(self, parts: StepParts) -> tuple[list[Tensor], float] | None:
        """Weights as `fast.Walk` takes them and the norms' epsilon; None where `forward` does anything else besides."""
        attention: Any = self.attention
        mixer: Any = self.mixer
        norms: list[Any] = [parts.norms.get(name) or getattr(self, name) for name in ("norm1", "norm2")]
        norm1, norm2 = norms
        kinds = [type(module) for module in (norm1, norm2, attention, mixer)]
        if kinds != [RMSNorm, RMSNorm, Attention, GatedFeedForward] or norm1.eps != norm2.eps:
            return None
        is_plain = self.placement == "pre" and parts.scale == 1 and not parts.changes
        if not (is_plain and mixer.function is swiglu and attention.norm_q is None):
            return None
        maps = [attention.q, attention.k, attention.v, attention.o, mixer.gate, mixer.up, mixer.down]
        if any(type(linear) is not Linear or linear.bias is not None for linear in maps):
            return None
        if any(module._forward_hooks or module._forward_pre_hooks for module in (self, *self.modules(), norm1, norm2)):
            return None
        q, k, v, o, gate, up, down = [linear.weight for linear in maps]
        return [norm1.weight, q, k, v, o, norm2.weight, gate, up, down], norm1.eps

    def norm(self, name: str, parts: StepParts, x: Tensor) -> Tensor:
        """x [N, D] through the block's norm of this name, or the step's."""
        norm = parts.norms[name] if name in parts.norms else getattr(self, name)
        normed: Tensor = norm(x)
        return normed

    def join(self, x: Tensor, branch: Tensor, norm_after: str, parts: StepParts) -> Tensor:
        """The residual stream [N, D] with a branch [N, D]."""
        if self.placement == "pre_post":
            branch = self.norm(norm_after, parts, branch)
        branch = dropped(branch, self.dropout, self.training)
        joined = x + branch if parts.scale == 1 else x + parts.scale * branch
        return self.norm(norm_after, parts, joined) if self.placement == "sandwich" else joined
