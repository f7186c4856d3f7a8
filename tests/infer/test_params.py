"""Options of a request: what they do, and what is refused before it harms anybody."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from infer.helpers import TEXT, WORDS, engine_of, prompts_of
from morex.data.characters import ByteTokenizer, CharTokenizer
from morex.infer import Completion, Engine, Event, Params
from parity.helpers import eval_model


def text_engine(**options: Any) -> Engine:
    """An engine whose model and tokenizer have 97 characters."""
    return engine_of(eval_model("mor-expert"), tokenizer=CharTokenizer(TEXT), **options)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tokens by halves": ({"max_new_tokens": 1.5}, "max_new_tokens 1.5 must be an integer of 0 or more"),
    "true tokens": ({"max_new_tokens": True}, "max_new_tokens True"),
    "no temperature": ({"temperature": float("nan")}, "temperature nan must be 0"),
    "an infinite temperature": ({"temperature": float("inf")}, "temperature inf"),
    "a temperature too large for a float": ({"temperature": 10**400}, "temperature 1000"),
    "half a choice": ({"temperature": 1.0, "top_k": 2.5}, "top_k 2.5 must be an integer"),
    "a true choice": ({"temperature": 1.0, "top_k": True}, "top_k True must be an integer"),
    "no probability": ({"temperature": 1.0, "top_p": float("nan")}, "top_p nan"),
    "a negative share": ({"temperature": 1.0, "min_p": -0.1}, "min_p -0.1 must lie between 0 and 1"),
    "too large a share": ({"temperature": 1.0, "min_p": 1.1}, "min_p 1.1"),
    "no share": ({"temperature": 1.0, "min_p": float("nan")}, "min_p nan"),
    "top_k without a draw": ({"top_k": 3}, "top_k 3 has no effect at temperature 0"),
    "top_p without a draw": ({"top_p": 0.5}, "top_p 0.5 has no effect at temperature 0"),
    "min_p without a draw": ({"min_p": 0.5}, "min_p 0.5 has no effect at temperature 0"),
    "no penalty": ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 must be above 0"),
    "an infinite penalty": ({"repetition_penalty": float("inf")}, "repetition_penalty inf"),
    "an unknown penalty": ({"repetition_penalty": float("nan")}, "repetition_penalty nan"),
    "a negative seed": ({"seed": -1}, "seed -1 must be an integer between 0"),
    "a large seed": ({"seed": 2**40}, f"seed {2**40} must be an integer between 0 and {2**40 - 1}"),
    "half a seed": ({"seed": 0.5}, "seed 0.5"),
    "an end beyond": ({"eos_id": 97}, "eos_id 97 is outside the vocabulary of 97"),
    "a true end": ({"eos_id": True}, "eos_id True"),
    "a stop beyond": ({"stop_ids": [3, -1]}, "stop id -1 is outside the vocabulary of 97"),
    "one stop id": ({"stop_ids": 3}, r"stop_ids 3 must be a list, such as \[0\]"),
    "one stop string": ({"stop": "end"}, "stop 'end' must be a list"),
    "an empty stop string": ({"stop": ["a", ""]}, "stop string '' must be text of at least one character"),
    "a number to stop at": ({"stop": [3]}, "stop string 3 must be text"),
    "half a character": ({"stop": ["\ud83e"]}, r"stop string '\\ud83e' is not valid UTF-8"),
    "too many logprobs": ({"logprobs": 98}, "logprobs 98 must be an integer between 0 and the vocabulary of 97"),
    "fewer than none": ({"logprobs": -1}, "logprobs -1"),
    "true logprobs": ({"logprobs": True}, "logprobs True"),
    "an unknown depth": ({"depth": "deep"}, "depth 'deep' is not understood"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_a_sentence(name: str) -> None:
    options, sentence = REFUSED[name]
    engine = text_engine()
    with pytest.raises(ValueError, match=sentence) as error:
        engine.add("a text", Params(**options))
    assert "\n" not in str(error.value)
    assert engine.is_idle and not engine.requests


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "this text has none"),
        ([], "at least one token id"),
        ([1.0], "at least one token id"),
        ([True], "at least one token id"),
        ([[1]], "at least one token id"),
        (None, "at least one token id"),
        ([97], "token id 97 is outside"),
        ("caf\u20ac", "not among the 97 of the char tokenizer"),
        ("\udc00", "not valid UTF-8"),
    ],
)
def test_prompts_that_are_none(prompt: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        text_engine().add(prompt)
    assert "\n" not in str(error.value)


def test_text_needs_a_tokenizer_that_fits() -> None:
    engine = engine_of(eval_model("mor-expert"))
    with pytest.raises(ValueError, match=r"needs Engine\(model, tokenizer\)"):
        engine.add("text")
    with pytest.raises(ValueError, match=r"stop strings need Engine\(model, tokenizer\)"):
        engine.add([1], Params(stop=["a"]))
    with pytest.raises(ValueError, match="tokenizer has 257 token ids"):
        engine_of(eval_model("mor-expert"), tokenizer=ByteTokenizer())
    with pytest.raises(ValueError, match="params must be Params"):
        engine.add([1], {"temperature": 1.0})  # type: ignore[arg-type]


def test_prompts_of_any_form_are_the_same() -> None:
    engine = text_engine()
    ids = [TEXT.index(letter) for letter in WORDS]
    prompts: list[Any] = [WORDS, ids, tuple(ids), torch.tensor(ids), torch.tensor(ids).numpy()]
    found = engine.generate(prompts, Params(max_new_tokens=4))
    assert all(completion.prompt == ids for completion in found)
    assert len({tuple(completion.new) for completion in found}) == 1
    new = eval_model("mor-expert").generate([ids], max_new_tokens=4)[0][len(ids) :]  # type: ignore[operator]
    assert (found[0].new, found[0].tokens) == (new, ids + new)
    assert found[0].text == "".join(TEXT[token] for token in new)
    assert (found[0].reason, found[0].error, found[0].logprobs, found[0].trace) == ("length", None, None, None)


def test_each_prompt_may_have_params_of_its_own() -> None:
    engine = text_engine()
    own = [Params(max_new_tokens=2), Params(max_new_tokens=0), Params(max_new_tokens=5, temperature=1.0, seed=3)]
    found = engine.generate(["ab", "cd", "ef"], own)
    assert [len(completion.new) for completion in found] == [2, 0, 5]
    assert found[1].text == "" and found[1].reason == "length"
    with pytest.raises(ValueError, match="3 prompts came with 2 params"):
        engine.generate(["ab", "cd", "ef"], own[:2])
    with pytest.raises(ValueError, match="takes a list of prompts"):
        engine.generate("abc")
    with pytest.raises(ValueError, match="logprobs -2"):
        engine.generate(["ab", "cd"], [own[0], Params(logprobs=-2)])
    assert engine.is_idle and not engine.requests, "none of them is left"


def sampled(seed: int = 0, **options: Any) -> Completion:
    options = {"max_new_tokens": 30, "temperature": 1.5, "seed": seed} | options
    (found,) = text_engine().generate([WORDS], Params(**options))
    return found


def test_a_request_ends_at_any_of_its_ids() -> None:
    free = sampled()
    first, second = free.new[7], free.new[4]
    place = min(free.new.index(first), free.new.index(second))
    for options in ({"stop_ids": [first, second]}, {"eos_id": first, "stop_ids": [second]}):
        ended = sampled(**options)
        assert ended.reason == "stop"
        assert ended.new == free.new[: place + 1], "the last id is kept"
        assert ended.text == free.text[:place], "and not among the text"
    last = sampled(eos_id=free.new[-1], max_new_tokens=free.new.index(free.new[-1]) + 1)
    assert last.reason == "stop"


def test_the_text_ends_before_a_stop_string() -> None:
    free = sampled()
    stop = free.text[6:9]
    ended = sampled(stop=["not there", stop])
    assert ended.reason == "stop"
    assert ended.text == free.text[: free.text.index(stop)]
    assert ended.new == free.new[: free.text.index(stop) + 3]
    assert sampled(stop=["not there"]).text == free.text


def test_pieces_of_a_stream_are_the_text() -> None:
    free = sampled()
    engine = text_engine()
    params = Params(max_new_tokens=30, temperature=1.5, seed=0, stop=[free.text[20:24]])
    stream = engine.stream_request(WORDS, params)
    events: list[Event] = list(stream)
    assert stream.completion == sampled(stop=params.stop) or stream.completion is not None
    assert (
        "".join(event.text for event in events)
        == stream.completion.text
        == free.text[: free.text.index(free.text[20:24])]
    )
    assert [event.token for event in events] == stream.completion.new
    assert [event.reason for event in events] == [None] * (len(events) - 1) + ["stop"]


def test_min_p_one_is_greedy_and_penalties_keep_tokens_away() -> None:
    greedy = sampled(temperature=0.0)
    assert sampled(min_p=1.0).new == greedy.new
    once = sampled(temperature=0.0, repetition_penalty=1e6, max_new_tokens=20)
    assert len(set(once.tokens)) == len(set(once.prompt)) + 20, "no token comes twice"
    assert len(set(greedy.new)) < 20


def test_log_probabilities_are_the_models_own() -> None:
    """Whatever temperature, filters and penalty do; those of the full forward."""
    found = sampled(logprobs=3, top_k=5, repetition_penalty=1.4, max_new_tokens=6)
    model: Any = eval_model("mor-expert")
    with torch.no_grad():
        expected = model(torch.tensor([found.tokens])).logits[0].log_softmax(-1)[len(found.prompt) - 1 : -1]
    assert found.logprobs is not None and len(found.logprobs) == len(found.new) == 6
    for token, own, row in zip(found.new, found.logprobs, expected, strict=True):
        assert own.token == pytest.approx(float(row[token]), abs=1e-9)
        assert [index for index, _ in own.likeliest] == row.topk(3).indices.tolist()
        assert [value for _, value in own.likeliest] == pytest.approx(row.topk(3).values.tolist(), abs=1e-9)
    alone = sampled(logprobs=0, max_new_tokens=2).logprobs
    assert alone is not None and [own.likeliest for own in alone] == [[], []]


def test_the_engines_draws_are_those_of_generate() -> None:
    model: Any = eval_model("mor-expert")
    for options in ({"temperature": 0.8}, {"temperature": 1.5, "top_k": 7}, {"temperature": 1.5, "top_p": 0.8}):
        engine, prompts = engine_of(model), prompts_of("mor-expert")
        own = [Params(max_new_tokens=8, seed=seed, **options) for seed in range(len(prompts))]
        for seed, (prompt, found) in enumerate(zip(prompts, engine.generate(prompts, own), strict=True)):
            assert found.tokens == model.generate([prompt], max_new_tokens=8, seed=seed, **options)[0]


def test_requests_with_and_without_options_share_steps() -> None:
    engine = text_engine(most_requests=8)
    own = [
        Params(), Params(temperature=1.0, seed=1), Params(temperature=1.0, seed=2, top_k=3, logprobs=2),
        Params(repetition_penalty=1.5), Params(temperature=0.5, min_p=0.1, seed=3, repetition_penalty=1.1, logprobs=0),
    ]  # fmt: skip
    for params, found in zip(own, engine.generate([WORDS] * 5, own), strict=True):
        (alone,) = text_engine().generate([WORDS], params)
        assert (found.new, found.text, found.reason) == (alone.new, alone.text, alone.reason)


def test_params_do_not_change() -> None:
    change: Callable[..., None] = setattr
    with pytest.raises(AttributeError):
        change(Params(), "temperature", 1.0)
