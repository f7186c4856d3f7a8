"""Who runs, who waits, and what each sends into the model next. Plain Python, no tensors."""

from collections import deque
from collections.abc import Iterable

from morex.infer.request import Reason, Request


class Scheduler:
    """First come, first served; who came last makes room."""

    def __init__(self, most_requests: int, chunk: int, patience: int) -> None:
        """Args:
        most_requests: that run at the same time.
        chunk: tokens of a prompt that go into the model at once.
        patience: passes through the core that those who are done with it wait for others, to leave with them.
        """
        self.most_requests, self.chunk, self.patience = most_requests, chunk, patience
        self.waited = 0
        """Passes that somebody has waited to leave."""
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.under_way: set[int] = set()
        """Requests with tokens on their way through the model, by number."""

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def next_to_admit(self) -> Request | None:
        """Who may run next, if there is room for one more."""
        return self.waiting[0] if self.waiting and len(self.running) < self.most_requests else None

    def admit(self) -> Request:
        """Lets the first of those who wait run."""
        request = self.waiting.popleft()
        self.running.append(request)
        return request

    @property
    def is_full(self) -> bool:
        """Whether nobody else may run."""
        return len(self.running) == self.most_requests

    def segments(self) -> list[tuple[Request, list[int]]]:
        """What each request without tokens under way sends in now: a piece of its prompt, or its newest token."""
        found = []
        for request in self.running:
            if request.number not in self.under_way:
                tokens = request.upcoming(self.chunk)
                if request.num_drafts and len(tokens) > 1 and request.taken + len(tokens) == request.num_tokens:
                    tokens.pop()  # drafts begin at the newest token, which goes in by itself
                found.append((request, tokens))
                self.under_way.add(request.number)
                request.taken += len(tokens)
        return found

    def may_leave(self, waiting: int, others: bool) -> bool:
        """Whether those who are done with the core go on now, or wait a pass for more.

        Coda and head cost nearly as much for one token as for many: that is why waiting can pay.

        Args:
            waiting: requests that are done with the core.
            others: whether anybody else is on the way.
        """
        is_full = waiting == len(self.running)
        if not waiting or is_full or not others or self.waited >= self.patience:
            self.waited = 0
            return bool(waiting)
        self.waited += 1
        return False

    def back(self, request: Request) -> bool:
        """A segment has come out of the model; whether it was the last of what is known of the text."""
        self.under_way.discard(request.number)
        return request.taken == request.num_tokens

    def youngest(self) -> Request:
        """Who makes room for the others."""
        return self.running[-1]

    def preempt(self, request: Request) -> None:
        """Sends a running request back to wait, first in line; all that it had in the store is computed again."""
        self.running.remove(request)
        self.under_way.discard(request.number)
        request.taken, request.sequence = 0, None
        self.waiting.appendleft(request)

    def recall(self, request: Request, taken: int) -> None:
        """Takes back what a request has under way: the model has taken in so many of its tokens."""
        self.under_way.discard(request.number)
        request.taken = taken

    def restart(self, requests: Iterable[Request]) -> None:
        """Lets these wait, in their order, with nothing in the store, and forgets everybody else."""
        self.running.clear()
        self.under_way.clear()
        self.waiting = deque(requests)
        for request in self.waiting:
            request.taken, request.sequence = 0, None

    def end(self, request: Request, reason: Reason) -> None:
        """Ends a request, wherever it is."""
        request.reason = reason
        self.under_way.discard(request.number)
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
