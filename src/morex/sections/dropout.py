"""Dropout in training."""

from typing import Annotated

from pydantic import Field

from morex.sections.base import Section

Rate = Annotated[float, Field(ge=0, lt=1)]


class DropoutConfig(Section):
    """Shares of values that training drops at random; what stays is divided by 1 minus the share. Off in evaluation."""

    attention: Rate = 0.0
    """Of the attention probabilities of blocks."""
    residual: Rate = 0.0
    """Of what attention and mixer add to the residual stream."""
    embedding: Rate = 0.0
    """Of the sum of token and position embeddings."""

    @property
    def is_on(self) -> bool:
        """Whether training drops anything."""
        return any((self.attention, self.residual, self.embedding))
