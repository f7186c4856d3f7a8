"""Invariant 1: in eval mode, changing tokens after t changes no logit at or before t."""

from typing import Any

import pytest
import torch
from torch import Tensor

from parity.helpers import (
    CASES,
    LM_CASES,
    REPEATABLE,
    build,
    cases,
    config_of,
    eval_model,
    fresh_model,
    largest_change,
    load,
    random_tokens,
    routing_splits,
)


def with_other_future(tokens: Tensor, t: int, vocab_size: int) -> Tensor:
    """The same tokens up to t, another token at every later place."""
    changed = tokens.clone()
    changed[:, t + 1 :] = (changed[:, t + 1 :] + 1 + torch.arange(tokens.shape[1] - t - 1)) % vocab_size
    return changed


@pytest.mark.parametrize("case", LM_CASES)
def test_causal(case: str) -> None:
    model, tokens = eval_model(case), random_tokens(case)
    assert routing_splits(model, tokens)
    logits = model(tokens).logits
    for t in (0, 6, 11, 14):
        changed = model(with_other_future(tokens, t, config_of(case).vocab_size)).logits
        assert largest_change(changed[:, : t + 1], logits[:, : t + 1]) <= 1e-9
        assert largest_change(changed[:, t + 1 :], logits[:, t + 1 :]) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_causal_states(case: str) -> None:
    """The states of every recursion, whatever the head makes of them."""
    model, tokens = eval_model(case), random_tokens(case)

    def states(tokens: Tensor) -> Tensor:
        trace = model(tokens, return_trace=True).trace
        return torch.stack([state for group in trace.states.values() for state in group])

    before = states(tokens)
    for t in (0, 6, 14):
        changed = states(with_other_future(tokens, t, config_of(case).vocab_size))
        assert largest_change(changed[:, :, : t + 1], before[:, :, : t + 1]) <= 1e-9
        assert largest_change(changed[:, :, t + 1 :], before[:, :, t + 1 :]) > 1e-3


@pytest.mark.parametrize("case", cases("expert_choice", head="lm"))
def test_expert_choice_training_is_not_causal(case: str) -> None:
    """Top-k over the sequence sees the future: a documented property of the method, which eval mode must not have."""
    tokens = random_tokens(case)
    futures = [with_other_future(tokens, t, config_of(case).vocab_size) for t in (3, 7, 11)]

    def leak(model: Any, depth: str | None) -> float:
        logits = model(tokens, depth=depth).logits
        changes = [
            largest_change(model(future, depth=depth).logits[:, : t + 1], logits[:, : t + 1])
            for t, future in zip((3, 7, 11), futures, strict=True)
        ]
        return max(changes)

    assert leak(fresh_model(case), None) > 1e-6
    assert leak(eval_model(case), "oracle") > 1e-6
    assert leak(eval_model(case), None) <= 1e-9


@pytest.mark.parametrize("case", [case for case in cases("expert_choice") if case in REPEATABLE])
def test_oracle_is_the_rule_of_training(case: str) -> None:
    tokens = random_tokens(case)
    trained = fresh_model(case)(tokens).logits
    assert largest_change(eval_model(case)(tokens, depth="oracle").logits, trained) <= 1e-9


@pytest.mark.parametrize("case", [case for case in LM_CASES if config_of(case).schedule.recursions > 1])
def test_causal_under_depth_policies(case: str) -> None:
    model, tokens = eval_model(case), random_tokens(case)
    future = with_other_future(tokens, 9, config_of(case).vocab_size)
    for depth in (1, "uniform:2", "adaptive:8", "progressive:12"):
        logits = model(tokens, depth=depth).logits
        assert largest_change(model(future, depth=depth).logits[:, :10], logits[:, :10]) <= 1e-9


def test_cases_differ() -> None:
    """Each case stands for a config of its own."""
    configs = [config_of(case).model_dump_json() for case in CASES if case.count("paper") + case.count("llm") == 0]
    assert len(set(configs)) == len(configs)


@pytest.mark.parametrize("every", [None, 2])
def test_windows_end_where_they_say(every: int | None) -> None:
    """Through three local steps of window 3 a token reaches the six after it and no further; a global step sees all."""
    options = f"{{heads: 4, window: 3, global_every: {every or 'null'}}}"
    model = build(load("vanilla", f"model.attention={options}", "model.schedule.layers=3").model).eval()
    tokens = random_tokens("vanilla", 1, 16)
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 97
    with torch.no_grad():
        moved = (model(changed).logits - model(tokens).logits)[0].abs().amax(-1)
    assert moved[:4].max() == 0
    assert moved[4:11].min() > 1e-6
    assert moved[11:].max() == 0 if every is None else moved[11:].min() > 1e-9


def test_a_window_as_long_as_the_text_hides_nothing() -> None:
    tokens = random_tokens("mor-expert")
    narrow, wide, none = (
        build(load("mor-expert", f"model.attention.window={window}").model).eval() for window in (15, 16, "null")
    )
    with torch.no_grad():
        assert torch.equal(wide(tokens).logits, none(tokens).logits)
        assert (narrow(tokens).logits - none(tokens).logits).abs().max() > 1e-9
