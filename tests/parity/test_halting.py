"""Adaptive computation time beyond its formulas: saturated units, depths that the caller fixes, and what it learns."""

import math
from typing import Any

import pytest
import torch

import morex
from morex.config import ModelConfig
from morex.loading import validate
from parity.helpers import (
    build,
    cases,
    config_of,
    fresh_model,
    labels_for,
    labels_of,
    largest_change,
    load,
    random_tokens,
)

CASES = cases("halting")


def units(model: Any) -> list[Any]:
    return [group.router for group in model.stack.core.groups]


def with_units(model: Any, weight: float, bias: float) -> Any:
    """The model with every halting unit's weights times `weight`, and this bias."""
    with torch.no_grad():
        for unit in units(model):
            unit.score.weight.mul_(weight)
            unit.bias.fill_(bias)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("bias", "taken"), [(1e4, 1), (-1e4, 3)])
@pytest.mark.parametrize("case", CASES)
def test_saturated_halting_is_finite(case: str, bias: float, taken: int, dtype: torch.dtype) -> None:
    """p = 1 stops every token after recursion 1, p = 0 none before R: the output is that state, and nothing is NaN."""
    model = with_units(build(config_of(case), dtype), 0.0, bias)
    tokens = random_tokens(case)
    out = model(tokens, labels=labels_for(case, tokens), return_trace=True)
    assert all(torch.stack(masks).sum(0).unique().tolist() == [taken] for masks in out.trace.active.values())
    assert out.losses["ponder"].item() == taken + 1
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), name
    for unit in units(model):
        assert unit.bias.grad.item() == 0.0
    model.eval()
    plain: Any = morex.build_model(as_fixed(config_of(case)), dtype=dtype).eval()
    plain.load_state_dict(
        {name: w for name, w in model.state_dict().items() if ".groups." not in name or "step" in name}
    )
    assert largest_change(model(tokens).logits, plain(tokens, depth=taken).logits) <= 1e-9


def as_fixed(config: ModelConfig) -> ModelConfig:
    return validate(ModelConfig, config.model_dump() | {"depth": {"kind": "fixed"}})


@pytest.mark.parametrize("case", CASES)
def test_the_smallest_depth_is_the_first_state(case: str) -> None:
    """Nothing is spent before recursion 1, so a depth of 1 weighs it by 1, whatever the unit says."""
    model, tokens = fresh_model(case).eval(), random_tokens(case)
    before = model(tokens, depth=1).logits
    assert torch.equal(with_units(model, -3.0, 0.5)(tokens, depth=1).logits, before)


def test_a_forced_depth_that_is_the_units_own_changes_nothing() -> None:
    """A unit that never stops early, and one that always stops at once."""
    tokens = random_tokens("mor-act")
    for bias, depth in ((-20.0, 3), (20.0, 1)):
        model = with_units(fresh_model("mor-act").eval(), 1e-3, bias)
        assert (model(tokens, return_trace=True).trace.depth == depth).all()
        assert torch.equal(model(tokens, depth=depth).logits, model(tokens).logits)


def test_recursions_beyond_what_is_spent_weigh_nothing() -> None:
    """With p = 0.7 two recursions spend all there is: a third one is run and not heard."""
    model, tokens = with_units(fresh_model("mor-act").eval(), 0.0, math.log(0.7 / 0.3)), random_tokens("mor-act")
    deep = model(tokens, depth=3, return_trace=True)
    assert (deep.trace.depth == 3).all()
    assert torch.equal(deep.logits, model(tokens, depth=2).logits)
    assert torch.equal(deep.logits, model(tokens).logits)


@pytest.mark.parametrize("depth", ["uniform:2", "adaptive:8"])
def test_no_ponder_cost_where_the_caller_decides(depth: str) -> None:
    model, tokens = fresh_model("mor-act"), random_tokens("mor-act")
    out = model(tokens, labels=tokens, depth=depth)
    assert "ponder" not in out.losses
    assert torch.equal(out.loss, out.losses["lm"])
    out.loss.backward()
    assert all(unit.score.weight.grad.abs().max() > 0 for unit in units(model))


@pytest.mark.parametrize("recursions", [2, 3, 5])
def test_no_token_stops_early_at_the_start(recursions: int) -> None:
    """By default p = 1/R at first: every recursion runs, and every state weighs about alike."""
    schedule = ["model.schedule.sharing=cycle", f"model.schedule.recursions={recursions}"]
    model = morex.build_model(load("mor-act", *schedule).model)
    tokens = random_tokens("mor-act")
    trace = model(tokens, return_trace=True).trace
    assert (trace.depth == recursions).all()
    ((_, scores),) = trace.scores.items()
    assert len(scores) == recursions
    assert all((score - 1 / recursions).abs().max() < 0.05 for score in scores[:-1])
    assert scores[-1].isnan().all()


def test_the_initial_bias_is_the_given_one() -> None:
    model = morex.build_model(load("mor-act", "model.depth.initial_bias=1.5").model)
    assert units(model)[0].bias.item() == 1.5
    assert units(morex.build_model(config_of("mor-act")))[0].bias.item() == pytest.approx(-math.log(2))


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_the_ponder_cost_lowers_the_mean_updates(weight: float) -> None:
    """A short training: with the cost tokens learn to stop early, without it nothing makes them."""
    model: Any = morex.build_model(load("mor-act", f"model.depth.ponder_weight={weight}").model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = random_tokens("mor-act", 4, 24)
    for _ in range(80):
        out = model(tokens, labels=labels_of(tokens))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    updates = sum(out.stats.active_shares)
    assert updates < 2.5 if weight else updates == 3.0
    assert out.losses["lm"] < 4.0
