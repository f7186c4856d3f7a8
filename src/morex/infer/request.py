"""What is asked of the engine, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from morex.data.encoding import Tokenizer
from morex.depth.policy import Depth
from morex.infer.text import GrowingText
from morex.infer.trace import RequestTrace
from morex.model.generate import LARGEST_SEED, check_options
from morex.model.sampling import Sampling, is_integer, log_probabilities

Reason = Literal["length", "stop", "cancelled", "error"]
Stage = Literal["next", "draft", "verify"]
"""Of a request: its next token is drawn, or a token of its draft, or its draft is verified."""


@dataclass(frozen=True, kw_only=True)
class Params(Sampling):
    """How a request is continued; as in `LanguageModel.generate`, each request by itself.

    Args:
        max_new_tokens: tokens to add at most.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
        top_k: draw from the k likeliest only, and from those as likely as the last of them.
        top_p: draw from the smallest set of tokens whose probability reaches p.
        min_p: draw from tokens that are at least p times as likely as the likeliest one, after the temperature.
        repetition_penalty: logits of tokens that stand in the prompt or came after it are divided by it where they are
            positive, else multiplied; at temperature 0 too.
        eos_id: the request ends with this token, which is kept among its tokens and left out of its text.
        stop_ids: more such tokens.
        stop: strings; the text ends before the first that comes, wherever it begins. Needs a tokenizer.
        seed: of the draws.
        row: of the draws from one seed, so that several requests draw each by itself; `seed` and `row` draw what row
            `row` of a batch draws in `generate`.
        depth: as in the model's forward.
        logprobs: gives each new token's log probability, and those of so many likeliest tokens; in the distribution of
            the model itself, before penalty, temperature and filters.
        trace: writes down what each token does on its way through the model.
        draft: tokens, 1 to 16, that the first recursions draft at a time for the full depth to verify together. Texts
            of likeliest tokens are the same as without; drawn ones have the same distribution, from other draws.
        draft_depth: recursions of a draft, fewer than the model's.
    """

    max_new_tokens: int = 20
    eos_id: int | None = None
    stop_ids: Sequence[int] = ()
    stop: Sequence[str] = ()
    seed: int | None = None
    row: int = 0
    depth: Depth = None
    logprobs: int | None = None
    trace: bool = False
    draft: int | None = None
    draft_depth: int = 1


@dataclass(frozen=True)
class LogProbs:
    """Log probabilities at one new token, of the model's own distribution."""

    token: float
    """Of the token itself."""
    likeliest: list[tuple[int, float]]
    """Token ids and theirs, from the likeliest on; as many as were asked for."""


@dataclass(frozen=True)
class Event:
    """What has happened to one request. The last event of each has a reason."""

    number: int
    token: int | None
    """The new token, where there is one."""
    text: str = ""
    """The piece of text that is certain now; all pieces together are the text of the completion."""
    logprobs: LogProbs | None = None
    """Where the request asked for them."""
    reason: Reason | None = None
    """Why the request has ended, where it has."""
    depth: int | None = None
    """Recursions, summed over routed groups, of the token that this one follows, where a trace was asked for."""


@dataclass(frozen=True)
class Completion:
    """A request that has ended."""

    number: int
    prompt: list[int]
    new: list[int]
    """Tokens that came after the prompt, that which ended it included."""
    text: str
    """Of the new tokens, up to what ended them; empty without a tokenizer."""
    reason: Reason
    error: str | None = None
    """What went wrong, in one sentence, where the reason is `error`."""
    logprobs: list[LogProbs] | None = None
    """Of each new token, where the request asked for them."""
    trace: RequestTrace | None = None
    """What the tokens did, where that was asked for."""
    drafted: int = 0
    """Tokens that were drafted and verified."""
    accepted: int = 0
    """Those of them that stayed."""

    @property
    def tokens(self) -> list[int]:
        """The prompt and what came after it."""
        return self.prompt + self.new


@dataclass(eq=False)
class Draft:
    """Tokens that a request may go on with, and that its full depth has not verified."""

    sequence: int | None
    """A fork of the request's, without the newest draft; None once there are enough."""
    tokens: list[int] = field(default_factory=list)
    odds: list[Tensor] = field(default_factory=list)
    """The probabilities [V] that each was drawn from."""


@dataclass(eq=False)
class Request:
    """A prompt that is being continued."""

    number: int
    prompt: list[int]
    params: Params
    text: GrowingText | None = None
    """None without a tokenizer."""
    new: list[int] = field(default_factory=list)
    """Tokens so far."""
    logprobs: list[LogProbs] = field(default_factory=list)
    reason: Reason | None = None
    """Why it ended; None while it goes on."""
    error: str | None = None
    sequence: int | None = None
    """Its sequence in the store, while it has one."""
    trace: RequestTrace | None = None
    """What the tokens have done, if that was asked for."""
    taken: int = 0
    """Tokens that the model has taken in, or that are on their way through it."""
    draws: int = 0
    """Numbers from its generator that the new tokens took."""
    draft: Draft | None = None
    """Begun and not verified."""
    drafted: int = 0
    """Tokens that were drafted and verified."""
    accepted: int = 0
    """Those of them that stayed."""

    @property
    def tokens(self) -> list[int]:
        """The prompt and what came after it."""
        return self.prompt + self.new

    @property
    def num_tokens(self) -> int:
        """Of the prompt and what came after it."""
        return len(self.prompt) + len(self.new)

    def upcoming(self, most: int) -> list[int]:
        """The first of its tokens that the model has not taken in."""
        after = self.taken - len(self.prompt)
        return self.new[after : after + most] if after >= 0 else self.tokens[self.taken : self.taken + most]

    @property
    def num_ahead(self) -> int:
        """Tokens known that the model has not taken in, and those that come next: one, or a draft."""
        return self.num_tokens - self.taken + (self.params.draft or 1)

    @property
    def longest(self) -> int:
        """Tokens that it may have in the store at last: the last new one is drawn and not read."""
        return len(self.prompt) + max(0, self.params.max_new_tokens - 1)

    @property
    def num_drafts(self) -> int:
        """Tokens to draft before the next ones are verified; none before the first new token and the last."""
        left = self.params.max_new_tokens - len(self.new)
        return min(self.params.draft, left - 1) if self.params.draft is not None and self.new else 0

    @property
    def stage(self) -> Stage:
        """What the logits that it asks for are for."""
        if self.draft is None:
            return "next"
        return "verify" if self.draft.sequence is None else "draft"

    def ends_at(self, token: int) -> bool:
        """Whether this token is one that ends the text."""
        return token == self.params.eos_id or token in self.params.stop_ids

    def take(self, token: int, logprobs: LogProbs | None) -> Event:
        """A new token; its event says whether it is the last."""
        params, piece, ends = self.params, "", self.ends_at(token)
        if self.text is not None and not ends:
            piece = self.text.add(token)
        self.new.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        reason: Reason | None = "stop" if ends else "length" if len(self.new) >= params.max_new_tokens else None
        if self.text is not None:
            piece += self.text.finish() if reason else ""
            reason = "stop" if self.text.has_stopped else reason
        depth = None if self.trace is None else self.trace.depth[self.num_tokens - 2]
        return Event(self.number, token, piece, logprobs, reason, depth)

    def completion(self) -> Completion:
        """What there is of it, once it has ended."""
        assert self.reason is not None
        text = "" if self.text is None else self.text.text
        logprobs = None if self.params.logprobs is None else self.logprobs
        return Completion(
            self.number, self.prompt, self.new, text, self.reason, self.error, logprobs, self.trace, self.drafted,
            self.accepted,
        )  # fmt: skip


def asked_log_probabilities(requests: Sequence[Request], logits: Tensor, tokens: Tensor) -> list[LogProbs | None]:
    """Log probabilities of new tokens [n] under logits [n, V], for those of n requests who asked for them."""
    found: list[LogProbs | None] = [None] * len(requests)
    asked = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
    if asked:
        counts = [requests[row].params.logprobs or 0 for row in asked]
        own, values, ids = log_probabilities(logits[asked], tokens[asked].clamp(min=0), max(counts))
        for row, count, token, likeliest, index in zip(
            asked, counts, own.tolist(), values.tolist(), ids.tolist(), strict=True
        ):
            found[row] = LogProbs(token, list(zip(index[:count], likeliest[:count], strict=True)))
    return found


def as_ids(prompt: str | Sequence[int], vocab_size: int, tokenizer: Tokenizer | None) -> list[int]:
    """A prompt's ids. Raises ValueError where it is none, or where an id is beyond the vocabulary."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("a prompt of text needs Engine(model, tokenizer); without, give a list of token ids")
        _check_text("prompt", prompt)
        prompt = tokenizer.encode(prompt)
        if not prompt:
            raise ValueError("a prompt needs at least one token, and this text has none; give some text")
    tokens = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(tokens, Sequence) or not tokens or not all(map(is_integer, tokens)):
        raise ValueError("a prompt is text, or a list of at least one token id, such as [1, 2, 3]")
    _check_ids("token id", tokens, vocab_size)
    return [int(token) for token in tokens]


def check_params(params: Params, vocab_size: int, tokenizer: Tokenizer | None) -> None:
    """Raises ValueError for options out of range, without effect, or that need a tokenizer where there is none."""
    check_options(params.max_new_tokens, params, params.seed, params.depth)
    if not is_integer(params.row) or not 0 <= params.row < LARGEST_SEED:
        raise ValueError(f"row {params.row} must be an integer between 0 and {LARGEST_SEED - 1}")
    for name, values in (("stop", params.stop), ("stop_ids", params.stop_ids)):
        if isinstance(values, str) or not isinstance(values, Sequence):
            example = "['\\n']" if name == "stop" else "[0]"
            raise ValueError(f"{name} {values!r} must be a list, such as {example}")
    for stop in params.stop:
        if not isinstance(stop, str) or not stop:
            raise ValueError(f"stop string {stop!r} must be text of at least one character")
        _check_text("stop string", stop)
    if params.stop and tokenizer is None:
        raise ValueError("stop strings need Engine(model, tokenizer); without, give stop_ids")
    _check_ids("eos_id", [] if params.eos_id is None else [params.eos_id], vocab_size)
    _check_ids("stop id", params.stop_ids, vocab_size)
    if params.logprobs is not None and not (is_integer(params.logprobs) and 0 <= params.logprobs <= vocab_size):
        raise ValueError(f"logprobs {params.logprobs} must be an integer between 0 and the vocabulary of {vocab_size}")


def _check_text(what: str, text: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{what} {text!r} is not valid UTF-8: it has half a character (a lone surrogate)")


def _check_ids(what: str, ids: Sequence[int], vocab_size: int) -> None:
    for index in ids:
        if not is_integer(index) or not 0 <= index < vocab_size:
            raise ValueError(f"{what} {index!r} is outside the vocabulary of {vocab_size} (model.vocab_size)")
