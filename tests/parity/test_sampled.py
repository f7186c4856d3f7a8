"""`sampled`: the distribution of its draws, what the gradient goes through, first states, counts and refusals."""

import math
import statistics
from typing import Any

import pytest
import torch

import morex
from morex.depth.sampled import draw, mean_up_to
from morex.loading import ConfigError
from parity.helpers import build, cases, config_of, eval_model, fresh_model, largest_change, load, random_tokens
from parity.test_counts import flops
from parity.test_reference import agree, model_of, reference_of, sequences
from parity.test_reference import config_of as small_config

CASES = cases("sampled")
SMALL: dict[str, Any] = {
    "schedule": {"sharing": "cycle", "prelude": 1, "core": 2, "coda": 1, "recursions": 3},
    "depth": {"kind": "sampled", "state": "random", "state_std": 0.0},
    "input_injection": "concat",
    "kv": "refresh",
}


def router_of(model: Any) -> Any:
    return model.stack.core.groups[0].router


def at_draw(model: Any, wanted: int) -> Any:
    """The model at the first step whose draw is as wanted."""
    router = router_of(model)
    step = next(s for s in range(10_000) if draw(router.recursions, router.spread, router.seed, s) == wanted)
    for group in model.stack.core.groups:
        group.router.step.fill_(step)
    return model


def gradients(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("spread", [0.0, 0.5])
@pytest.mark.parametrize("mean", [1, 4, 32])
def test_draws_follow_their_distribution(mean: int, spread: float) -> None:
    """1 + Poisson(L), ln L normal with E[L] = mean: mean and variance within five standard errors."""
    draws = [draw(mean, spread, 3, step) for step in range(20_000)]
    variance = mean + mean**2 * (math.exp(spread**2) - 1)
    assert min(draws) == 1 or mean == 32
    assert statistics.mean(draws) == pytest.approx(1 + mean, abs=5 * (variance / len(draws)) ** 0.5)
    assert statistics.pvariance(draws) == pytest.approx(variance, rel=0.1)
    for most in (1, 2, 8, 40):
        capped = [min(r, most) for r in draws]
        error = statistics.pstdev(capped) / len(capped) ** 0.5
        assert mean_up_to(most, mean, spread) == pytest.approx(statistics.mean(capped), abs=5 * error + 5 / len(draws))
    assert mean_up_to(2000, mean, spread) == pytest.approx(1 + mean, rel=1e-6)


def test_a_draw_belongs_to_seed_and_step() -> None:
    first = [draw(4, 0.5, 0, step) for step in range(50)]
    assert first == [draw(4, 0.5, 0, step) for step in range(50)]
    assert first != [draw(4, 0.5, 1, step) for step in range(50)]
    assert len(set(first)) > 3


@pytest.mark.parametrize("case", CASES)
def test_training_takes_the_draw_of_its_step(case: str) -> None:
    """Every token, in every microbatch of the step; the step comes through `update_routers` and is saved."""
    model, tokens, depths = fresh_model(case), random_tokens(case), set()
    router = router_of(model)
    for step in range(6):
        outs = [model(part, labels=part, return_trace=True) for part in tokens.split(1)]
        wanted = draw(router.recursions, router.spread, router.seed, step)
        for out in outs:
            taken = out.trace.depth.unique().tolist()
            assert taken == [wanted * len(out.trace.active)]
        stats = outs[0].stats + outs[1].stats
        assert stats.active_shares == (1.0,) * wanted
        model.update_routers(stats, step + 1)
        depths.add(wanted)
    assert len(depths) > 1
    other = build(config_of(case))
    other.load_state_dict(model.state_dict())
    assert router_of(other).step.item() == 6
    evaluated = model.eval()(tokens, return_trace=True)
    assert (evaluated.trace.depth == router.recursions * len(evaluated.trace.active)).all()


@pytest.mark.parametrize("injection", ["add", "concat"])
@pytest.mark.parametrize("state", ["input", "random"])
def test_it_computes_what_the_reference_says(state: str, injection: str) -> None:
    """R recursions in eval mode, as many as were drawn in training; a random state without spread is zero."""
    depth = {"kind": "sampled", "state": state, "state_std": 0.0, "gradient_recursions": 1}
    model = model_of(small_config(SMALL, {"depth": depth, "input_injection": injection}))
    agree(model.eval(), reference_of(model, False), sequences())
    for drawn in (1, 2, 5):
        reference = reference_of(model, True)
        reference.recursions = drawn
        agree(at_draw(model.train(), drawn), reference, sequences())


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_the_gradient_goes_through_the_last_recursions_only(kept: int) -> None:
    """As if the state were cut from what made it before the last k recursions; e is reached through these."""
    depth = {"kind": "sampled", "state": "input", "gradient_recursions": kept}
    model, tokens = at_draw(model_of(small_config(SMALL, {"depth": depth})), 4), sequences()[0][None]
    found = gradients(model, tokens)
    router = router_of(model)
    router.gradient_recursions, merge = None, router.merge

    def cut(h: torch.Tensor, y: torch.Tensor, routing: Any, visit: Any) -> torch.Tensor:
        merged = merge(h, y, routing, visit)
        return merged.detach() if visit.recursion == 4 - kept else merged

    router.merge = cut
    expected = gradients(model, tokens)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in found.items():
        assert largest_change(gradient, expected[name]) <= 1e-12, name
    router.merge = merge
    assert any(largest_change(gradient, found[name]) > 1e-6 for name, gradient in gradients(model, tokens).items())


@pytest.mark.parametrize("case", CASES)
def test_no_gradient_is_lost_to_autocast(case: str) -> None:
    """Weights that were cast where no gradient goes are cast anew where it does."""
    model = build(config_of(case), torch.float32)
    kept = router_of(model).gradient_recursions
    at_draw(model, 3 if kept is None else min(kept, 8) + 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(model, random_tokens(case))
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_first_states_are_random_in_training_and_zero_in_eval() -> None:
    model: Any = build(morex.load_config("huginn", tiny=True).model)
    tokens = random_tokens("huginn")
    torch.manual_seed(0)
    first = model(tokens).logits
    assert largest_change(model(tokens).logits, first) > 1e-3
    torch.manual_seed(0)
    assert torch.equal(model(tokens).logits, first)
    longer = torch.cat([tokens[:1], tokens[1:]], 1)
    torch.manual_seed(0)
    assert largest_change(model(longer).logits[:, :16], model_alone(model, tokens[:1])) <= 1e-9
    assert torch.equal(model.eval()(tokens).logits, model(tokens).logits)


def model_alone(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    logits: torch.Tensor = model(tokens).logits
    return logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("depth", [1, "uniform:7", "progressive:12"])
def test_inference_takes_any_depth(case: str, depth: int | str) -> None:
    model, tokens = eval_model(case), random_tokens(case)
    out = model(tokens, depth=depth, return_trace=True)
    assert torch.isfinite(out.logits).all()
    wanted = {1: 1, "uniform:7": 7}.get(depth, config_of(case).schedule.recursions)
    assert out.trace.depth.max() == wanted * len(out.trace.active)


@pytest.mark.parametrize("drawn", [1, 2, 4, 6])
def test_flops_of_a_drawn_depth_agree_with_torch_counter(drawn: int) -> None:
    """Recursions without a gradient are counted forward alone."""
    config = load("huginn", "model.depth.gradient_recursions=2").model
    model, tokens = at_draw(build(config), drawn), random_tokens("huginn", 4, 24)
    counts = morex.count(config, seq_len=24, shares=(1.0,) * drawn)
    measured = flops("huginn", model, tokens, backward=True) / tokens.numel()
    assert counts.train_flops_per_token == pytest.approx(measured, rel=0.01)


def test_expected_flops_are_the_mean_of_those_of_the_draws() -> None:
    config = load("huginn", "model.depth.gradient_recursions=3").model
    drawn = [draw(4, 0.5, 0, step) for step in range(20_000)]
    each = {r: morex.count(config, shares=(1.0,) * r).train_flops_per_token for r in set(drawn)}
    mean = statistics.mean(each[r] for r in drawn)
    assert morex.count(config).train_flops_per_token == pytest.approx(mean, rel=0.01)


REFUSED: dict[str, tuple[list[str], str]] = {
    "nothing that recurs": (
        ["model.schedule={sharing: none, layers: 4, recursions: 1}", "model.input_injection=none"],
        r"sampled.*'none'.*cycle",
    ),
    "vectors for R recursions": (["model.step_embedding=true"], r"step_embedding .*sampled"),
    "a state that knows nothing": (["model.input_injection=none"], r"state 'random' .*input_injection"),
    "a gradient that reaches nothing": (
        ["model.input_injection=none", "model.depth.state=input"],
        r"gradient_recursions 8 .*input_injection.*null",
    ),
    "keys without a gradient": (["model.kv=shared_first"], r"gradient_recursions 8 .*shared_first.*refresh"),
    "no gradient at all": (["model.depth.gradient_recursions=0"], r"gradient_recursions.*0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configs_that_make_no_sense_are_refused(name: str) -> None:
    changes, pattern = REFUSED[name]
    with pytest.raises(ConfigError, match=pattern) as refusal:
        morex.load_config("huginn", changes, tiny=True)
    assert "\n" not in str(refusal.value)
