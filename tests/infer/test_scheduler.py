"""The scheduler by itself: thousands of arrivals, pieces, returns and ends, without a model."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from morex.infer.demand import peak
from morex.infer.request import Params, Request
from morex.infer.scheduler import Scheduler

MOST, CHUNK = 3, 4


class Lives(RuleBasedStateMachine):
    """Every request is in one place, none is forgotten, and whoever came first is served first."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(MOST, CHUNK, patience=1)
        self.requests: list[Request] = []
        self.sent: dict[int, list[int]] = {}
        """Tokens that the model has taken in, or has in hand, of each request that runs."""

    @rule(length=st.integers(1, 10), new=st.integers(1, 9))
    def arrive(self, length: int, new: int) -> None:
        number = len(self.requests)
        request = Request(number, [100 * number + i for i in range(length)], Params(max_new_tokens=new))
        self.requests.append(request)
        self.scheduler.add(request)

    @rule()
    def admit(self) -> None:
        first = self.scheduler.next_to_admit()
        assert (first is None) == (not self.scheduler.waiting or len(self.scheduler.running) == MOST)
        if first is not None:
            assert self.scheduler.admit() is first
            assert first.number == min([first.number, *(request.number for request in self.scheduler.waiting)])
            self.sent[first.number] = []

    @rule()
    def send(self) -> None:
        idle = {request.number for request in self.scheduler.running} - self.scheduler.under_way
        found = self.scheduler.segments()
        assert [request.number for request, _ in found] == sorted(idle)
        for request, tokens in found:
            assert 0 < len(tokens) <= CHUNK
            self.sent[request.number] += tokens

    @precondition(lambda self: self.scheduler.under_way)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.scheduler.under_way)))
        request = self.requests[number]
        if self.scheduler.back(request):
            assert self.sent[number] == request.tokens
            request.new.append(100 * number + 50 + len(request.new))
            if len(request.new) == request.params.max_new_tokens:
                self.scheduler.end(request, "length")
        else:
            assert self.sent[number] == request.tokens[: len(self.sent[number])]

    @precondition(lambda self: self.scheduler.running)
    @rule()
    def make_room(self) -> None:
        victim = self.scheduler.youngest()
        assert victim.number == max(request.number for request in self.scheduler.running)
        self.scheduler.preempt(victim)
        assert self.scheduler.waiting[0] is victim and victim.taken == 0

    @precondition(lambda self: self.scheduler.under_way)
    @rule(data=st.data())
    def recall(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.scheduler.under_way)))
        kept = data.draw(st.integers(0, len(self.sent[number]) - 1))
        self.scheduler.recall(self.requests[number], kept)
        del self.sent[number][kept:]

    @precondition(lambda self: self.scheduler.running or self.scheduler.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        there = [*self.scheduler.running, *self.scheduler.waiting]
        self.scheduler.end(data.draw(st.sampled_from(there)), "cancelled")

    @invariant()
    def everybody_is_in_one_place(self) -> None:
        places = [*self.scheduler.running, *self.scheduler.waiting]
        assert sorted(r.number for r in places) == [r.number for r in self.requests if r.reason is None]
        assert len(self.scheduler.running) <= MOST
        assert self.scheduler.under_way <= {request.number for request in self.scheduler.running}
        numbers = [request.number for request in places]
        assert numbers == sorted(numbers), "somebody has overtaken"


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=100, stateful_step_count=50)


def test_who_is_done_waits_for_others_but_not_for_ever() -> None:
    scheduler = Scheduler(8, CHUNK, patience=2)
    for number in range(6):
        scheduler.add(Request(number, [1], Params()))
        scheduler.admit()
    assert not scheduler.may_leave(0, others=True), "nobody is there"
    assert scheduler.may_leave(6, others=True), "all who run are there"
    assert scheduler.may_leave(1, others=False), "nobody is to be waited for"
    assert [scheduler.may_leave(5, others=True) for _ in range(7)] == [False, False, True] * 2 + [False]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5))
def test_the_peak_of_growing_texts(texts: list[tuple[int, int]]) -> None:
    """Against growing them, a token each at a time."""
    most, alive = 0, list(texts)
    while alive:
        most = max(most, sum(length for length, _ in alive))
        alive = [(length + 1, more - 1) for length, more in alive if more]
    assert peak(texts) == most


@given(*[st.lists(st.integers(), max_size=9)] * 2, st.data(), st.integers(1, 6))
def test_what_comes_next_is_read_from_the_text(
    prompt: list[int], new: list[int], data: st.DataObject, most: int
) -> None:
    request = Request(0, prompt, Params(max_new_tokens=9), new=new)
    request.taken = data.draw(st.integers(0, len(prompt) + len(new)))
    assert request.upcoming(most) == request.tokens[request.taken : request.taken + most]
    assert request.num_tokens == len(request.tokens)
