"""How a model's width goes into its initial weights, learning rates, logits and attention."""

from pydantic import PositiveInt

from morex.sections.base import Section


class WidthScalingConfig(Section):
    """Maximal update parametrisation (Yang et al. 2022, arXiv 2203.03466): learning rates, decay and initial weights
    that are good at `base_width` are so at any width, where d_ff and heads x head_dim grow in proportion to d_model."""

    base_width: PositiveInt
    """Width at which the model is what it is without this section."""
    base_head_dim: PositiveInt | None = None
    """head_dim at base_width; default: the model's own, wider models having more heads."""

    def attention_scale(self, head_dim: int) -> float:
        """Factor on the products of queries and keys: 1 / head_dim, and 1 / sqrt(head_dim) at the base."""
        return (self.base_head_dim or head_dim) ** 0.5 / head_dim
