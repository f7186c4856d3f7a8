"""Self-speculation: the likeliest texts are those of the plain loop, drawn ones are distributed alike."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from infer.helpers import FULL, TEXT, WORDS, assert_nothing_is_left, bytes_of, engine_of, prompts_of
from infer.test_faults import once
from morex import build_model, load_config
from morex.data.characters import CharTokenizer
from morex.infer import Completion, Engine, Params
from morex.infer.request import Draft
from morex.infer.speculation import verified
from morex.model.sampling import Sampling, distribution, draw, generator_of, sample
from parity.helpers import eval_model, fresh_model

NEW = 9
SEEDS = 600
DRAFT = Params(max_new_tokens=NEW, draft=3)
CASES = [
    "recursive", "recursive+shared_first", "recursive+refresh", "recursive+window", "mor-expert", "mor-token",
    "token+shared_first", "mor-threshold", "threshold+refresh", "mor-act", "act+refresh", "sequence+window", "huginn",
    "ouro", "ouro+shared_first", "mor-random", "expert+recursive_experts", "token+refresh+recursive_experts",
]  # fmt: skip


def drafted(found: list[Completion]) -> tuple[int, int]:
    """Tokens that were drafted, and accepted."""
    return sum(done.drafted for done in found), sum(done.accepted for done in found)


@pytest.mark.parametrize("case", CASES)
def test_greedy_texts_are_those_of_the_plain_loop(case: str) -> None:
    """Drafts of several sizes and depths beside each other and beside who does not draft, prompts in pieces."""
    model: Any = eval_model(case)
    prompts, engine = prompts_of(case), engine_of(model)
    plain = Params(max_new_tokens=NEW)
    params = [DRAFT, plain, replace(DRAFT, draft=1), replace(DRAFT, draft_depth=2), replace(DRAFT, draft=16)]
    found = engine.generate(prompts, params)
    assert [done.tokens for done in found] == model.generate(prompts, max_new_tokens=NEW)
    assert drafted(found)[0] > 0 and found[1].drafted == 0
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("depth", ["uniform:2", "adaptive:8", "exit"])
def test_a_request_is_verified_at_its_own_depth(depth: str) -> None:
    case = "ouro+shared_first"
    model: Any = eval_model(case)
    prompts, engine = prompts_of(case), engine_of(model, most_requests=5, lockstep=True)
    found = engine.generate(prompts, replace(DRAFT, depth=depth))
    assert [done.tokens for done in found] == model.generate(prompts, max_new_tokens=NEW, depth=depth)


@pytest.mark.parametrize("case", ["recursive", "mor-expert", "token+shared_first", "act+refresh", "mor-random"])
def test_drafts_at_full_depth_are_all_accepted(case: str) -> None:
    """The request itself goes no deeper than its drafts, so that both have the same logits."""
    model: Any = eval_model(case)
    for options in ({}, {"temperature": 1.2, "top_k": 9, "seed": 4}):
        engine = engine_of(model)
        found = engine.generate(prompts_of(case), replace(DRAFT, depth=1, **options))
        assert drafted(found) == (30, 30), "of 8 tokens after the first: 3, one more, 3, one more"
        assert_nothing_is_left(engine)


def test_a_router_that_stops_everybody_accepts_all_drafts() -> None:
    model: Any = fresh_model("mor-threshold").eval()
    model.stack.core.groups[0].router.threshold[1:] = torch.inf
    prompts, engine = prompts_of("mor-threshold"), engine_of(model)
    found = engine.generate(prompts, DRAFT)
    assert [done.tokens for done in found] == model.generate(prompts, max_new_tokens=NEW)
    assert drafted(found) == (30, 30)


def chi_square(found: Tensor, wanted: Tensor) -> float:
    """Of counts, over what it is at most but once in millions: five standard deviations above its mean."""
    there = wanted >= 4
    found, wanted = (torch.cat([part[there], part[~there].sum(0, keepdim=True)]) for part in (found, wanted))
    parts = (found - wanted) ** 2 / wanted.clamp(min=1)
    degrees = max(1, len(wanted) - 1)
    return float(parts.sum()) / (degrees + 5 * (2 * degrees) ** 0.5)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 4, "top_p": 0.95, "repetition_penalty": 1.5}],
    ids=str,
)
def test_drawn_texts_have_the_distribution_of_the_full_depth(options: dict[str, Any]) -> None:
    """All texts of three tokens, by many seeds: the first is drawn by itself, the others are drafted."""
    sizes = ["model.vocab_size=5", "model.d_model=16", "model.attention={heads: 2, head_dim: 8}"]
    model: Any = build_model(load_config("recursive", sizes, tiny=True).model).double().eval()
    generator = torch.Generator().manual_seed(2)
    odds, texts = torch.ones(1, dtype=torch.float64), [[1, 2, 3]]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        for _ in range(3):
            logits = model(torch.tensor(texts)).logits[:, -1]
            odds = (odds[:, None] * distribution(logits, [Sampling(**options)] * len(texts), texts)).flatten()
            texts = [[*text, token] for text in texts for token in range(5)]
    params = [Params(max_new_tokens=4, seed=seed, draft=2, **options) for seed in range(SEEDS)]
    found = engine_of(model, most_requests=SEEDS).generate([[1, 2, 3]] * SEEDS, params)
    number, accepted = drafted(found)
    assert 0.2 * number < accepted < 0.9 * number
    texts_found = torch.tensor([25 * done.new[0] + 5 * done.new[1] + done.new[2] for done in found])
    counts = texts_found.bincount(minlength=125)
    assert not counts[odds == 0].any()
    for tokens in (1, 2):
        shape = (-1, 5**tokens)  # the last tokens of three
        assert chi_square(counts.view(shape).sum(0), SEEDS * odds.view(shape).sum(0)) <= 1
    assert chi_square(counts, SEEDS * odds) <= 1


def test_what_stays_of_a_draft_is_distributed_as_the_full_depth() -> None:
    """Two drafted tokens by other odds than the right ones, of which one token has none."""
    offered = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.1, 0.1, 0.7]], dtype=torch.float64)
    asked = torch.tensor([[0.2, 0.3, 0.0, 0.5], [0.4, 0.2, 0.3, 0.1], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
    generator, draws = generator_of(0, 0), 4000
    counts = torch.zeros(3, 4)
    for _ in range(draws):
        tokens = draw(offered, [generator] * 2).tolist()
        for place, token in enumerate(verified(asked, Draft(None, tokens, list(offered)), generator)):
            counts[place, token] += 1
    assert counts[0].sum() == draws > counts[1].sum() > counts[2].sum() > 0
    for place in range(3):
        wanted = asked[place] * counts[place].sum()
        assert not counts[place][wanted == 0].any()
        there = wanted > 0
        assert float(((counts[place] - wanted)[there] ** 2 / wanted[there]).sum()) <= 3 + 5 * 6**0.5


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str)
def test_a_distribution_is_that_of_the_draws(filters: dict[str, Any]) -> None:
    own = Sampling(temperature=1.3, repetition_penalty=1.4, **filters)
    logits = 2 * torch.randn(1, 12, generator=torch.Generator().manual_seed(5))
    (odds,) = distribution(logits, [own], [[0, 3]])
    draws, generator = 8000, generator_of(1, 0)
    tokens = sample(logits.expand(draws, -1), [own] * draws, [generator] * draws, [[0, 3]] * draws)
    found = tokens.bincount(minlength=12)
    assert odds.sum() == pytest.approx(1) and not found[odds == 0].any()
    there = odds > 0
    degrees = int(there.sum()) - 1
    parts = (found - draws * odds)[there] ** 2 / (draws * odds[there])
    assert float(parts.sum()) <= degrees + 5 * (2 * degrees) ** 0.5


def test_a_distribution_without_temperature_and_one_of_nothing() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, torch.nan, 1.0], [-torch.inf] * 3])
    odds = distribution(logits, [Sampling()] * 3)
    assert odds.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert draw(odds, [generator_of(0, row) for row in range(3)]).tolist() == [1, -1, -1]


@pytest.mark.parametrize("case", ["mor-expert", "token+shared_first", "act+refresh"])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_small_cache_and_neighbours_change_nothing(
    case: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are sent back in the middle of drafts and computed again; draws are those of the request alone."""
    model: Any = eval_model(case)
    prompts, new = prompts_of(case, [2, 1, 3, 2]), 16
    seeds = range(len(prompts)) if temperature else [None] * len(prompts)
    params = [Params(max_new_tokens=new, temperature=temperature, seed=seed, draft=3) for seed in seeds]
    alone = [engine_of(model).generate([prompt], own)[0] for prompt, own in zip(prompts, params, strict=True)]
    engine = engine_of(model, bytes_of(model, 3 + new) + bytes_of(model, 3), most_requests=4)
    dropped: list[bool] = []
    make_room = engine._make_room

    def noted() -> None:
        dropped.append(any(request.draft is not None for request in engine.scheduler.running))
        make_room()

    monkeypatch.setattr(engine, "_make_room", noted)
    found = engine.generate(prompts, params)
    assert [done.tokens for done in found] == [done.tokens for done in alone]
    assert any(dropped)
    assert_nothing_is_left(engine)


def test_cancellation_at_any_time_leaves_nothing() -> None:
    model: Any = eval_model("mor-expert")
    prompts = prompts_of("mor-expert", [4, 2])
    expected = model.generate(prompts, max_new_tokens=NEW)
    steps, stages = 1, set()
    while True:
        engine = engine_of(model, prefixes=1)
        first, second = (engine.add(prompt, DRAFT) for prompt in prompts)
        for _ in range(steps):
            engine.step()
        if engine.requests[first].reason is not None:
            break
        stages.add(engine.requests[first].stage)
        engine.cancel(first)
        engine.store.check()
        list(engine.stream())
        assert engine.take(second).tokens == expected[1]
        done = engine.take(first)
        assert done.tokens == expected[0][: len(done.tokens)]
        assert_nothing_is_left(engine)
        steps += 1
    assert stages == {"next", "draft", "verify"}


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize(("name", "call"), [("enter", 4), ("core", 9), ("leave", 5), ("leave", 8)])
def test_a_fault_or_an_interrupt_leaves_nothing(name: str, call: int, fault: type[BaseException]) -> None:
    model: Any = eval_model("mor-expert")
    prompts = prompts_of("mor-expert")
    params = [replace(DRAFT, temperature=1.2, seed=seed) for seed in range(len(prompts))]
    alone = [engine_of(model).generate([prompt], own)[0].tokens for prompt, own in zip(prompts, params, strict=True)]
    engine = engine_of(model)
    numbers = [engine.add(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    once(engine, name, call, fault)
    if fault is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            list(engine.stream())
    list(engine.stream())
    found = [engine.take(number) for number in numbers]
    ended = [done for done in found if done.reason == "error"]
    assert bool(ended) == (fault is ZeroDivisionError)
    for done, expected in zip(found, alone, strict=True):
        assert done.tokens == (expected[: len(done.tokens)] if done in ended else expected)
    assert_nothing_is_left(engine)


def test_ends_log_probabilities_and_traces_hold_for_every_token() -> None:
    """The same events as without drafts: an end id, a stop string, the last token, and what was asked about each."""
    model: Any = eval_model("mor-token")
    tokenizer = CharTokenizer(TEXT)
    (free,) = Engine(model, tokenizer, cache_bytes=FULL).generate([WORDS], Params(max_new_tokens=12))
    ends: list[dict[str, Any]] = [{"eos_id": free.new[7]}, {"stop": [free.text[5:7]]}, {"stop_ids": free.new[4:5]}, {}]
    for end in ends:
        for depth in (None, 1):
            events, found = [], []
            for draft in (None, 4):
                engine = engine_of(model, tokenizer=tokenizer)
                params = Params(max_new_tokens=12, logprobs=2, trace=True, depth=depth, draft=draft, **end)
                with engine.stream_request(WORDS, params) as stream:
                    events.append([(event.token, event.text, event.reason, event.depth) for event in stream])
                assert stream.completion is not None
                found.append(stream.completion)
                assert_nothing_is_left(engine)
            assert events[0] == events[1]
            plain, speculative = found
            assert (plain.text, plain.new, plain.reason) == (speculative.text, speculative.new, speculative.reason)
            assert plain.trace.depth == speculative.trace.depth[: len(plain.trace.depth)]
            for a, b in zip(plain.logprobs, speculative.logprobs, strict=True):
                assert a.token == pytest.approx(b.token) and [i for i, _ in a.likeliest] == [i for i, _ in b.likeliest]


@pytest.mark.parametrize(
    ("case", "options", "sentence"),
    [
        ("mor-expert", {"draft": 0}, "draft 0 must be an integer from 1 to 16"),
        ("mor-expert", {"draft": 17}, "draft 17 must be"),
        ("mor-expert", {"draft": True}, "draft True must be"),
        ("mor-expert", {"draft": 2, "draft_depth": 3}, "draft_depth 3 must be an integer from 1 to 2"),
        ("mor-expert", {"draft": 2, "draft_depth": 0}, "draft_depth 0 must be"),
        ("mor-expert", {"draft_depth": 2}, "draft_depth 2 has no effect without draft"),
        ("vanilla", {"draft": 2}, "draft 2 is for models of several recursions, and this one has 1"),
    ],
)
def test_drafts_that_cannot_be(case: str, options: dict[str, Any], sentence: str) -> None:
    engine = engine_of(eval_model(case))
    with pytest.raises(ValueError, match=sentence) as refusal:
        engine.add([1, 2], Params(**options))
    assert "\n" not in str(refusal.value)
    assert engine.is_idle and not engine.requests


def test_a_draft_that_is_not_finite_ends_its_request_alone() -> None:
    model: Any = eval_model("mor-expert")
    prompts, engine = prompts_of("mor-expert", [4, 3]), engine_of(model)
    leave = engine.passes.leave

    def spoilt(part: Any) -> Tensor:
        logits = leave(part).clone()
        row = 0
        for segment in part.segments:
            if segment.owner.number == 1 and segment.owner.stage == "draft":
                logits[row] = torch.nan
            row += segment.reads
        return logits

    engine.passes.leave = spoilt  # type: ignore[method-assign]
    good, bad = engine.generate(prompts, DRAFT)
    assert good.tokens == model.generate(prompts[:1], max_new_tokens=NEW)[0]
    assert (bad.reason, len(bad.new)) == ("error", 1)
    assert_nothing_is_left(engine)
