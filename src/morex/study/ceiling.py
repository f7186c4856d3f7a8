"""How fast a model could decode at best with so many requests at a time, from what its passes cost on this machine.

Measured, outside any scheduler, with one new token for each of n sequences of the mean length: the seconds of the
prelude p(n), of the core at recursion r, q_r(n), and of coda, head and sampling l(n), keys and values read and written
in all of them; and the seconds f of a prompt of the mean length. Between sizes that were measured costs are linear.

Of the tokens a share c_r takes recursion r, so a token makes d = sum of c_r visits of the core on average, and a visit
in a mixed batch costs q(n) = sum of c_r q_r(n) / d. With C requests at most C tokens are under way, since a request's
next token is known only when the last one has left. Two kinds of schedule use them best:

- Waves. All C tokens enter together, those who go on stay together, all leave together. A token costs
  [p(C) + sum of q_r(c_r C) + l(C)] / C. This is lockstep, and for a model without recursions plain continuous batching.
- Depth-wise. Tokens at all recursions share a pass. Whoever leaves is collected for k passes of the core, then these
  L tokens leave and the L that follow them enter. Out of m tokens in the core m / d leave in a pass, so L = k m / d; on
  average (k - 1) / 2 passes' worth of them wait, so m + (k - 1) m / 2d = C. A token costs
  d q(m) / m + p(L) / L + l(L) / L. With k = 1 the core is fullest and prelude and head are emptiest; the best k with
  L <= C counts. With G routed groups, each pass of a group has m / G tokens, and a token makes d G of these visits.

A request of N tokens takes f and N - 1 times the cheapest of these, so the ceiling in tokens/s is N / (f + (N - 1) t).
Costs of scheduling and of tokenising are zero in it. It is no law of nature: passes may come to cost less. The ceiling
of a ratio is that of the model over that of the model it is compared with, each with its own number of requests.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from morex.cache.store import KVStore
from morex.depth.policy import Depth
from morex.depth.schedule import Step
from morex.infer.demand import Demand
from morex.infer.passes import Passes, Segment
from morex.infer.room import page_bytes
from morex.model.lm import LanguageModel, attention_shape
from morex.model.sampling import Sampling, sample
from morex.nn.packing import pack_rows
from morex.study.contender import wait

Seconds = Mapping[int, float]
"""Of a pass, by its tokens."""
REPEATS = 7
PROMPTS = 4
"""Prompts that are measured in one pass."""
PAGE_SIZE = 16


@dataclass(frozen=True)
class PassCosts:
    """What a model's passes cost."""

    prelude: Seconds
    core: Sequence[Seconds]
    """By recursion; all routed groups together."""
    leave: Seconds
    """Coda, head and sampling."""
    prompt: float
    """Seconds of a prompt."""


def ceiling(
    costs: PassCosts, concurrency: int, shares: Sequence[float], new_tokens: int, groups: int = 1, waves: bool = False
) -> float:
    """New tokens a second, at best.

    Args:
        concurrency: requests at a time.
        shares: of the tokens that take recursion r = 1..R.
        new_tokens: of each request.
        groups: routed groups.
        waves: by waves alone.
    """
    best = _waves(costs, concurrency, shares)
    if not waves and any(shares):
        best = min(best, _depthwise(costs, concurrency, shares, groups))
    return new_tokens / (costs.prompt + (new_tokens - 1) * best)


def _waves(costs: PassCosts, concurrency: int, shares: Sequence[float]) -> float:
    core = sum(share * _each(own, share * concurrency) for share, own in zip(shares, costs.core, strict=True))
    return _each(costs.prelude, concurrency) + core + _each(costs.leave, concurrency)


def _depthwise(costs: PassCosts, concurrency: int, shares: Sequence[float], groups: int) -> float:
    depth = sum(shares) * groups
    found: list[float] = []
    passes = 1
    while True:
        core = concurrency / (1 + (passes - 1) / (2 * depth))
        leaving = min(concurrency, core / depth) if passes == 1 else passes * core / depth
        if leaving > concurrency:
            return min(found)
        visits = sum(share * _each(own, core / groups) for share, own in zip(shares, costs.core, strict=True))
        found.append(visits + _each(costs.prelude, leaving) + _each(costs.leave, leaving))
        passes += 1


def _each(seconds: Seconds, tokens: float) -> float:
    """Seconds for each of so many tokens; a pass has at least one."""
    tokens = max(1.0, tokens)
    sizes = sorted(seconds)
    below = max((size for size in sizes if size <= tokens), default=sizes[0])
    above = min((size for size in sizes if size >= tokens), default=sizes[-1])
    if above == below:
        return seconds[below] / tokens
    part = (tokens - below) / (above - below)
    return ((1 - part) * seconds[below] + part * seconds[above]) / tokens


def sizes_for(concurrency: int) -> list[int]:
    """Numbers of tokens to measure passes with, where up to so many share one."""
    halves = [concurrency >> i for i in range(concurrency.bit_length())][:4]
    return sorted({1, *halves, max(1, 3 * concurrency // 4)})


def measure_passes(
    models: Sequence[LanguageModel],
    sizes: Sequence[Sequence[int]],
    shares: Sequence[Sequence[float]],
    prompt_tokens: int,
    context: int,
    repeats: int = REPEATS,
    depths: Sequence[Depth] | None = None,
) -> list[PassCosts]:
    """Costs of several models' passes; the models take turns, so that a machine that slows down does so for all.

    Args:
        sizes: numbers of tokens, of each model.
        shares: of the tokens that take recursion r = 1..R, of each model.
        prompt_tokens: of a prompt.
        context: tokens that a sequence has when a new one comes.
        depths: of the prompts, of each model; default: what its router decides.
    """
    found = []
    depths = depths or [None] * len(models)
    prompts = [PromptTimer(model, prompt_tokens, depth) for model, depth in zip(models, depths, strict=True)]
    _in_turns(prompts, repeats)
    for prompt, model in zip(prompts, models, strict=True):
        core: list[dict[int, float]] = [{} for _ in range(model.config.schedule.recursions)]
        found.append(PassCosts({}, core, {}, prompt.seconds()))
    for place in range(max(map(len, sizes))):
        measured = [i for i in range(len(models)) if place < len(sizes[i])]
        timers = [PassTimer(models[i], sizes[i][place], context, shares[i], repeats) for i in measured]
        _in_turns(timers, repeats)
        for i, timer in zip(measured, timers, strict=True):
            own = found[i]
            by_part = [statistics.median(times) for times in zip(*timer.times[1:], strict=True)]
            for seconds, part in zip([own.prelude, *own.core, own.leave], by_part, strict=True):
                seconds[sizes[i][place]] = part  # type: ignore[index]
    return found


def _in_turns(timers: "Sequence[PassTimer | PromptTimer]", repeats: int) -> None:
    """The first turn of each is for warming up."""
    for _ in range(repeats + 1):
        for timer in timers:
            timer.once()


class PromptTimer:
    """Times a few prompts, side by side."""

    def __init__(self, model: LanguageModel, tokens: int, depth: Depth) -> None:
        self.passes = Passes(model, _store_for(model, PROMPTS, tokens))
        ids = torch.arange(PROMPTS * tokens) * 31 % model.config.vocab_size
        self.texts: list[list[int]] = ids.view(PROMPTS, tokens).tolist()
        self.policy = model.policy(depth, None)
        self.times: list[float] = []

    @torch.no_grad()
    def once(self) -> None:
        """All prompts, from the prelude to the head."""
        passes, store = self.passes, self.passes.store
        segments = [Segment(store.open(), 0, text, self.policy) for text in self.texts]
        start = time.perf_counter()
        going, arrived = passes.enter(segments)
        while going:
            group = going[0].group
            here, going = [f for f in going if f.group == group], [f for f in going if f.group != group]
            more, done = passes.core(group, here)
            going, arrived = going + more, arrived + done
        for part in passes.together(arrived):
            passes.leave(part)
        wait(passes.device)
        self.times.append(time.perf_counter() - start)
        for segment in segments:
            store.free(segment.sequence)

    def seconds(self) -> float:
        """Of one prompt."""
        return statistics.median(self.times[1:]) / PROMPTS


class PassTimer:
    """Times the passes of one new token in each of n sequences, recursion by recursion."""

    def __init__(self, model: LanguageModel, n: int, context: int, shares: Sequence[float], repeats: int) -> None:
        self.model, self.context = model, context
        store = _store_for(model, n, context + repeats + 1)
        self.sequences = [store.open() for _ in range(n)]
        fill(store, model, self.sequences, context, shares)
        self.passes = Passes(model, store)
        self.policy = model.policy(f"uniform:{model.config.schedule.recursions}", None)
        self.times: list[list[float]] = []
        """Of each turn: prelude, each recursion, and the rest."""

    @torch.no_grad()
    def once(self) -> None:
        """One token more of every sequence, through all recursions."""
        passes, recursions = self.passes, self.policy.recursions
        place = self.context + len(self.times)
        size = self.model.config.vocab_size
        segments = [Segment(s, place, [(s * 31 + place) % size], self.policy) for s in self.sequences]
        seconds = [0.0] * (recursions + 2)
        start = time.perf_counter()
        going, arrived = passes.enter(segments)
        start = self._lap(seconds, 0, start)
        for group in range(len(self.model.stack.core.groups)):
            for r in range(1, recursions + 1):
                going, arrived = passes.core(group, going)
                start = self._lap(seconds, r, start)
        [part] = arrived
        sample(passes.leave(part), [Sampling()] * len(segments), [])
        self._lap(seconds, -1, start)
        self.times.append(seconds)

    def _lap(self, seconds: list[float], place: int, start: float) -> float:
        wait(self.passes.device)
        now = time.perf_counter()
        seconds[place] += now - start
        return now


def fill(store: KVStore, model: LanguageModel, sequences: Sequence[int], tokens: int, shares: Sequence[float]) -> None:
    """Gives every sequence the entries of so many tokens, of which a share c_r has taken recursion r; all are zero."""
    schedule, shape, weight = model.config.schedule.resolved, attention_shape(model.config), model.embedding.weight
    core = range(schedule.prelude, schedule.prelude + schedule.core)
    for step in schedule.steps:
        stream = schedule.stream(step.slot)
        if stream.place or (model.config.kv == "shared_first" and step.recursion > 1):
            continue
        entries = max(1, round(tokens * _share_at(step, core, shares)))
        time_of = (torch.arange(entries) * tokens // entries).repeat(len(sequences)).to(weight.device)
        packing = pack_rows([entries] * len(sequences), time_of, time_of, tokens)
        lists = store.lists([(sequence, stream.first) for sequence in sequences], stream.width, packing)
        zeros = weight.new_zeros(packing.num_tokens, shape.kv_heads, shape.head_dim)
        for place in range(stream.width):
            lists.append(place, zeros, zeros)
    for sequence in sequences:
        store.advance(sequence, tokens)


def _share_at(step: Step, core: range, shares: Sequence[float]) -> float:
    return shares[step.recursion - 1] if step.block in core else 1.0


def cache_bytes_for(model: LanguageModel, requests: int, tokens: int, page_size: int = PAGE_SIZE) -> int:
    """Bytes of a cache in which so many requests of so many tokens fit, however deep they go."""
    pages = Demand(model.config, page_size).pages(tokens, model.config.schedule.recursions)
    return requests * pages * page_bytes(model, page_size)


def _store_for(model: LanguageModel, requests: int, tokens: int) -> KVStore:
    return model.new_store(cache_bytes_for(model, requests, tokens), PAGE_SIZE)
