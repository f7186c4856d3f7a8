"""What is asked of the engine, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from morex.depth.policy import Depth
from morex.infer.trace import RequestTrace

Reason = Literal["length", "stop", "cancelled"]


@dataclass(frozen=True)
class Params:
    """How a request is continued; as in `LanguageModel.generate`, each request by itself."""

    max_new_tokens: int = 20
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    eos_id: int | None = None
    seed: int | None = None
    depth: Depth = None
    trace: bool = False
    """Whether to write down what each token does."""


@dataclass(eq=False)
class Request:
    """A prompt that is being continued."""

    number: int
    prompt: list[int]
    params: Params
    new: list[int] = field(default_factory=list)
    """Tokens so far."""
    reason: Reason | None = None
    """Why it ended; None while it goes on."""
    sequence: int | None = None
    """Its sequence in the store, while it has one."""
    trace: RequestTrace | None = None
    """What the tokens have done, if that was asked for."""
    taken: int = 0
    """Tokens that the model has taken in, or that are on their way through it."""

    @property
    def tokens(self) -> list[int]:
        """The prompt and what came after it."""
        return self.prompt + self.new

    @property
    def num_ahead(self) -> int:
        """Tokens known that the model has not taken in, and one more."""
        return len(self.tokens) - self.taken + 1

    @property
    def longest(self) -> int:
        """Tokens that it may have in the store at last: the last new one is drawn and not read."""
        return len(self.prompt) + max(0, self.params.max_new_tokens - 1)


@dataclass(frozen=True)
class Event:
    """What a step of the engine has done for one request."""

    number: int
    token: int | None
    """The new token, where there is one."""
    reason: Reason | None = None
    """Why the request has ended, where it has."""
    depth: int | None = None
    """Recursions, summed over routed groups, of the token that this one follows, where a trace was asked for."""


def as_ids(prompt: Sequence[int], vocab_size: int) -> list[int]:
    """A prompt's ids. Raises ValueError where it is none, or where an id is beyond the vocabulary."""
    if isinstance(prompt, str) or not len(prompt):
        raise ValueError("a prompt is a list of at least one token id, such as [1, 2, 3]")
    ids = [int(token) for token in prompt]
    for outside in (token for token in ids if not 0 <= token < vocab_size):
        raise ValueError(f"token id {outside} is outside the vocabulary of {vocab_size} (model.vocab_size)")
    return ids
