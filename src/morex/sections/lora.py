"""Low-rank changes by which recursions differ."""

from pydantic import PositiveFloat, PositiveInt

from morex.sections.base import Section


class LoRAConfig(Section):
    """W x + alpha / rank * B A x in place of W x, for the linear maps of attention and feed-forward net (LoRA)."""

    rank: PositiveInt = 8
    """Rows of A and columns of B."""
    alpha: PositiveFloat | None = None
    """Default: rank, so that the factor is 1."""

    @property
    def factor(self) -> float:
        """alpha, the default filled in."""
        return self.alpha or float(self.rank)
