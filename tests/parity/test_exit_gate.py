"""`exit_gate` against its formulas: who leaves when, the loss over all exits, and what the caller decides."""

import math
from typing import Any

import pytest
import torch

import morex
from morex.config import ModelConfig
from morex.loading import ConfigError, validate
from parity.exit_reference import ExitReference, stacked
from parity.helpers import (
    build,
    cases,
    config_of,
    eval_model,
    fresh_model,
    labels_of,
    largest_change,
    load,
    pad,
    random_tokens,
)
from parity.test_reference import LENGTHS, SMALL, experts, sequences

CASES = cases("exit_gate")
LOOP: dict[str, Any] = {
    **SMALL,
    "schedule": {"sharing": "cycle", "prelude": 1, "core": 2, "recursions": 3},
    "depth": {"kind": "exit_gate", "threshold": 0.6, "entropy_weight": 0.3},
    "kv": "refresh",
}
FORMS: dict[str, dict[str, Any]] = {
    "refresh": {},
    "shared first": {"kv": "shared_first"},
    "one block in sequence": {"schedule": {"sharing": "sequence", "prelude": 1, "core": 1, "recursions": 4}},
    "window": {"attention": {"heads": 2, "window": 3, "global_every": 3}},
    "recursive experts": experts("recursive"),
    "own head": {"tie_embeddings": False, "norm_placement": "pre_post", "step_embedding": True},
}


def model_of(form: str, seed: int = 5) -> Any:
    return build(validate(ModelConfig, {**LOOP, **FORMS[form]}), seed=seed, std=0.5)


def reference_of(model: Any, training: bool) -> ExitReference:
    return ExitReference(model.config.model_dump(), model.state_dict(), training)


@pytest.mark.parametrize("threshold", [None, 0.3, 0.9])
@pytest.mark.parametrize("form", FORMS)
def test_tokens_leave_as_in_the_reference(form: str, threshold: float | None) -> None:
    """Logits and depths of a ragged batch in eval mode, at the config's threshold and at others."""
    model, depth = model_of(form).eval(), None if threshold is None else f"exit:{threshold}"
    reference, rows = reference_of(model, training=False), sequences()
    reference.threshold = threshold
    tokens, lengths = pad(rows)
    out = model(tokens, lengths=lengths, depth=depth, return_trace=True)
    depths = set()
    for row, logits, taken in zip(rows, out.logits, out.trace.depth, strict=True):
        assert largest_change(logits[: len(row)], reference.logits(row.tolist())) <= 1e-9
        assert torch.equal(taken[: len(row)], stacked(reference.exits))
        depths |= set(stacked(reference.exits).tolist())
    assert len(depths) > 1


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_training_is_expected_over_all_exits(form: str) -> None:
    model = model_of(form)
    reference, rows = reference_of(model, training=True), sequences()
    tokens, lengths = pad(rows)
    out = model(tokens, labels=labels_of(tokens, lengths), lengths=lengths, return_trace=True)
    expected, entropy = reference.expected_loss([row.tolist() for row in rows])
    assert out.losses["lm"].item() == pytest.approx(expected, abs=1e-9)
    assert out.losses["exit_entropy"].item() == pytest.approx(entropy, abs=1e-9)
    assert out.loss_weights.pop("exit_entropy") == -0.3
    of_experts = sum(weight * out.losses[name].item() for name, weight in out.loss_weights.items())
    assert out.loss.item() == pytest.approx(expected - 0.3 * entropy + of_experts, abs=1e-9)
    assert all(mask.sum() == sum(LENGTHS) for masks in out.trace.active.values() for mask in masks)


def test_logits_of_training_are_those_at_the_exits() -> None:
    """And `lm_at_exit` is their cross-entropy; with labels and without."""
    model, rows = model_of("refresh"), sequences()
    reference = reference_of(model, training=True)
    tokens, lengths = pad(rows)
    out = model(tokens, labels=labels_of(tokens, lengths), lengths=lengths)
    assert largest_change(out.logits, model(tokens, lengths=lengths).logits) <= 1e-12
    losses = []
    for row, logits in zip(rows, out.logits, strict=True):
        assert largest_change(logits[: len(row)], reference.logits(row.tolist())) <= 1e-9
        picked = logits.log_softmax(-1)[torch.arange(len(row) - 1), row[1:]]
        losses += (-picked).tolist()
    assert out.losses["lm_at_exit"].item() == pytest.approx(sum(losses) / len(losses), abs=1e-9)


def test_probabilities_of_the_exits_sum_to_one() -> None:
    model, tokens = fresh_model("ouro"), random_tokens("ouro")
    (stats,) = model(tokens, labels=tokens).stats.values()
    assert stats["exits"].shape == (config_of("ouro").schedule.recursions,)
    assert stats["exits"].sum().item() == pytest.approx(tokens.numel())


@pytest.mark.parametrize("case", CASES)
def test_a_threshold_that_all_reach_and_one_that_none_does(case: str) -> None:
    """At the extremes the rule is a depth for all."""
    model, tokens = eval_model(case), random_tokens(case)
    recursions = config_of(case).schedule.recursions
    assert largest_change(model(tokens, depth="exit:1e-300").logits, model(tokens, depth=1).logits) <= 1e-9
    assert largest_change(model(tokens, depth="exit:gate:7").logits, model(tokens, depth=recursions).logits) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("bias", "taken"), [(1e4, 1), (-1e4, 4)])
def test_saturated_gates_are_finite(bias: float, taken: int, dtype: torch.dtype) -> None:
    model = build(config_of("ouro"), dtype)
    gate = model.stack.core.groups[0].router
    with torch.no_grad():
        gate.score.weight.zero_()
        gate.bias.fill_(bias)
    tokens = random_tokens("ouro")
    out = model(tokens, labels=tokens)
    assert out.losses["exit_entropy"].item() == 0
    assert out.losses["lm"].item() == pytest.approx(out.losses["lm_at_exit"].item(), abs=1e-6)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert (model.eval()(tokens, return_trace=True).trace.depth == taken).all()


def test_where_the_caller_decides_the_loss_is_that_of_the_state() -> None:
    model, tokens = fresh_model("ouro"), random_tokens("ouro")
    for depth in ("uniform:2", "adaptive:8"):
        out = model(tokens, labels=tokens, depth=depth)
        assert set(out.losses) == {"lm"}
        assert torch.equal(out.loss, out.losses["lm"])
        evaluated = model.eval()(tokens, labels=tokens, depth=depth)
        assert largest_change(evaluated.loss, out.loss) <= 1e-12
        model.train()


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_the_entropy_keeps_exits_in_use(weight: float) -> None:
    """A short training on one batch: with a large weight the exits become alike, without one they do not stay so."""
    model: Any = morex.build_model(load("ouro", f"model.depth.entropy_weight={weight}").model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = random_tokens("ouro", 4, 24)
    for _ in range(60):
        out = model(tokens, labels=tokens)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    entropy, most = out.losses["exit_entropy"].item(), math.log(config_of("ouro").schedule.recursions)
    assert entropy > 0.95 * most if weight else entropy < 0.9 * most


@pytest.mark.parametrize("depth", ["exit:0", "exit:-1", "exit:nan", "exit:inf", "exit:gate:x", "exit:gat", "exit:kl:1"])
def test_exits_that_make_no_sense_are_refused(depth: str) -> None:
    with pytest.raises(ValueError, match=rf"depth '{depth}'") as refusal:
        eval_model("ouro")(random_tokens("ouro"), depth=depth)
    assert "\n" not in str(refusal.value)


def test_exits_of_routers_without_rules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"exit.*exit_gate"):
        eval_model("mor-expert")(random_tokens("mor-expert"), depth="exit:0.5")
    with pytest.raises(ValueError, match=r"exit.*exit_gate"):
        morex.count(config_of("mor-expert"), depth="exit:0.5")


REFUSED: dict[str, tuple[list[str], str]] = {
    "a coda": (
        ["model.schedule={sharing: cycle, core: 2, coda: 1, recursions: 4}"],
        r"exit_gate.*coda of 1.*schedule.coda 0",
    ),
    "unique ends": (["model.schedule={sharing: middle_cycle, layers: 8, recursions: 3}"], r"exit_gate.*coda"),
    "several groups": (["model.schedule={sharing: sequence, core: 2, recursions: 4}"], r"exit_gate.*sequence.*cycle"),
    "nowhere to leave": (["model.schedule={sharing: cycle, core: 2, recursions: 1}"], r"exit_gate.*recursions is 1"),
    "no keys of those who left": (["model.kv=per_recursion"], r"exit_gate.*per_recursion.*refresh"),
    "no threshold": (["model.depth.threshold=0"], r"threshold.*0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configs_that_make_no_sense_are_refused(name: str) -> None:
    changes, pattern = REFUSED[name]
    with pytest.raises(ConfigError, match=pattern) as refusal:
        morex.load_config("ouro", changes, tiny=True)
    assert "\n" not in str(refusal.value)
