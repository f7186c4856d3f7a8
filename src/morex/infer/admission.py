"""Who of those that wait may run, by the pages that there are."""

from collections.abc import Callable

from morex.cache.paged import PagedStore
from morex.cache.prefixes import Prefixes
from morex.infer.demand import Demand, peak
from morex.infer.request import Request
from morex.infer.scheduler import Scheduler


class Admission:
    """Lets requests in as long as all that run will fit, and gives them what the store knows of their texts."""

    def __init__(
        self,
        scheduler: Scheduler,
        store: PagedStore,
        prefixes: Prefixes,
        demand: Demand,
        depth: Callable[[Request], int],
    ) -> None:
        """Args:
        depth: recursions that a request's tokens take at most.
        """
        self.scheduler, self.store, self.prefixes = scheduler, store, prefixes
        self.demand, self.depth = demand, depth

    def needed(self, request: Request, tokens: int) -> int:
        """Pages that so many tokens of a request need at most, and a draft beside them."""
        return self.demand.pages(tokens, self.depth(request)) + self._draft(request)

    def _draft(self, request: Request) -> int:
        """Pages that a draft needs at most, with the copies of those that it does not fill first."""
        params = request.params
        return 0 if params.draft is None else self.demand.pages(params.draft, params.draft_depth)

    def admit(self) -> None:
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
        promised = sum(self.needed(other, other.num_ahead) for other in running)
        promised += self.needed(request, request.num_ahead - (0 if known is None else known[1]))
        if promised > self.store.pool.num_free:
            return False
        sequences = [other.sequence for other in running if other.sequence is not None]
        tokens = sum(self.store.tokens(sequence) for sequence in sequences)
        if not tokens:
            return True
        pages_per_token = sum(map(self.store.num_pages, sequences)) / tokens  # less where tokens leave early
        texts = [(other.num_tokens, other.longest - other.num_tokens) for other in [request, *running]]
        drafts = sum(self._draft(other) for other in [request, *running])
        return peak(texts) * pages_per_token + drafts <= self.store.pool.size

    def _known(self, request: Request) -> tuple[int, int] | None:
        """A sequence that has the beginning of a text; a trace wants every token computed."""
        return None if request.params.trace else self.prefixes.find(request.tokens, request.params.depth)

    def _begin(self, request: Request) -> int:
        """A sequence for a request, with what is known of its text; its last token is always computed."""
        found = self._known(request)
        if found is None:
            return self.store.open()
        sequence = self.store.fork(found[0])
        request.taken = min(found[1], request.num_tokens - 1)
        self.store.truncate(sequence, request.taken)
        return sequence
