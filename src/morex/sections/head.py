"""Head of a model: what the last states become."""

from typing import Annotated, Literal

from pydantic import Field

from morex.sections.base import Section


class LanguageModelHeadConfig(Section):
    """Logits of the next token at every token."""

    kind: Literal["lm"] = "lm"


class ClassifierHeadConfig(Section):
    """One class for each sequence, from a linear map with bias on its pooled last states; no decoding, no cache."""

    kind: Literal["classifier"]
    classes: Annotated[int, Field(ge=2)] = 4
    """Classes C."""
    pooling: Literal["last", "mean"] = "last"
    """`last`: the state of the sequence's last token; `mean`: the mean over its tokens."""


HeadConfig = Annotated[LanguageModelHeadConfig | ClassifierHeadConfig, Field(discriminator="kind")]
