"""Exit rules at call time: against the plain reference, with the cache, and their counts."""

from typing import Any

import pytest
import torch

import morex
from morex.depth.exits import THRESHOLDS
from morex.depth.policy import PEEKING
from parity.exit_reference import RuleReference
from parity.helpers import config_of, eval_model, fresh_model, largest_change, pad, ragged_rows, random_tokens
from parity.test_cached import CHUNKS, assert_cached_equals_full
from parity.test_counts import LENGTH, flops, measured_shares
from parity.test_reference import RECURRING, model_of, sequences
from parity.test_reference import config_of as small_config

CASES = ["recursive+refresh", "recursive+shared_first", "huginn", "huginn+recursive_experts"]
FORMS: dict[str, dict[str, Any]] = {
    "fixed, refresh": {**RECURRING, "kv": "refresh"},
    "fixed, shared first": {**RECURRING, "kv": "shared_first"},
    "fixed, window": {**RECURRING, "kv": "refresh", "attention": {"heads": 2, "window": 3}},
    "sampled": {
        **RECURRING,
        "kv": "refresh",
        "depth": {"kind": "sampled", "state": "random"},
        "input_injection": "concat",
        "norm_placement": "sandwich",
    },
}


def splitting_threshold(model: Any, tokens: torch.Tensor, rule: str) -> float:
    """A threshold that some tokens pass before the last recursion, and others do not."""
    if rule == "argmax":
        return 1.0
    trace = model(tokens, depth=f"exit:{rule}:1e-300", return_trace=True).trace
    (scores,) = trace.scores.values()
    finite = torch.cat([score[score.isfinite()].flatten() for score in scores[:-1]])
    return float(f"{finite.double().median().item():.4g}")


@pytest.mark.parametrize("rule", THRESHOLDS)
@pytest.mark.parametrize("form", FORMS)
def test_tokens_leave_as_in_the_reference(form: str, rule: str) -> None:
    model, rows = model_of(small_config(FORMS[form])).eval(), sequences()
    tokens, lengths = pad(rows)
    threshold = splitting_threshold(model, tokens, rule)
    reference = RuleReference(model.config.model_dump(), model.state_dict(), training=False)
    reference.rule, reference.threshold = rule, threshold
    out = model(tokens, lengths=lengths, depth=f"exit:{rule}:{threshold}", return_trace=True)
    depths = set()
    for row, logits, taken in zip(rows, out.logits, out.trace.depth, strict=True):
        assert largest_change(logits[: len(row)], reference.logits(row.tolist())) <= 1e-9
        assert taken[: len(row)].tolist() == list(dict(sorted(reference.taken.items())).values())
        depths |= set(reference.taken.values())
    assert len(depths) > 1 or rule == "argmax"


@pytest.mark.parametrize("cut", ["ones", "ragged"])
@pytest.mark.parametrize("rule", THRESHOLDS)
@pytest.mark.parametrize("case", CASES)
def test_cached_equals_full_under_exit_rules(case: str, rule: str, cut: str) -> None:
    """Prompts included: what a token does depends on itself and on what came before."""
    rows = ragged_rows(case, [sum(sizes) for sizes in CHUNKS[cut]])
    threshold = splitting_threshold(eval_model(case), rows[0][None], rule)
    assert_cached_equals_full(case, cut, f"exit:{rule}:{threshold}")


@pytest.mark.parametrize("case", ["recursive+refresh", "huginn"])
def test_generation_under_an_exit_rule(case: str) -> None:
    model: Any = eval_model(case)
    prompts = [row.tolist() for row in ragged_rows(case, [5, 1, 3])]
    depth = f"exit:kl:{splitting_threshold(model, random_tokens(case), 'kl')}"
    cached = model.generate(prompts, max_new_tokens=6, depth=depth)
    assert cached == model.generate(prompts, max_new_tokens=6, depth=depth, use_cache=False)


@pytest.mark.parametrize("rule", THRESHOLDS)
def test_rules_that_nothing_meets_change_nothing(rule: str) -> None:
    for case in ("recursive+refresh", "huginn"):
        model, tokens = eval_model(case), random_tokens(case)
        never = 99 if rule == "argmax" else 1e-300
        assert largest_change(model(tokens, depth=f"exit:{rule}:{never}").logits, model(tokens).logits) <= 1e-9
        if rule != "argmax":
            first = 1 if rule in ("latent", "cosine") else 2
            out = model(tokens, depth=f"exit:{rule}:1e9", return_trace=True)
            assert (out.trace.depth == first).all()
            assert largest_change(out.logits, model(tokens, depth=first).logits) <= 1e-9


def test_defaults_are_the_published_ones() -> None:
    model, tokens = eval_model("huginn"), random_tokens("huginn")
    for rule, threshold in THRESHOLDS.items():
        named, given = (model(tokens, depth=f"exit:{rule}{end}").logits for end in ("", f":{threshold}"))
        assert torch.equal(named, given)


@pytest.mark.parametrize("rule", THRESHOLDS)
@pytest.mark.parametrize("case", CASES[:3])
def test_flops_of_peeks_are_counted(case: str, rule: str) -> None:
    """One sequence, at the shares that it had: coda and head once more for every recursion but the last."""
    config, tokens, model = config_of(case), random_tokens(case, 1, LENGTH), eval_model(case)
    depth = f"exit:{rule}:{splitting_threshold(model, tokens, rule)}"
    with torch.no_grad():
        shares = measured_shares(model(tokens, depth=depth).stats)
    counts = morex.count(config, seq_len=LENGTH, depth=depth, shares=shares)
    measured = flops(case, model, tokens, backward=False, depth=depth) / tokens.numel()
    assert counts.forward_flops_per_token == pytest.approx(measured, rel=1e-9)
    most = morex.count(config, seq_len=LENGTH, depth=depth).forward_flops_per_token
    plain = morex.count(config, seq_len=LENGTH).forward_flops_per_token
    assert (most > plain) == (rule in PEEKING)


def test_peeks_write_no_keys() -> None:
    model: Any = eval_model("huginn")
    tokens, sizes = random_tokens("huginn"), []
    for depth in (4, "exit:kl:1e-300"):
        cache = model.new_cache(2)
        model(tokens, cache=cache, depth=depth)
        sizes.append(cache.bytes())
    assert sizes[0] == sizes[1]


REFUSED: dict[str, tuple[str, str, bool]] = {
    "no keys of those who left": ("recursive", r"exit:kl.*per_recursion.*refresh", True),
    "training": ("recursive+refresh", r"exit:kl.*training mode.*eval", False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_exits_that_make_no_sense_are_refused(name: str) -> None:
    case, pattern, evaluates = REFUSED[name]
    model = eval_model(case) if evaluates else fresh_model(case)
    with pytest.raises(ValueError, match=pattern) as refusal:
        model(random_tokens(case), depth="exit:kl")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("preset", "depth", "pattern"),
    [
        ("ouro", "exit:kx", r"exit:kx.*names an exit rule.*use gate"),
        ("ouro", "exit:gate:0", r"above 0"),
        ("huginn", "exit:kl:many", r"exit:kl:many.*threshold above 0.*exit:kl:0\.5"),
        ("huginn", "exit:kl:inf", r"finite"),
        ("huginn", "exit:nan", r"threshold above 0"),
        ("huginn", "exit:gate:0.5", r"names an exit rule.*use kl"),
    ],
)
def test_mistyped_exits_are_refused_with_what_works(preset: str, depth: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        eval_model(preset)(random_tokens(preset), depth=depth)


def test_a_group_that_others_follow_has_no_exit() -> None:
    changes = {**RECURRING, "kv": "refresh", "schedule": RECURRING["schedule"] | {"sharing": "sequence"}}
    model = model_of(small_config(changes)).eval()
    with pytest.raises(ValueError, match=r"exit:latent.*one routed group.*'sequence'"):
        model(sequences()[0][None], depth="exit:latent")
