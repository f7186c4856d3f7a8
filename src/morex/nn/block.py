"""The block, assembled from built parts. It owns weights and knows no depth."""

from typing import Literal, Protocol

from torch import Tensor, nn

from morex.nn.attention import Attention, KeyView, Local
from morex.nn.mixers import ExpertViews
from morex.nn.packing import Packing
from morex.nn.signals import Reports

NormPlacement = Literal["pre", "sandwich", "pre_post"]


class StepViews(ExpertViews, Protocol):
    """The cache slots of one step."""

    attention: KeyView | None


class Block(nn.Module):
    """x <- x + f(norm(x)), f attention and then the mixer.

    A second norm may stand behind each: `sandwich` norm(x + f(norm(x))) (Geiping et al. 2025, section 3.2), `pre_post`
    x + norm(f(norm(x))) (Gemma Team 2024, section 2).
    """

    def __init__(
        self,
        norm1: nn.Module,
        attention: Attention,
        norm2: nn.Module,
        mixer: nn.Module,
        placement: NormPlacement = "pre",
        norm1_after: nn.Module | None = None,
        norm2_after: nn.Module | None = None,
    ) -> None:
        """Args:
        norm1, norm2: norms before attention and mixer.
        norm1_after, norm2_after: norms behind them, where `placement` is not `pre`.
        """
        super().__init__()
        self.norm1, self.attention = norm1, attention
        self.norm2, self.mixer = norm2, mixer
        self.norm1_after, self.norm2_after = norm1_after, norm2_after
        self.placement = placement

    def forward(
        self, x: Tensor, packing: Packing, views: StepViews | None = None, local: Local | None = None
    ) -> tuple[Tensor, Reports]:
        """x [N, D] -> [N, D], and what the mixer's routers report. `local`: of a step with a sliding window."""
        branch = self.attention(self.norm1(x), packing, None if views is None else views.attention, local)
        x = self._join(x, branch, self.norm1_after)
        branch, reports = self.mixer(self.norm2(x), packing, views)
        return self._join(x, branch, self.norm2_after), reports

    def _join(self, x: Tensor, branch: Tensor, norm: nn.Module | None) -> Tensor:
        """The residual stream [N, D] with a branch [N, D]."""
        if norm is None:
            return x + branch
        joined: Tensor = norm(x + branch) if self.placement == "sandwich" else x + norm(branch)
        return joined
