"""The engine: requests come and go, and every pass through shared blocks takes tokens of all of them, at any recursion.

A step lets waiting requests in, sends pieces of prompts and new tokens through the prelude, makes one pass through the
blocks of each routed group for all who are under way, and takes those whose router let them go through coda and head,
where they draw their next token. A request's result depends on nobody else.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from morex.cache.paged import PagedStore
from morex.cache.prefixes import Prefixes
from morex.cache.store import OutOfPages
from morex.depth.policy import Depth, DepthPolicy
from morex.infer.demand import Demand, peak
from morex.infer.passes import Arrived, Flight, Passes, Segment, join
from morex.infer.request import Event, Params, Reason, Request, as_ids
from morex.infer.scheduler import Scheduler
from morex.infer.trace import RequestTrace
from morex.model.checks import check_decodes
from morex.model.generate import check_options, check_room, generator_of, sample
from morex.model.lm import LanguageModel

OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "depth")


class Engine:
    """Decodes many requests with one model."""

    def __init__(
        self,
        model: LanguageModel,
        cache_bytes: int,
        page_size: int = 16,
        most_requests: int = 64,
        chunk: int = 128,
        prefixes: int = 64,
        patience: int = 1,
        lockstep: bool = False,
    ) -> None:
        """Args:
        model: which the engine puts into eval mode.
        cache_bytes: of all keys and values together.
        page_size: entries of a page.
        most_requests: that run at the same time.
        chunk: tokens of a prompt that go into the model at once.
        prefixes: texts that are kept for requests that begin alike, as long as nobody needs their pages.
        patience: steps that tokens which are done with the core wait for others, to leave through coda and head with
            them; 0 sends them on at once.
        lockstep: every step takes all its tokens through all their recursions, so that those that leave early wait for
            the deepest: what depth-wise batching is compared with.
        """
        self.model = model.eval()
        self.store: PagedStore = model.new_store(cache_bytes, page_size)
        self.passes, self.scheduler = Passes(model, self.store), Scheduler(most_requests, chunk, patience)
        self.clock = self.passes.clock
        self.prefixes = Prefixes(self.store, prefixes)
        self.demand = Demand(model.config, page_size)
        self.lockstep = lockstep
        self.flights: dict[tuple[int, int, int], Flight] = {}
        self.arrived: list[Arrived] = []
        self.requests: dict[int, Request] = {}
        self._policies: dict[Depth, DepthPolicy] = {}
        self._draws: dict[int, torch.Generator] = {}
        self._count = 0

    def add(self, prompt: Sequence[int], params: Params | None = None) -> int:
        """Asks for the continuation of a prompt; returns the number of the request.

        Raises:
            ValueError: an empty prompt, a depth that the model cannot take, or more tokens than the cache ever holds.
        """
        params = params or Params()
        check_decodes(self.model.config, params.depth)
        check_options(**{name: getattr(params, name) for name in OPTIONS})
        request = Request(self._count, as_ids(prompt, self.model.config.vocab_size), params)
        check_room(self.model, len(request.prompt), params.max_new_tokens)
        request.trace = RequestTrace() if params.trace else None
        if params.depth not in self._policies:
            self._policies[params.depth] = self.model.policy(params.depth, None)
        needed = self._demand(request, request.longest)
        if needed > self.store.pool.size:
            raise ValueError(
                f"a request of up to {request.longest} tokens needs {needed} pages, and the cache has "
                f"{self.store.pool.size}; give a larger cache_bytes or a smaller max_new_tokens"
            )
        self._draws[request.number] = generator_of(params.seed, 0)
        self.requests[request.number] = request
        self._count += 1
        self.scheduler.add(request)
        return request.number

    def cancel(self, number: int) -> None:
        """Ends a request now; its memory is free at once. One that has ended stays as it is."""
        request = self.requests[number]
        if request.reason is None:
            self._end(request, "cancelled")

    def take(self, number: int) -> Request:
        """A request that has ended; the engine forgets it. Raises ValueError where it goes on."""
        if self.requests[number].reason is None:
            raise ValueError(f"request {number} goes on; wait for its end, or cancel it")
        return self.requests.pop(number)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.scheduler.running and not self.scheduler.waiting

    @torch.no_grad()
    def step(self) -> list[Event]:
        """One pass of everything; what came of it."""
        self.clock.steps += 1
        with self.clock.part("admission"):
            self._admit()
        self.clock.running += len(self.scheduler.running)
        try:
            return self._pass()
        except OutOfPages:
            self._make_room()
            return []

    def generate(self, prompts: Sequence[Sequence[int]], params: Params | None = None) -> list[list[int]]:
        """Prompts with their continuations, in their order."""
        numbers = [self.add(prompt, params) for prompt in prompts]
        for _ in self.stream():
            pass
        return [self.take(number).tokens for number in numbers]

    def stream(self) -> Iterator[Event]:
        """All that happens until nothing is left to do."""
        while not self.is_idle:
            yield from self.step()

    def _admit(self) -> None:
        """Lets in who fits beside the others until all are done; who begins like another text starts there."""
        while (request := self.scheduler.next_to_admit()) is not None:
            while not (fits := self._fits(request)) and self.prefixes.drop_oldest():
                pass
            if self.scheduler.running and not fits:
                return
            self.scheduler.admit().sequence = self._begin(request)

    def _fits(self, request: Request) -> bool:
        """Whether there are pages for what is known of a text now, and for all that will be said beside it."""
        running, known = self.scheduler.running, self._known(request)
        promised = sum(self._demand(other, other.num_ahead) for other in running)
        promised += self._demand(request, request.num_ahead - (0 if known is None else known[1]))
        if promised > self.store.pool.num_free:
            return False
        sequences = [other.sequence for other in running if other.sequence is not None]
        tokens = sum(self.store.tokens(sequence) for sequence in sequences)
        if not tokens:
            return True
        pages_per_token = sum(map(self.store.num_pages, sequences)) / tokens  # less where tokens leave early
        texts = [(len(other.tokens), other.longest - len(other.tokens)) for other in [request, *running]]
        return peak(texts) * pages_per_token <= self.store.pool.size

    def _known(self, request: Request) -> tuple[int, int] | None:
        """A sequence that has the beginning of a text; a trace wants every token computed."""
        return None if request.params.trace else self.prefixes.find(request.tokens, request.params.depth)

    def _begin(self, request: Request) -> int:
        """A sequence for a request, with what is known of its text; its last token is always computed."""
        found = self._known(request)
        if found is None:
            return self.store.open()
        sequence = self.store.fork(found[0])
        request.taken = min(found[1], len(request.tokens) - 1)
        self.store.truncate(sequence, request.taken)
        return sequence

    def _pass(self) -> list[Event]:
        entering = [self._segment(request, tokens) for request, tokens in self.scheduler.segments()]
        if entering:
            with self.clock.part("prelude"):
                self._keep(*self.passes.enter(entering))
        with self.clock.part("core"):
            self._core()
            while self.lockstep and self.flights:
                self._core()
        waiting = sum(len(part.segments) for part in self.arrived)
        if not self.scheduler.may_leave(waiting, bool(self.flights)):
            return []
        events: list[Event] = []
        parts, self.arrived = self.passes.together(self.arrived), []
        for part in parts:
            with self.clock.part("coda and head"):
                logits = self.passes.leave(part)
            with self.clock.part("sampling"):
                events += self._draw(part.segments, logits)
        return events

    def _core(self) -> None:
        """Everybody in the core takes a recursion."""
        for group in range(len(self.model.stack.core.groups)):
            flights = [self.flights.pop(key) for key in list(self.flights) if key[1] == group]
            if flights:
                self._keep(*self.passes.core(group, flights))

    def _keep(self, going: list[Flight], arrived: list[Arrived]) -> None:
        for flight in going:
            there = self.flights.get(flight.key)
            self.flights[flight.key] = flight if there is None else join([there, flight])
        self.arrived += arrived

    def _segment(self, request: Request, tokens: list[int]) -> Segment:
        assert request.sequence is not None
        start = request.taken - len(tokens)
        reads = int(request.taken == len(request.tokens))
        policy = self._policies[request.params.depth]
        return Segment(request.sequence, start, tokens, policy, request, reads, request.trace)

    def _draw(self, segments: list[Segment], logits: Tensor) -> list[Event]:
        """The next token of each request whose text is all in."""
        events = []
        ready = [segment.owner for segment in segments if self.scheduler.back(segment.owner)]
        for request, row in zip(ready, logits, strict=True):
            params = request.params
            if not request.new:
                self._keep_text(self.store.fork(request.sequence), request)
            if params.max_new_tokens:
                draws = [self._draws[request.number]]
                token = int(sample(row[None], params.temperature, params.top_k, params.top_p, draws))
                request.new.append(token)
            if len(request.new) >= params.max_new_tokens:
                self._end(request, "length")
            elif token == params.eos_id:
                self._end(request, "stop")
            depth = None if request.trace is None else request.trace.depth[-1]
            events.append(Event(request.number, request.new[-1] if request.new else None, request.reason, depth))
        return events

    def _end(self, request: Request, reason: Reason) -> None:
        if reason in ("length", "stop") and request.sequence is not None:
            self._keep_text(request.sequence, request)
            request.sequence = None
        self._forget(request)
        del self._draws[request.number]
        self.scheduler.end(request, reason)

    def _forget(self, request: Request) -> None:
        """Takes a request out of everything but the scheduler."""
        for key, flight in list(self.flights.items()):
            kept = [i for i, segment in enumerate(flight.segments) if segment.owner is not request]
            if not kept:
                del self.flights[key]
            elif len(kept) < len(flight.segments):
                self.flights[key] = flight.select(kept)
        arrived, self.arrived = self.arrived, []
        for part in arrived:
            kept = [i for i, segment in enumerate(part.segments) if segment.owner is not request]
            if kept:
                self.arrived.append(part if len(kept) == len(part.segments) else part.select(kept))
        if request.sequence is not None:
            self.store.free(request.sequence)
            request.sequence = None

    def _keep_text(self, sequence: int, request: Request) -> None:
        """Hands a sequence over, for texts that begin alike."""
        self.prefixes.keep(sequence, request.tokens[: self.store.tokens(sequence)], request.params.depth)

    def _make_room(self) -> None:
        """The pages have run out in the middle of a pass: all start their segments again, without who came last.

        Texts that are only kept for others go before anybody who runs.
        """
        self.flights.clear()
        self.arrived.clear()
        victim = self.scheduler.youngest()
        for request in self.scheduler.running:
            assert request.sequence is not None
            taken = self.store.tokens(request.sequence)
            self.store.truncate(request.sequence, taken)
            self.scheduler.recall(request, taken)
        if self.prefixes.drop_oldest():
            return
        assert victim.sequence is not None
        self.store.free(victim.sequence)
        self.scheduler.preempt(victim)

    def _demand(self, request: Request, tokens: int) -> int:
        """Pages that so many tokens of a request need at most."""
        return self.demand.pages(tokens, self._policies[request.params.depth].recursions)
