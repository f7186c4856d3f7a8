"""The engine: requests come and go, and every pass through shared blocks takes tokens of all of them, at any recursion.

A step lets waiting requests in, sends pieces of prompts and new tokens through the prelude, makes a pass through the
blocks of each routed group for all who are under way, more where nobody can come or go meanwhile, and takes those whose
router let them go through coda and head, where they draw their next token. A request's result depends on nobody else,
and what goes wrong in a step ends only those who took part in it.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from morex.cache.paged import PagedStore
from morex.cache.prefixes import Prefixes
from morex.cache.store import OutOfPages
from morex.data.encoding import Tokenizer
from morex.data.tokenizer import check_vocabulary
from morex.depth.policy import Depth, DepthPolicy
from morex.infer.admission import Admission
from morex.infer.demand import Demand
from morex.infer.passes import Passes, Segment
from morex.infer.request import (
    Completion,
    Event,
    LogProbs,
    Params,
    Reason,
    Request,
    Stage,
    as_ids,
    asked_log_probabilities,
    check_params,
)
from morex.infer.scheduler import Scheduler
from morex.infer.speculation import Speculation, check_draft, depth_of
from morex.infer.stream import RequestStream
from morex.infer.text import GrowingText
from morex.infer.trace import RequestTrace
from morex.infer.traffic import Traffic
from morex.model.checks import check_decodes
from morex.model.generate import check_room
from morex.model.lm import LanguageModel
from morex.model.sampling import generator_of, rewind, sample

NOT_FINITE = "the logits are not finite, so there is no next token"


class Engine:
    """Decodes many requests with one model."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        *,
        cache_bytes: int,
        page_size: int = 16,
        most_requests: int = 64,
        chunk: int = 128,
        prefixes: int = 64,
        patience: int = 3,
        lockstep: bool = False,
    ) -> None:
        """Args:
        model: which the engine puts into eval mode.
        tokenizer: for prompts of text, stop strings, and the text of what is new; without one all is token ids.
        cache_bytes: of all keys and values together.
        page_size: entries of a page.
        most_requests: that run at the same time.
        chunk: tokens of a prompt that go into the model at once.
        prefixes: texts that are kept for requests that begin alike, as long as nobody needs their pages.
        patience: passes through the core that tokens which are done with it wait for others, to leave through coda and
            head with them; 0 sends them on at once.
        lockstep: every step takes all its tokens through all their recursions, so that those that leave early wait for
            the deepest: what depth-wise batching is compared with.

        Raises:
            ValueError: the tokenizer has more ids than the model, or cache_bytes holds no page.
        """
        if tokenizer is not None:
            check_vocabulary(tokenizer, model.config.vocab_size)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.store: PagedStore = model.new_store(cache_bytes, page_size)
        self.passes, self.scheduler = Passes(model, self.store), Scheduler(most_requests, chunk, patience)
        self.clock = self.passes.clock
        self.prefixes = Prefixes(self.store, prefixes)
        demand = Demand(model.config, page_size)
        self.admission = Admission(self.scheduler, self.store, self.prefixes, demand, self._depth)
        self.lockstep = lockstep
        self.traffic = Traffic(self.passes)
        self.requests: dict[int, Request] = {}
        self._policies: dict[Depth, DepthPolicy] = {}
        self.speculation = Speculation(self.store, self._policies.__getitem__)
        self._draws: dict[int, torch.Generator] = {}
        self._count = 0
        self._events: deque[Event] = deque()
        """That nobody has asked for yet."""
        self._broken: list[Request] = []
        """Requests that cannot go on, until the end of the step."""
        self._left: list[int] = []
        """Requests whose stream is gone."""

    def add(self, prompt: str | Sequence[int], params: Params | None = None) -> int:
        """Asks for the continuation of a prompt, text or token ids; returns the number of the request.

        Raises:
            ValueError: an empty prompt, options out of range or without effect, a depth that the model cannot take, or
                more tokens than the cache ever holds.
        """
        params = Params() if params is None else params
        if not isinstance(params, Params):
            raise ValueError(f"params must be Params, such as Params(temperature=0.8), not {params!r}")
        size = self.model.config.vocab_size
        check_params(params, size, self.tokenizer)
        check_decodes(self.model.config, params.depth)
        request = Request(self._count, as_ids(prompt, size, self.tokenizer), params)
        check_room(self.model, len(request.prompt), params.max_new_tokens)
        request.trace = RequestTrace() if params.trace else None
        check_draft(self.model, params)
        for depth in (params.depth, depth_of(params)) if params.draft else (params.depth,):
            if depth not in self._policies:
                self._policies[depth] = self.model.policy(depth, None)
        needed = self.admission.needed(request, request.longest)
        if needed > self.store.pool.size:
            raise ValueError(
                f"a request of up to {request.longest} tokens needs {needed} pages, and the cache has "
                f"{self.store.pool.size}; give a larger cache_bytes or a smaller max_new_tokens"
            )
        if self.tokenizer is not None:
            request.text = GrowingText(self.tokenizer, request.prompt, params.stop)
        self._draws[request.number] = generator_of(params.seed, params.row)
        self.requests[request.number] = request
        self._count += 1
        self.passes.look_again()
        self.scheduler.add(request)
        return request.number

    def cancel(self, number: int) -> None:
        """Ends a request now; its memory is free at once. One that has ended stays as it is."""
        request = self._request(number)
        if request.reason is None:
            self._end(request, "cancelled")

    def take(self, number: int) -> Completion:
        """What has become of a request that has ended; the engine forgets it. Raises ValueError where it goes on."""
        if self._request(number).reason is None:
            raise ValueError(f"request {number} goes on; wait for its end, or cancel it")
        self._events = deque(event for event in self._events if event.number != number)
        return self.requests.pop(number).completion()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.scheduler.running and not self.scheduler.waiting

    def step(self) -> list[Event]:
        """Takes everybody on; what came of it, after what nobody has asked for yet."""
        self._advance()
        events = list(self._events)
        self._events.clear()
        return events

    def stream(self) -> Iterator[Event]:
        """All that happens until nothing is left to do; whoever stops listening may go on with another stream."""
        while self._events or not self.is_idle:
            if not self._events:
                self._advance()
            while self._events:
                yield self._events.popleft()

    def stream_request(self, prompt: str | Sequence[int], params: Params | None = None) -> RequestStream:
        """The events of one request, beside whatever else runs; raises as `add` does."""
        return RequestStream(self, self.add(prompt, params))

    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: Params | Sequence[Params] | None = None
    ) -> list[Completion]:
        """Continues prompts and forgets them; what comes of other requests meanwhile waits for `step` or `stream`.

        Args:
            prompts: text or token ids each.
            params: for all of them, or one for each.

        Raises:
            ValueError: as `add`; then none of them has been continued.
        """
        if isinstance(prompts, str):
            raise ValueError("generate takes a list of prompts, such as ['Once upon a time']")
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts came with {len(each)} params; give one for all, or one for each")
        numbers: list[int] = []
        try:
            for prompt, own in zip(prompts, each, strict=True):
                numbers.append(self.add(prompt, own))
            while any(self.requests[number].reason is None for number in numbers):
                self._advance()
        except BaseException:
            for number in numbers:
                self._leave(number)
            raise
        return [self.take(number) for number in numbers]

    def next_event(self, number: int) -> Event:
        """The next event of one request; those of others wait for whoever asks for them."""
        self._request(number)
        while True:
            for place, event in enumerate(self._events):
                if event.number == number:
                    del self._events[place]
                    return event
            if self.requests[number].reason is not None:
                raise ValueError(f"request {number} has ended, and all its events have been handed out")
            self._advance()

    def forget(self, number: int) -> None:
        """Cancels a request before the next step; nobody will take it."""
        self._left.append(number)

    @torch.no_grad()
    def _advance(self) -> None:
        """Takes everybody on."""
        while self._left:
            self._leave(self._left.pop())
        self.traffic.in_hand = ()
        self.clock.steps += 1
        try:
            with self.clock.part("admission"):
                self.admission.admit()
            self.clock.running += len(self.scheduler.running)
            self._pass()
        except OutOfPages:
            self._make_room()
        except Exception as error:
            self._fail(error)
        except BaseException:
            self._restart()
            raise
        broken = [request for request in self._broken if request.reason is None]
        self._broken.clear()
        if broken:
            # What is not a number must not stay in the pages, where others would read it behind their own entries.
            self._restart()
            for request in broken:
                self._end(request, "error", request.error)

    def _depth(self, request: Request) -> int:
        """Recursions that a request's tokens take at most."""
        return self._policies[request.params.depth].recursions

    def _request(self, number: int) -> Request:
        if number not in self.requests:
            raise ValueError(f"there is no request {number}; it was never added, or its completion has been taken")
        return self.requests[number]

    def _leave(self, number: int) -> None:
        """Nobody asks for a request any more."""
        if number in self.requests:
            self.cancel(number)
            self.take(number)

    def _break(self, request: Request, error: str) -> None:
        """Ends a request with an error as soon as the step is over."""
        request.error = error
        self._broken.append(request)

    def _fail(self, error: Exception) -> None:
        """A step has gone wrong: those who took part in its pass end, and all others start again."""
        owners: list[Request] = [segment.owner for segment in self.traffic.in_hand]
        owners = owners or list(self.scheduler.running) or list(self.scheduler.waiting)[:1]
        self._restart()
        for request in owners:
            if request.reason is None:
                self._end(request, "error", _sentence("the model", error))

    def _restart(self) -> None:
        """Everybody waits again, to be computed from the tokens known: whatever broke off in the middle is gone."""
        self.traffic.clear()
        self.store.clear()
        self.prefixes.clear()
        going = [request for request in self.requests.values() if request.reason is None]
        self.scheduler.restart(going)
        for request in going:
            request.draft = None
            rewind(self._draws[request.number], request.draws)

    def _pass(self) -> None:
        traffic = self.traffic
        entering = [self._segment(request, tokens) for request, tokens in self.scheduler.segments()]
        if entering:
            with self.clock.part("prelude"):
                traffic.enter(entering)
        with self.clock.part("core"):
            may_leave = self._through_core()
        for part in traffic.pick_up() if may_leave else ():
            traffic.in_hand = part.segments
            with self.clock.part("coda and head"):
                logits = self.passes.leave(part)
            with self.clock.part("sampling"):
                self._draw(part.segments, logits)

    def _through_core(self) -> bool:
        """Takes all who are in the core through a recursion, and on as long as nobody can come or go meanwhile.

        Whether those who are done with the core leave now.
        """
        traffic, scheduler = self.traffic, self.scheduler
        while True:
            traffic.core()
            if self.lockstep and traffic.flights:
                continue
            if scheduler.may_leave(traffic.waiting, bool(traffic.flights)):
                return True
            if not (traffic.flights and scheduler.is_full):
                return False

    def _segment(self, request: Request, tokens: list[int]) -> Segment:
        if request.num_drafts and request.taken == request.num_tokens:
            return self.speculation.segment(request)
        assert request.sequence is not None
        start = request.taken - len(tokens)
        reads = int(request.taken == request.num_tokens)
        policy = self._policies[request.params.depth]
        return Segment(request.sequence, start, tokens, policy, request, reads, request.trace)

    def _draw(self, segments: Sequence[Segment], logits: Tensor) -> None:
        """What comes of the logits that requests whose text is all in have asked for."""
        asking = [segment for segment in segments if self.scheduler.back(segment.owner)]
        stages: dict[Stage, list[int]] = {}
        for place, segment in enumerate(asking):
            stages.setdefault(segment.owner.stage, []).append(place)
        takes = {"next": self._draw_next, "draft": self._extend_drafts, "verify": self._verify_drafts}
        if len(stages) == 1:
            [stage] = stages
            takes[stage]([segment.owner for segment in asking], logits)
            return
        parts = logits.split([segment.reads for segment in asking])
        for stage, places in stages.items():
            takes[stage]([asking[place].owner for place in places], torch.cat([parts[place] for place in places]))

    def _draw_next(self, requests: list[Request], logits: Tensor) -> None:
        """The next token of each request."""
        draws = [self._draws[request.number] for request in requests]
        texts = [request.tokens if request.params.repetition_penalty != 1 else () for request in requests]
        tokens = sample(logits, [request.params for request in requests], draws, texts)
        known = asked_log_probabilities(requests, logits, tokens)
        for request, token, logprobs in zip(requests, tokens.tolist(), known, strict=True):
            if token < 0:
                self._break(request, NOT_FINITE)
                continue
            if not request.new:
                assert request.sequence is not None
                self._keep_text(self.store.fork(request.sequence), request)
            if not request.params.max_new_tokens:
                self._end(request, "length")
                continue
            request.draws += request.params.temperature > 0
            self._take(request, token, logprobs)

    def _extend_drafts(self, requests: list[Request], logits: Tensor) -> None:
        """The next token of each draft."""
        found = self.speculation.extend(requests, logits, [self._draws[request.number] for request in requests])
        for request, is_drawn in zip(requests, found, strict=True):
            self._recall(request)
            if not is_drawn:
                self._break(request, NOT_FINITE)

    def _verify_drafts(self, requests: list[Request], logits: Tensor) -> None:
        """The new tokens of each request whose draft is complete."""
        counts = [1 + len(request.draft.tokens) for request in requests if request.draft is not None]
        found = self.speculation.verify(requests, logits, [self._draws[request.number] for request in requests])
        for request, tokens, own in zip(requests, found, logits.split(counts), strict=True):
            self._recall(request)
            known = asked_log_probabilities([request] * len(tokens), own[: len(tokens)], torch.tensor(tokens))
            for token, logprobs in zip(tokens, known, strict=True):
                if token < 0:
                    self._break(request, NOT_FINITE)
                elif not self._take(request, token, logprobs):
                    break

    def _recall(self, request: Request) -> None:
        """Its newest token is on its way no longer."""
        assert request.sequence is not None
        self.scheduler.recall(request, self.store.tokens(request.sequence))

    def _take(self, request: Request, token: int, logprobs: LogProbs | None) -> bool:
        """A new token of a request; whether it goes on."""
        try:
            event = request.take(token, logprobs)
        except Exception as error:
            self._break(request, _sentence("the tokenizer", error))
            return False
        if event.reason is None:
            self._events.append(event)
        else:
            self._end(request, event.reason, event=event)
        return event.reason is None

    def _end(self, request: Request, reason: Reason, error: str | None = None, event: Event | None = None) -> None:
        """Ends a request, wherever it is, and says so by an event."""
        if reason in ("length", "stop") and request.sequence is not None:
            self._keep_text(request.sequence, request)
            request.sequence = None
        self._forget(request)
        request.error = error
        self.scheduler.end(request, reason)
        del self._draws[request.number]
        if event is None:
            rest = request.text.finish() if request.text is not None and error is None else ""
            event = Event(request.number, None, rest, reason=reason)
        self._events.append(event)

    def _forget(self, request: Request) -> None:
        """Takes a request out of everything but the scheduler."""
        self.traffic.forget(request)
        self.speculation.drop(request)
        if request.sequence is not None:
            self.store.wipe(request.sequence)
            request.sequence = None

    def _keep_text(self, sequence: int, request: Request) -> None:
        """Hands a sequence over, for texts that begin alike."""
        self.prefixes.keep(sequence, request.tokens[: self.store.tokens(sequence)], request.params.depth)

    def _make_room(self) -> None:
        """The pages have run out in the middle of a pass: all start their segments again, without who came last.

        Texts that are only kept for others go before anybody who runs.
        """
        self.traffic.clear()
        victim = self.scheduler.youngest()
        for request in self.scheduler.running:
            assert request.sequence is not None
            if request.draft is not None:
                self.speculation.drop(request)
                rewind(self._draws[request.number], request.draws)
            self.store.truncate(request.sequence, self.store.tokens(request.sequence))
            self._recall(request)
        if self.prefixes.drop_oldest():
            return
        assert victim.sequence is not None
        self.store.wipe(victim.sequence)
        self.scheduler.preempt(victim)


def _sentence(who: str, error: Exception) -> str:
    """What went wrong, in one sentence."""
    message = next(iter(str(error).splitlines()), "").strip().rstrip(".")
    return f"{who} failed with {type(error).__name__}{': ' if message else ''}{message}"
