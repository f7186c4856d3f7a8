"""What a decoding benchmark asks of an engine, and what it makes of the answers; time is a number here."""

from collections.abc import Sequence
from itertools import pairwise

import pytest

from morex.data.tokenizer import Tokenizer
from morex.infer.request import Event, Params
from morex.study.workload import Workload, drive, made_up_tokenizer, make_workload, poisson


class Clockwork:
    """An engine whose step takes one second and gives every request one token."""

    def __init__(self) -> None:
        self.now = 0.0
        self.left: dict[int, int] = {}
        self.running: list[int] = []
        self.prompts: list[list[int]] = []
        self.taken: list[int] = []

    def add(self, prompt: Sequence[int], params: Params | None = None) -> int:
        assert params is not None and params.eos_id is None
        self.prompts.append(list(prompt))
        self.left[len(self.prompts) - 1] = params.max_new_tokens
        return len(self.prompts) - 1

    def step(self) -> list[Event]:
        self.now += 1.0
        self.running.append(len(self.left))
        events = []
        for number in list(self.left):
            self.left[number] -= 1
            if not self.left[number]:
                del self.left[number]
            events.append(Event(number, 0, reason=None if number in self.left else "length"))
        return events

    def take(self, number: int) -> None:
        self.taken.append(number)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return made_up_tokenizer(400)


def test_a_closed_loop_keeps_its_concurrency(tokenizer: Tokenizer) -> None:
    engine, work = Clockwork(), make_workload(tokenizer, 9, (2, 5), 4)
    served = drive(engine, tokenizer, work, 3, now=lambda: engine.now)
    assert engine.running == [3] * 12
    assert engine.prompts == [
        tokenizer.encode(text)[:length] for text, length in zip(work.texts, work.lengths, strict=True)
    ]
    assert sorted(engine.taken) == list(range(9))
    assert (served.tokens, served.seconds) == (9 * 4, 12.0)
    assert served.ttft == [1.0] * 9
    assert served.tpot == [1.0] * 9


def test_poisson_arrivals_wait_for_nobody(tokenizer: Tokenizer) -> None:
    """Time to the first token counts from the arrival, not from the step that saw it; an idle engine waits."""
    texts = make_workload(tokenizer, 4, (2, 2), 3)
    work = Workload(texts.texts, texts.lengths, 3, arrivals=[0.5, 1.25, 1.75, 9.0])
    engine = Clockwork()
    served = drive(engine, tokenizer, work, 1, now=lambda: engine.now, sleep=engine.sleep)
    # The first comes at 0.5, its step ends at 1.5 and sees the second, the next at 2.5 and sees the third.
    assert engine.running == [1, 2, 3, 2, 1, 1, 1, 1]
    assert served.ttft == [1.0, 1.25, 1.75, 1.0]
    assert served.waiting == 0.5 + 3.5
    assert (served.tokens, served.seconds) == (12, 12.0)


def test_poisson_times_follow_seed_and_rate() -> None:
    times = poisson(4000, 8.0, seed=3)
    assert times == poisson(4000, 8.0, seed=3) != poisson(4000, 8.0, seed=4)
    gaps = [later - earlier for earlier, later in pairwise([0.0, *times])]
    mean = sum(gaps) / len(gaps)
    assert min(gaps) > 0
    assert mean == pytest.approx(1 / 8, rel=0.05)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)


def test_prompts_have_their_lengths(tokenizer: Tokenizer) -> None:
    work = make_workload(tokenizer, 40, (3, 9), 1, seed=5)
    assert set(work.lengths) == set(range(3, 10))
    for text, length in zip(work.texts, work.lengths, strict=True):
        assert length <= len(tokenizer.encode(text)) <= length + 10
    assert work == make_workload(tokenizer, 40, (3, 9), 1, seed=5)
    assert work.texts != make_workload(tokenizer, 40, (3, 9), 1, seed=6).texts
    assert len(set(work.texts)) == len(work)


def test_tokenizers_of_any_size() -> None:
    """Ids stay inside the model's vocabulary and fill most of it."""
    assert made_up_tokenizer(3000).vocab_size == 3000
    small = made_up_tokenizer(60)
    assert (small.kind, small.vocab_size) == ("char", 27)
    with pytest.raises(ValueError, match=r"model.vocab_size 20 has no room for 26 letters"):
        made_up_tokenizer(20)
