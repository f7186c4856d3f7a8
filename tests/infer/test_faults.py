"""What goes wrong ends only those who took part in it; the others have the texts that they have alone."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from infer.helpers import TEXT, WORDS, assert_nothing_is_left, engine_of, prompts_of
from morex.data.characters import CharTokenizer
from morex.infer import Engine, Event, Params
from morex.nn import fast
from parity.helpers import eval_model, fresh_model

NEW = 8
PARAMS = [Params(max_new_tokens=NEW, temperature=1.2, seed=seed) for seed in range(5)]


def alone(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [
        model.generate([prompt], max_new_tokens=NEW, temperature=1.2, seed=seed)[0]
        for seed, prompt in enumerate(prompts)
    ]


def once(engine: Engine, name: str, call: int, fault: Callable[[], BaseException]) -> None:
    """The so many-th call of a part of the model fails, half-way: its entries have been written."""
    inner, calls = getattr(engine.passes, name), [0]

    def failing(*given: Any) -> Any:
        calls[0] += 1
        found = inner(*given)
        if calls[0] == call:
            raise fault()
        return found

    setattr(engine.passes, name, failing)


@pytest.mark.parametrize(
    ("case", "name", "call"),
    [
        ("vanilla", "enter", 1), ("mor-expert", "enter", 4), ("mor-expert", "core", 3),
        ("token+shared_first", "core", 6), ("vanilla", "leave", 1), ("act+refresh", "leave", 5),
    ],
)  # fmt: skip
def test_a_fault_in_a_pass_ends_those_who_took_part(case: str, name: str, call: int) -> None:
    model: Any = eval_model(case)
    prompts, engine = prompts_of(case), engine_of(model)
    once(engine, name, call, lambda: RuntimeError("out of luck.\nTraceback"))
    found = engine.generate(prompts, PARAMS)
    ended = [completion for completion in found if completion.reason == "error"]
    assert 0 < len(ended) <= 3, "no more than may run at once"
    assert {completion.error for completion in ended} == {"the model failed with RuntimeError: out of luck"}
    for completion, expected in zip(found, alone(model, prompts), strict=True):
        if completion.reason == "error":
            assert completion.tokens == expected[: len(completion.tokens)]
        else:
            assert (completion.tokens, completion.reason) == (expected, "length")
    assert [completion.tokens for completion in engine.generate(prompts, PARAMS)] == alone(model, prompts)
    assert_nothing_is_left(engine)


def test_every_call_failing_ends_everybody() -> None:
    engine = engine_of(eval_model("mor-expert"))
    engine.passes.enter = lambda segments: 1 / 0  # type: ignore[assignment, return-value]
    found = engine.generate(prompts_of("mor-expert"), Params())
    assert {(completion.reason, completion.error) for completion in found} == {
        ("error", "the model failed with ZeroDivisionError: division by zero")
    }
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("case", ["vanilla", "mor-expert"])
def test_logits_that_are_not_finite_end_one_request(case: str) -> None:
    """In the middle of its text, the others' draws undisturbed."""
    model: Any = eval_model(case)
    prompts, engine = prompts_of(case), engine_of(model)
    leave, seen = engine.passes.leave, [0]

    def spoilt(part: Any) -> Any:
        logits = leave(part).clone()
        for row, segment in enumerate(part.segments):
            if segment.owner.number == 2 and len(segment.owner.new) == 3:
                logits[row, 50] = torch.nan
                seen[0] += 1
        return logits

    engine.passes.leave = spoilt  # type: ignore[method-assign]
    found, expected = engine.generate(prompts, PARAMS), alone(model, prompts)
    assert seen == [1]
    assert (found[2].reason, found[2].error) == ("error", "the logits are not finite, so there is no next token")
    assert found[2].tokens == expected[2][: len(prompts[2]) + 3]
    for number in (0, 1, 3, 4):
        assert (found[number].tokens, found[number].reason) == (expected[number], "length")
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("case", ["vanilla", "mor-expert", "token+shared_first"])
def test_keys_that_are_not_finite_stay_with_their_request(case: str) -> None:
    """A token of one prompt has no finite state, beside others and before others that get its pages."""
    model: Any = fresh_model(case)
    bad = 96
    embed = model.embed

    def spoilt(tokens: Any, packing: Any) -> Any:
        return embed(tokens, packing).masked_fill((tokens == bad)[:, None], torch.nan)

    prompts = [[token % 96 for token in prompt] for prompt in prompts_of(case)]
    expected = [model.eval().generate([prompt], max_new_tokens=NEW)[0] for prompt in prompts]
    model.embed = spoilt
    engine = engine_of(model, most_requests=4)
    first, second = [bad, *range(14)], [*range(6), bad, *range(9)]
    found = engine.generate([first, *prompts, second, *prompts], Params(max_new_tokens=NEW))
    assert [completion.reason for completion in (found[0], found[6])] == ["error", "error"]
    assert [completion.tokens for completion in found[1:6]] == expected
    assert [completion.tokens for completion in found[7:]] == expected


def test_keys_that_are_not_finite_go_with_a_cancelled_request() -> None:
    """Before anybody has seen a logit of it; who gets its pages reads their padding, where no kernel spares it that."""
    model: Any = fresh_model("mor-expert")
    embed, prompts = model.embed, prompts_of("mor-expert")
    expected = [model.eval().generate([prompt], max_new_tokens=NEW)[0] for prompt in prompts]
    engine = engine_of(model)
    with fast.enabled(False):
        model.embed = lambda tokens, packing: embed(tokens, packing) * torch.nan
        number = engine.add([*range(30)], Params())
        for _ in range(6):
            engine.step()
        engine.cancel(number)
        model.embed = embed
        found = engine.generate(prompts, Params(max_new_tokens=NEW))
    assert [completion.tokens for completion in found] == expected


@pytest.mark.parametrize(("name", "call"), [("enter", 1), ("enter", 5), ("core", 4), ("leave", 4)])
def test_an_interrupt_leaves_the_engine_as_if_nothing_had_been(name: str, call: int) -> None:
    model: Any = eval_model("mor-expert")
    prompts, engine = prompts_of("mor-expert"), engine_of(model)
    numbers = [engine.add(prompt, params) for prompt, params in zip(prompts, PARAMS, strict=True)]
    once(engine, name, call, KeyboardInterrupt)
    events: list[Event] = []
    with pytest.raises(KeyboardInterrupt):
        events.extend(iter(engine.stream()))
    engine.store.check()
    rest = list(engine.stream())
    completions = [engine.take(number) for number in numbers]
    assert [completion.tokens for completion in completions] == alone(model, prompts)
    assert rest and all(completion.reason == "length" for completion in completions)
    assert_nothing_is_left(engine)


def test_no_event_is_lost_in_an_interrupt_or_when_nobody_listens_on() -> None:
    model: Any = eval_model("mor-expert")
    prompts, engine = prompts_of("mor-expert"), engine_of(model)
    numbers = [engine.add(prompt, params) for prompt, params in zip(prompts, PARAMS, strict=True)]
    events: list[Event] = []
    for most in (1, 3, 10):
        for event in engine.stream():
            events.append(event)
            if len(events) >= most:
                break
    once(engine, "core", 4, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        while True:
            events += engine.step()
    events += engine.stream()
    for number, prompt, expected in zip(numbers, prompts, alone(model, prompts), strict=True):
        own = [event for event in events if event.number == number]
        assert [event.token for event in own] == expected[len(prompt) :]
        assert [event.reason for event in own] == [None] * (NEW - 1) + ["length"]


def test_generate_that_is_interrupted_leaves_nothing_behind() -> None:
    model: Any = eval_model("mor-expert")
    prompts, engine = prompts_of("mor-expert"), engine_of(model)
    number = engine.add(prompts[0], PARAMS[0])
    once(engine, "leave", 3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts[1:], PARAMS[1:])
    assert list(engine.requests) == [number]
    list(engine.stream())
    assert engine.take(number).tokens == alone(model, prompts)[0]
    assert_nothing_is_left(engine)


def test_a_tokenizer_that_fails_ends_one_request() -> None:
    tokenizer = CharTokenizer(TEXT)
    engine = engine_of(eval_model("mor-expert"), tokenizer=tokenizer)
    numbers = [engine.add(WORDS, Params(max_new_tokens=4, temperature=1.0, seed=seed)) for seed in range(3)]
    text: Any = engine.requests[1].text
    text.add = lambda token: 1 / 0
    list(engine.stream())
    reasons = [engine.take(number) for number in numbers]
    assert [found.reason for found in reasons] == ["length", "error", "length"]
    assert reasons[1].error == "the tokenizer failed with ZeroDivisionError: division by zero"
    assert_nothing_is_left(engine)


def test_a_stream_of_one_request_beside_others() -> None:
    model: Any = eval_model("mor-expert")
    prompts, engine = prompts_of("mor-expert"), engine_of(model)
    other = engine.add(prompts[0], PARAMS[0])
    first, second = (engine.stream_request(prompts[i], PARAMS[i]) for i in (1, 2))
    turns = [(next(first), next(second)) for _ in range(NEW)]
    assert next(first, None) is None and next(second, None) is None
    for place, stream in enumerate((first, second)):
        assert stream.completion is not None
        assert stream.completion.tokens == alone(model, prompts)[1 + place]
        assert [turn[place].token for turn in turns] == stream.completion.new
    events = list(engine.stream())
    assert {event.number for event in events} == {other} and len(events) == NEW, "they have waited for the other"
    assert list(engine.requests) == [other]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("how", ["close", "with", "let go"])
def test_a_stream_that_is_left_cancels_its_request(how: str, begun: bool) -> None:
    model: Any = eval_model("mor-expert")
    prompts, engine = prompts_of("mor-expert"), engine_of(model)
    other = engine.add(prompts[0], PARAMS[0])
    stream = engine.stream_request(prompts[1], Params(max_new_tokens=1000))
    if begun:
        next(stream)
    if how == "let go":
        del stream
        gc.collect()
    else:
        if how == "close":
            stream.close()
            stream.close()
        else:
            with stream:
                pass
        assert stream.completion is not None and stream.completion.reason == "cancelled"
        assert len(stream.completion.new) == (1 if begun else 0)
        assert list(stream) == []
    list(engine.stream())
    assert engine.take(other).tokens == alone(model, prompts)[0]
    assert not engine.requests
    assert_nothing_is_left(engine)


def test_who_is_cancelled_hears_of_it_and_nobody_asks_twice() -> None:
    engine = engine_of(eval_model("mor-expert"))
    number = engine.add([1, 2], Params(max_new_tokens=50))
    engine.step()
    engine.cancel(number)
    engine.cancel(number)
    assert [(event.number, event.token, event.reason) for event in engine.stream()] == [(number, None, "cancelled")]
    assert engine.take(number).reason == "cancelled"
    for ask in (engine.take, engine.cancel, engine.next_event):
        with pytest.raises(ValueError, match=f"there is no request {number}"):
            ask(number)
    going = engine.add([1])
    with pytest.raises(ValueError, match=f"request {going} goes on"):
        engine.take(going)
