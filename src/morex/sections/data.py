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


class MemberConfig(Section):
    """One corpus of a mixture."""

    corpus: str
    """Anything that `data.corpus` can be."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share of the training windows is this weight divided by the sum of all."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Times that its windows may be seen; a training that would need more is refused. Default: without limit."""


class DataConfig(Section):
    """Where the text comes from and how it becomes windows of tokens, or which task there is instead."""

    task: TaskConfig | None = None
    """Examples with a question and an answer, in place of a corpus; `corpus` is then not used."""
    corpus: str = "sotu"
    """A name such as `sotu`, `hf:NAME:CONFIG#SPLIT` of the Hugging Face hub, a file, a folder of files or of token
    shards, or the address of one elsewhere, such as `s3://...`."""
    mixture: tuple[MemberConfig, ...] = ()
    """Several corpora with weights, in place of `corpus`, which is then not used."""
    val_corpus: str | None = None
    """A corpus that is held out whole; default: that of a named corpus which has one, else a part by `val_fraction`."""
    column: str = "text"
    """What holds the text: the column of a table, the field of a JSON object."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of the text that is held out where no corpus is: whole documents, or the end of the only one."""
    seed: Seed = 0
    """Seed of the split."""
    windows: Literal["packed", "random"] = "packed"
    """`packed`: documents back to back, each token once an epoch; `random`: windows from random places."""
    mask_documents: bool = False
    """Tokens attend only to their own document."""

    @model_validator(mode="after")
    def _holds_other_text_out(self) -> Self:
        if self.val_corpus == self.corpus and not self.mixture:
            raise ValueError(
                f"data.val_corpus '{self.val_corpus}' is data.corpus itself; name another, or leave it out to hold a "
                "part of data.corpus out"
            )
        return self

    @model_validator(mode="after")
    def _mixes(self) -> Self:
        if self.mixture and self.task is not None:
            raise ValueError("data.mixture and data.task are two things to train on; leave one of them out")
        if self.mixture and self.val_corpus is not None:
            raise ValueError(
                "data.val_corpus is held out of one corpus; each member of data.mixture has held-out text of its own"
            )
        names = [member.corpus for member in self.mixture]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"data.mixture has corpus '{name}' {names.count(name)} times; give it once, with one weight"
                )
        return self

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
        if self.mixture:
            return f"data.mixture of {' and '.join(repr(member.corpus) for member in self.mixture)}"
        return f"data.corpus '{self.corpus}'" if self.task is None else f"data.task '{self.task.kind}'"
