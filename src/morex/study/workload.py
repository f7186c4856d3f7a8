"""What a decoding benchmark asks of an engine, when, and how long the answers take.

Prompts are text, so that tokenising is inside the clock; every request gets the same number of new tokens, and no token
ends it. Arrivals are closed, so many requests there at all times and a new one as soon as one ends, or Poisson: at
random times that a seed fixes, whatever the engine does.
"""

import random
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from morex.data.characters import CharTokenizer
from morex.data.encoding import Tokenizer
from morex.data.subword import SMALLEST_BPE, train_bpe
from morex.infer.request import Event, Params

LETTERS = string.ascii_lowercase
WORDS = 1 << 15


@dataclass(frozen=True)
class Workload:
    """Requests, in the order in which they are sent."""

    texts: Sequence[str]
    lengths: Sequence[int]
    """Tokens of each text that are the prompt."""
    new_tokens: int
    """Tokens that each request asks for."""
    arrivals: Sequence[float] | None = None
    """Seconds after the start at which each comes; None: closed loop."""

    def __len__(self) -> int:
        return len(self.texts)


@dataclass
class Served:
    """What became of a workload."""

    seconds: float = 0.0
    """From the first request to the last token."""
    tokens: int = 0
    """New tokens."""
    tokenizing: float = 0.0
    """Seconds of it."""
    waiting: float = 0.0
    """Seconds in which nobody was there."""
    ttft: list[float] = field(default_factory=list)
    """Seconds from the arrival of each request to its first token."""
    tpot: list[float] = field(default_factory=list)
    """Seconds for each token after the first, of each request that has more than one."""


class Decoder(Protocol):
    """What a workload needs of an engine."""

    def add(self, prompt: Sequence[int], params: Params | None = None) -> int:
        """Asks for a continuation; returns the number of the request."""

    def step(self) -> list[Event]:
        """What one pass of everything brought."""

    def take(self, number: int) -> Any:
        """A request that has ended; the engine forgets it."""


@dataclass
class _Answer:
    arrived: float
    first: float = 0.0
    tokens: int = 0


def made_up_words(count: int, seed: int = 0) -> list[str]:
    """Words of 2 to 9 random letters."""
    draws = random.Random(seed)
    return ["".join(draws.choices(LETTERS, k=draws.randint(2, 9))) for _ in range(count)]


def made_up_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on made-up words, with as many pieces as a model has ids; without file or network.

    A vocabulary without room for all bytes gets the letters alone.

    Raises:
        ValueError: it has no room for these either.
    """
    if vocab_size >= SMALLEST_BPE:
        text = " ".join(made_up_words(max(256, vocab_size)))
        return train_bpe([text, text], vocab_size)
    if vocab_size <= len(LETTERS):
        raise ValueError(f"model.vocab_size {vocab_size} has no room for {len(LETTERS)} letters and the space")
    return CharTokenizer(" " + LETTERS)


def make_workload(
    tokenizer: Tokenizer,
    requests: int,
    prompt_tokens: tuple[int, int],
    new_tokens: int,
    rate: float | None = None,
    seed: int = 0,
) -> Workload:
    """Random words, in prompts of random lengths.

    Args:
        prompt_tokens: fewest and most tokens of a prompt, every length alike.
        rate: requests a second; None: closed loop.
    """
    draws, words = random.Random(seed), made_up_words(WORDS)
    lengths = [draws.randint(*prompt_tokens) for _ in range(requests)]
    texts = [_text(tokenizer, words, length, draws) for length in lengths]
    return Workload(texts, lengths, new_tokens, None if rate is None else poisson(requests, rate, seed))


def poisson(requests: int, rate: float, seed: int) -> list[float]:
    """Seconds at which requests come: exponential times between them, with a mean of 1 / rate."""
    draws, now, times = random.Random(seed), 0.0, []
    for _ in range(requests):
        now += draws.expovariate(rate)
        times.append(now)
    return times


def drive(
    engine: Decoder,
    tokenizer: Tokenizer,
    work: Workload,
    concurrency: int,
    params: Params | None = None,
    now: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Served:
    """Sends a workload and waits for all of it.

    Args:
        concurrency: requests in the engine at all times, while there are some left to send; for a closed loop.
        params: of every request, but for the number of its tokens.
    """
    served, going, sent = Served(), dict[int, _Answer](), 0
    params, start = replace(params or Params(), max_new_tokens=work.new_tokens), now()
    while sent < len(work) or going:
        while sent < len(work) and _is_due(work, sent, len(going) < concurrency, now() - start):
            arrived = now() if work.arrivals is None else start + work.arrivals[sent]
            before = now()
            ids = tokenizer.encode(work.texts[sent])[: work.lengths[sent]]
            served.tokenizing += now() - before
            going[engine.add(ids, params)] = _Answer(arrived)
            sent += 1
        if not going:
            assert work.arrivals is not None
            before = now()
            sleep(max(0.0, start + work.arrivals[sent] - before))
            served.waiting += now() - before
            continue
        events = engine.step()
        _note(events, going, served, now())
        for event in events:
            if event.reason is not None:
                engine.take(event.number)
    served.seconds = now() - start
    return served


def _is_due(work: Workload, index: int, has_room: bool, elapsed: float) -> bool:
    return has_room if work.arrivals is None else work.arrivals[index] <= elapsed


def _note(events: Sequence[Event], going: dict[int, _Answer], served: Served, moment: float) -> None:
    for event in events:
        answer = going[event.number]
        if event.token is not None:
            served.tokens += 1
            answer.tokens += 1
            if answer.tokens == 1:
                answer.first = moment
                served.ttft.append(moment - answer.arrived)
        if event.reason is not None:
            del going[event.number]
            if answer.tokens > 1:
                served.tpot.append((moment - answer.first) / (answer.tokens - 1))


def _text(tokenizer: Tokenizer, words: Sequence[str], tokens: int, draws: random.Random) -> str:
    """Words that are at least so many tokens, and hardly more."""
    chosen: list[str] = []
    while (known := len(tokenizer.encode(" ".join(chosen)))) < tokens:
        # A word with its space is at most 10 tokens.
        chosen += draws.choices(words, k=max(1, (tokens - known) // 10))
    return " ".join(chosen)
