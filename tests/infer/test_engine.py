"""The engine against the plain cached loop: whoever else is there, a request's text is what it is alone."""

import math
import random
from typing import Any

import pytest
import torch

from infer.helpers import assert_nothing_is_left, bytes_of, engine_of, prompts_of
from morex.infer.engine import Engine
from morex.infer.lists import PassLists
from morex.infer.request import Params, Request
from morex.nn import fast
from parity.helpers import LM_CASES, PRESETS, cases, eval_model

NEW = 6
DEPTHS: list[int | str | None] = [None, "uniform:2", 1, "adaptive:8", "progressive:12"]
FORKED = ["token+shared_first", "act+refresh", "expert+recursive_experts"]


def texts_of(engine: Engine, prompts: list[list[int]], params: Params) -> list[list[int]]:
    """Prompts with their continuations."""
    return [completion.tokens for completion in engine.generate(prompts, params)]


@pytest.mark.parametrize("case", LM_CASES)
def test_greedy_texts_are_those_of_the_plain_loop(case: str) -> None:
    """More requests than may run at once, prompts in pieces, pages that end anywhere, in float64."""
    model: Any = eval_model(case)
    prompts = prompts_of(case)
    engine = engine_of(model)
    assert texts_of(engine, prompts, Params(max_new_tokens=NEW)) == model.generate(prompts, max_new_tokens=NEW)
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("case", LM_CASES)
def test_log_probabilities_are_those_of_a_full_pass(case: str) -> None:
    """In fp32, in which kernels take what they know: of every new token, by the pass over the whole text."""
    model: Any = eval_model(case, torch.float32)
    for completion in engine_of(model).generate(prompts_of(case), Params(max_new_tokens=NEW, logprobs=0)):
        with torch.no_grad():
            logits = model(torch.tensor([completion.tokens[:-1]])).logits[0, -NEW:]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.new)[:, None]).squeeze(1)
        assert completion.logprobs is not None
        found = torch.tensor([own.token for own in completion.logprobs])
        assert torch.allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.skipif(not fast.is_native(), reason="there is no C++ compiler on this machine")
@pytest.mark.parametrize("case", ["vanilla", "act+norms", "token+shared_first", "recursive+window"])
def test_the_kernel_has_part_in_it(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    walk = fast.Walk.__call__
    monkeypatch.setattr(fast.Walk, "__call__", lambda self, x, *rest: (calls.append(len(x)), walk(self, x, *rest))[1])
    engine_of(eval_model(case, torch.float32)).generate(prompts_of(case), Params(max_new_tokens=NEW))
    assert len(calls) > NEW


@pytest.mark.parametrize(
    "case", ["recursive", "mor-expert", "token+shared_first", "threshold+refresh", "mor-act", "sequence+window"]
)
def test_requests_have_depths_of_their_own(case: str) -> None:
    model: Any = eval_model(case)
    prompts, engine = prompts_of(case), engine_of(model)
    options = [Params(max_new_tokens=NEW, depth=depth) for depth in DEPTHS]
    numbers = [engine.add(prompt, params) for prompt, params in zip(prompts, options, strict=True)]
    list(engine.stream())
    for number, prompt, params in zip(numbers, prompts, options, strict=True):
        alone = model.generate([prompt], max_new_tokens=NEW, depth=params.depth)[0]
        assert engine.requests[number].tokens == alone


@pytest.mark.parametrize("case", cases("sampled", "exit_gate", head="lm"))
def test_exit_rules(case: str) -> None:
    model: Any = eval_model(case)
    prompts = prompts_of(case)
    for depth in ("exit", *(f"exit:{rule}" for rule in model.stack.core.groups[0].router.exit_rules)):
        found = texts_of(engine_of(model), prompts, Params(max_new_tokens=NEW, depth=depth))
        assert found == model.generate(prompts, max_new_tokens=NEW, depth=depth)


@pytest.mark.parametrize("case", ["vanilla", "mor-expert", "mor-token", "more-tuned", "act+refresh"])
def test_draws_are_those_of_the_request_alone(case: str) -> None:
    model: Any = eval_model(case)
    engine = engine_of(model)
    options = {"max_new_tokens": 8, "temperature": 1.3, "top_k": 40, "top_p": 0.95}
    prompts = prompts_of(case)
    numbers = [engine.add(prompt, Params(**options, seed=seed)) for seed, prompt in enumerate(prompts)]
    list(engine.stream())
    for seed, (number, prompt) in enumerate(zip(numbers, prompts, strict=True)):
        assert engine.requests[number].tokens == model.generate([prompt], seed=seed, **options)[0]


def test_tokens_at_different_recursions_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []
    begin = PassLists.__init__

    def noted(self: Any, store: Any, rule: Any, block: int, *rest: Any) -> None:
        begin(self, store, rule, block, *rest)
        seen.append(set(self.recursions))

    monkeypatch.setattr(PassLists, "__init__", noted)
    engine_of(eval_model("mor-expert"), most_requests=8).generate(prompts_of("mor-expert", [4, 2, 3, 1, 4, 2]))
    assert any(len(recursions) > 1 for recursions in seen)


@pytest.mark.parametrize(
    "case", ["vanilla", "mor-expert", "token+shared_first", "act+refresh", "expert+recursive_experts"]
)
def test_a_small_cache_takes_longer_and_says_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are sent back and computed again when pages run out."""
    model: Any = eval_model(case)
    prompts, new = prompts_of(case, [2, 1, 3, 2]), 24
    engine = engine_of(model, bytes_of(model, 3 + new), most_requests=4)
    sent_back: list[int] = []
    preempt = engine.scheduler.preempt

    def noted(request: Request) -> None:
        sent_back.append(request.number)
        preempt(request)

    monkeypatch.setattr(engine.scheduler, "preempt", noted)
    assert texts_of(engine, prompts, Params(max_new_tokens=new)) == model.generate(prompts, max_new_tokens=new)
    assert sent_back and 0 not in sent_back, "who came first goes on"
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("case", ["mor-expert", "act+refresh"])
def test_arrivals_and_cancellations_at_any_time(case: str) -> None:
    """Whoever is left has the text that it has alone."""
    model: Any = eval_model(case)
    rng = random.Random(0)
    prompts = prompts_of(case, [rng.randint(1, 12) for _ in range(24)])
    engine = engine_of(model, bytes_of(model, 40), most_requests=4)
    waiting, known, cancelled = list(prompts), {}, set()
    while waiting or not engine.is_idle:
        if waiting and rng.random() < 0.4:
            prompt = waiting.pop()
            known[engine.add(prompt, Params(max_new_tokens=rng.randint(1, 9)))] = prompt
        if known and rng.random() < 0.1:
            number = rng.choice(list(known))
            if engine.requests[number].reason is None:
                cancelled.add(number)
            engine.cancel(number)
        engine.step()
        engine.store.check()
    assert cancelled and len(cancelled) < len(known)
    for number, prompt in known.items():
        request = engine.requests[number]
        alone = model.generate([prompt], max_new_tokens=request.params.max_new_tokens)[0]
        assert request.tokens == alone if number not in cancelled else request.tokens == alone[: len(request.tokens)]
        assert request.reason == ("cancelled" if number in cancelled else "length")
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("case", [case for case in LM_CASES if case in PRESETS or case in FORKED])
def test_texts_that_begin_alike_are_computed_once(case: str) -> None:
    """At the same time, one after the other, and after the first has ended; they part within a page."""
    model: Any = eval_model(case)
    first, second, third = prompts_of(case, [11, 9, 4])
    second, third = first[:7] + second[7:], first + third
    engine, sent = engine_of(model), []
    enter = engine.passes.enter
    engine.passes.enter = lambda segments: (sent.append(sum(len(s.tokens) for s in segments)), enter(segments))[1]
    texts = [texts_of(engine, [prompt], Params(max_new_tokens=4))[0] for prompt in (first, second, third)]
    assert texts == [model.generate([prompt], max_new_tokens=4)[0] for prompt in (first, second, third)]
    shared = [0, 7, 11 if texts[0][11] != third[11] else 12]
    assert sum(sent) == sum(len(text) - 1 - known for text, known in zip(texts, shared, strict=True))
    assert texts_of(engine, [third, first], Params(max_new_tokens=4)) == [texts[2], texts[0]]
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("case", ["vanilla", "mor-expert", "mor-act", "act+refresh", "sequence+window"])
@pytest.mark.parametrize("options", [{"lockstep": True}, {"patience": 0}, {"patience": 3}])
def test_when_tokens_leave_changes_no_text(case: str, options: dict[str, Any]) -> None:
    model: Any = eval_model(case)
    prompts, engine = prompts_of(case), engine_of(model, most_requests=5, **options)
    assert texts_of(engine, prompts, Params(max_new_tokens=NEW)) == model.generate(prompts, max_new_tokens=NEW)
    assert_nothing_is_left(engine)


def test_in_lockstep_nobody_is_on_the_way_between_steps() -> None:
    engine = engine_of(eval_model("mor-expert"), lockstep=True)
    for prompt in prompts_of("mor-expert"):
        engine.add(prompt, Params(max_new_tokens=NEW))
    while not engine.is_idle:
        engine.step()
        assert not engine.traffic.flights and not engine.traffic.arrived


@pytest.mark.parametrize("most_requests", [5, 6])
def test_a_step_goes_on_as_long_as_nobody_can_come_or_go(most_requests: int) -> None:
    """With room for one more request it is one pass through the core, lest that one wait."""
    engine = engine_of(eval_model("mor-expert"), most_requests=most_requests, patience=2)
    prompts, passes, core = prompts_of("mor-expert"), 0, engine.passes.core

    def counted(*given: Any) -> Any:
        nonlocal passes
        passes += 1
        return core(*given)

    engine.passes.core = counted  # type: ignore[method-assign]
    for prompt in prompts:
        engine.add(prompt, Params(max_new_tokens=NEW))
    taken = []
    while True:
        passes = 0
        engine.step()
        if len(engine.scheduler.running) < len(prompts):
            break
        taken.append(passes)
        assert most_requests > 5 or not engine.traffic.waiting
    assert max(taken) == (3 if most_requests == 5 else 1)


def test_waiting_to_leave_saves_passes_through_coda_and_head() -> None:
    leaves = {}
    for patience in (0, 2):
        engine = engine_of(eval_model("mor-expert"), most_requests=8, patience=patience)
        left, leave = [], engine.passes.leave
        engine.passes.leave = lambda part, left=left, leave=leave: (left.append(part), leave(part))[1]
        engine.generate(prompts_of("mor-expert", [4, 2, 3, 1, 4, 2]), Params(max_new_tokens=12))
        leaves[patience] = len(left)
    assert leaves[2] < leaves[0]


def test_another_depth_is_another_text() -> None:
    model: Any = eval_model("mor-expert")
    (prompt,) = prompts_of("mor-expert", [9])
    engine = engine_of(model)
    for depth in (None, "uniform:2", 1):
        found = texts_of(engine, [prompt], Params(max_new_tokens=4, depth=depth))
        assert found == model.generate([prompt], max_new_tokens=4, depth=depth)


def test_a_text_ends_at_its_end_token() -> None:
    model: Any = eval_model("mor-threshold")
    (prompt,) = prompts_of("mor-threshold", [6])
    free = model.generate([prompt], max_new_tokens=8)[0]
    end = free[8]
    engine = engine_of(model)
    number = engine.add(prompt, Params(max_new_tokens=8, eos_id=end))
    events = list(engine.stream())
    assert [event.token for event in events] == free[6 : free.index(end, 6) + 1]
    assert events[-1].reason == engine.requests[number].reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "params", "sentence"),
    [
        ([], {}, "at least one token id"),
        ("text", {}, r"needs Engine\(model, tokenizer\)"),
        ([97], {}, r"token id 97 is outside the vocabulary of 97"),
        ([1], {"depth": 7}, r"depth 7 .* 1 to 3"),
        ([1], {"depth": "oracle"}, "oracle"),
        ([1], {"top_k": 3}, "no effect at temperature 0"),
        ([1], {"max_new_tokens": 4000}, r"up to 4000 tokens needs \d+ pages, and the cache has \d+; give a larger"),
    ],
)
def test_impossible_requests_are_refused_and_harm_nobody(prompt: Any, params: dict[str, Any], sentence: str) -> None:
    model: Any = eval_model("mor-expert")
    engine = engine_of(model, bytes_of(model, 60))
    (good,) = prompts_of("mor-expert", [4])
    number = engine.add(good, Params(max_new_tokens=4))
    engine.step()
    with pytest.raises(ValueError, match=sentence) as refusal:
        engine.add(prompt, Params(**params))
    assert "\n" not in str(refusal.value)
    list(engine.stream())
    assert engine.requests[number].tokens == model.generate([good], max_new_tokens=4)[0]


@pytest.mark.parametrize("case", [case for case in LM_CASES if case in PRESETS or case in FORKED])
def test_traces_are_those_of_a_forward_pass(case: str) -> None:
    """Depths, scores and experts of every token, whoever else is there, prompts in pieces and texts computed again."""
    model: Any = eval_model(case)
    prompts = prompts_of(case)
    engine = engine_of(model, most_requests=5)
    numbers = [engine.add(prompt, Params(max_new_tokens=4, trace=True)) for prompt in prompts]
    depths: dict[int, list[int]] = {}
    for event in engine.stream():
        depths.setdefault(event.number, []).append(event.depth)
    for number, prompt in zip(numbers, prompts, strict=True):
        request = engine.requests[number]
        found, tokens = request.trace, request.tokens[:-1]
        wanted = model(torch.tensor([tokens]), return_trace=True).trace
        assert found.depth == wanted.depth[0].tolist()
        assert depths[number] == found.depth[len(prompt) - 1 :]
        for name, scores in wanted.scores.items():
            for time, own in enumerate(found.scores.get(f"{name}.router", [[]] * len(tokens))):
                alone = [score[0, time].item() for score in scores[: len(own)]]
                assert own == [None if math.isnan(score) else pytest.approx(score, abs=1e-9) for score in alone]
        assert found.scores.keys() == {f"{name}.router" for name, scores in wanted.scores.items() if scores}
        assert found.experts.keys() == wanted.experts.keys()
        for name, choices in wanted.experts.items():
            for time, own in enumerate(found.experts[name]):
                assert own == [choice[0, time].tolist() for choice in choices if choice[0, time, 0] >= 0]
