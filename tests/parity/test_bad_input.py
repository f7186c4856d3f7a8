"""What cannot be computed is refused with one sentence that names the fault, before anything is changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import morex
from parity.helpers import (
    build,
    cases,
    config_of,
    eval_model,
    fresh_model,
    labels_for,
    random_tokens,
)

TOKENS = random_tokens("mor-expert")


def refused_forward(pattern: str, model: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=pattern) as refusal:
        model(*arguments, **options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("token", [97, -1, 10**6])
def test_token_ids_beyond_the_vocabulary(token: int) -> None:
    model: Any = eval_model("mor-expert")
    refused_forward(rf"token id {token} .*97", model, torch.tensor([[1, token]]))
    with pytest.raises(ValueError, match=rf"token id {token} .*97"):
        model.generate([[1, token]], max_new_tokens=1)


def test_tokens_in_a_list() -> None:
    refused_forward(r"tokens .*tensor.*list.*torch.tensor", eval_model("mor-expert"), TOKENS.tolist())


def test_labels_beyond_the_vocabulary() -> None:
    refused_forward(r"label.* 97 ", eval_model("mor-expert"), TOKENS, labels=torch.full_like(TOKENS, 97))


SHAPES: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "labels in a list": (r"labels .*tensor.*list", lambda model: {"labels": TOKENS.tolist()}),
    "lengths in a list": (r"lengths .*tensor.*list", lambda model: {"lengths": [16, 3]}),
    "labels of another shape": (r"labels .*\[2, 16\]", lambda model: {"labels": TOKENS[:, :5]}),
    "lengths of another batch": (r"lengths .*\[2\]", lambda model: {"lengths": torch.tensor([16])}),
    "lengths beyond the tokens": (r"lengths .*16.*3..17", lambda model: {"lengths": torch.tensor([17, 3])}),
    "negative lengths": (r"lengths .*16.*-1\.\.3", lambda model: {"lengths": torch.tensor([-1, 3])}),
    "lengths that are no integers": (r"lengths .*float32", lambda model: {"lengths": torch.tensor([1.0, 3.0])}),
    "labels that are no integers": (r"labels .*float32", lambda model: {"labels": TOKENS.float()}),
    "positions of another shape": (r"positions .*\[2, 16\]", lambda model: {"positions": TOKENS[:, :3]}),
    "documents of another shape": (r"document_ids .*\[2, 16\]", lambda model: {"document_ids": TOKENS[0]}),
    "fewer than no logits": (r"logits_to_keep -1", lambda model: {"logits_to_keep": -1}),
    "a cache of another batch": (r"cache .*3 .*2 rows", lambda model: {"cache": model.new_cache(3)}),
    "documents in a cache": (
        r"document_ids .*cache",
        lambda model: {"cache": model.new_cache(2), "document_ids": torch.zeros_like(TOKENS)},
    ),
    "an oracle in a cache": (r"oracle.*cache", lambda model: {"cache": model.new_cache(2), "depth": "oracle"}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_arguments_that_do_not_fit(name: str) -> None:
    pattern, options = SHAPES[name]
    model = eval_model("mor-expert")
    refused_forward(pattern, model, TOKENS, **options(model))


def test_a_depth_where_there_are_no_recursions() -> None:
    refused_forward(r"asks for 4 recursions; this model takes 1 alone", eval_model("more"), TOKENS, depth=4)


@pytest.mark.parametrize("shape", [(3,), (2, 0), (1, 2, 3)])
def test_tokens_of_another_shape(shape: tuple[int, ...]) -> None:
    refused_forward(r"tokens .*shape", eval_model("vanilla"), torch.ones(shape, dtype=torch.long))


GENERATION: dict[str, tuple[str, list[list[int]], dict[str, Any]]] = {
    "no prompt": (r"prompt", [], {}),
    "an empty prompt": (r"prompt", [[1, 2], []], {}),
    "fewer than no tokens": (r"max_new_tokens -1", [[1]], {"max_new_tokens": -1}),
    "no temperature": (r"temperature nan", [[1]], {"temperature": float("nan")}),
    "ids without a list": (r"a list of prompts, each a list", [1, 2], {}),  # type: ignore[list-item]
    "a text": (r"a list of prompts, each a list", ["abc"], {}),  # type: ignore[list-item]
    "a negative temperature": (r"temperature -0.5", [[1]], {"temperature": -0.5}),
    "no probability": (r"top_p 0", [[1]], {"temperature": 1.0, "top_p": 0.0}),
    "too much probability": (r"top_p 1.5", [[1]], {"temperature": 1.0, "top_p": 1.5}),
    "no choice": (r"top_k 0", [[1]], {"temperature": 1.0, "top_k": 0}),
    "too deep": (r"depth .*9.* 1 to 3", [[1]], {"depth": "uniform:9"}),
    "an oracle": (r"oracle", [[1]], {"depth": "oracle"}),
}


def test_no_more_logits_are_kept_than_there_are() -> None:
    model: Any = eval_model("mor-expert")
    assert torch.equal(model(TOKENS, logits_to_keep=99).logits, model(TOKENS, logits_to_keep=16).logits)


def test_the_smallest_temperature_takes_the_likeliest() -> None:
    model: Any = eval_model("mor-expert")
    greedy = model.generate([[1, 2]], max_new_tokens=4)
    assert model.generate([[1, 2]], max_new_tokens=4, temperature=1e-320, seed=0) == greedy


def test_positions_beyond_the_learned_ones() -> None:
    """The tiny form has 64; with the cache, positions go on where the text has come to."""
    model: Any = eval_model("recursive+learned")
    tokens = random_tokens("recursive+learned", 1, 40)
    refused_forward(r"position 64 .*64 .*max_seq_len", model, tokens, positions=torch.arange(25, 65)[None])
    refused_forward(r"position -1 .*64 .*max_seq_len", model, tokens, positions=torch.arange(-1, 39)[None])
    cache = model.new_cache(1)
    model(tokens, cache=cache)
    refused_forward(r"position 79 .*64 .*max_seq_len", model, tokens, cache=cache)
    assert len(model.generate(tokens.tolist(), max_new_tokens=25)[0]) == 65
    with pytest.raises(ValueError, match=r"max_new_tokens 26 .*40 tokens .*64 .*at most 25"):
        model.generate(tokens, max_new_tokens=26)


@pytest.mark.parametrize("sizes", [{"seq_len": 0}, {"context": -1}])
def test_counts_need_tokens(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"seq_len .* must be 1 or more"):
        morex.count(config_of("vanilla"), **sizes)


@pytest.mark.parametrize("name", GENERATION)
def test_generation_that_makes_no_sense(name: str) -> None:
    pattern, prompts, options = GENERATION[name]
    model: Any = eval_model("mor-expert")
    with pytest.raises(ValueError, match=pattern) as refusal:
        model.generate(prompts, **{"max_new_tokens": 2, **options})
    assert "\n" not in str(refusal.value)


def test_generation_of_nothing_is_the_prompt() -> None:
    model: Any = eval_model("mor-expert")
    assert model.generate([[1, 2], [3]], max_new_tokens=0) == [[1, 2], [3]]


def test_labels_that_are_all_ignored_cost_nothing() -> None:
    """A batch of padding alone is no reason for a loss that is not a number."""
    model = fresh_model("mor-expert")
    out = model(TOKENS, labels=torch.full_like(TOKENS, -100))
    assert out.losses["lm"].item() == 0
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("case", cases())
def test_router_updates_in_half_precision(case: str) -> None:
    """Weights in bf16 train a step, router updates included."""
    model: Any = morex.build_model(config_of(case), dtype=torch.bfloat16).train()
    tokens = random_tokens(case)
    out = model(tokens, labels=labels_for(case, tokens))
    out.loss.backward()
    model.update_routers(out.stats, 1)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_rows_that_pause_in_a_chunk() -> None:
    """A row of length 0 in a chunk is left as it was, in every kind of cache."""
    for case in ("mor-expert", "more-tuned", "recursive+shared_first", "token+recursive_experts"):
        model: Any = build(config_of(case)).eval()
        tokens = random_tokens(case)
        cache = model.new_cache(2)
        with torch.no_grad():
            model(tokens[:, :4], cache=cache)
            model(tokens[:, 4:7], cache=cache, lengths=torch.tensor([3, 0]))
            last = model(tokens[:, 7:9], cache=cache, lengths=torch.tensor([0, 2])).logits[1]
            whole = model(torch.cat([tokens[1:, :4], tokens[1:, 7:9]], 1)).logits[0]
        assert (last - whole[4:]).abs().max() <= 1e-9, case
