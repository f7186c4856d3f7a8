"""Invariant 5: every parameter learns from the loss of the objective, a language model's or a classifier's."""

import re
from typing import Any

import pytest
import torch

from parity.helpers import (
    CASES,
    build,
    cases,
    config_of,
    fresh_model,
    has_experts,
    labels_for,
    random_tokens,
)

# Parameters that the loss of the objective cannot move, and why.
EXCEPTIONS: dict[str, str] = {
    r"\.router\.predictor\.": "the aux_router predictor learns from its own loss, with stopped gradient",
    r"\.router\.score\.": "scores of an `unweighted` router learn from its own loss: a gate of 1 carries no gradient",
    r"\.mixer\.[qk]$": "query and key weights that `more` keeps for its parameter count: a token that sees only "
    "itself has a softmax over one score",
    r"\.attention\.k\.bias$": "without rotation the bias of a key adds the same to every score of a query",
}


def is_exempt(case: str, name: str) -> bool:
    if re.search(r"\.router\.score\.", name):
        return getattr(config_of(case).depth, "score", None) == "unweighted"
    if re.search(r"\.mixer\.[qk]$", name):
        mixer = config_of(case).mixer
        return mixer.kind == "recursive" and mixer.keep_unused_qk
    if re.search(r"\.attention\.k\.bias$", name):
        return config_of(case).attention.positions != "rope"
    return any(re.search(pattern, name) for pattern in EXCEPTIONS)


def gradients(case: str) -> dict[str, float]:
    """Largest gradient of each parameter from the objective's loss on a batch that visits everything."""
    for seed in range(1, 30):
        model = build(config_of(case), seed=seed)
        tokens = random_tokens(case, 4, 24)
        out = model(tokens, labels=labels_for(case, tokens), return_trace=True)
        if not visits_everything(case, out.trace):
            continue
        out.losses[out.objective].backward()
        return {
            name: 0.0 if parameter.grad is None else parameter.grad.abs().max().item()
            for name, parameter in model.named_parameters()
        }
    raise AssertionError(f"no perturbation of {case} visits every recursion and expert")


def visits_everything(case: str, trace: Any) -> bool:
    config = config_of(case)
    visited = all(mask.any() for masks in trace.active.values() for mask in masks)
    if config.depth.kind == "token_choice":  # a depth that no token chooses is a score that no gate uses
        groups = trace.active.values()
        for masks in groups:
            taken = torch.stack(list(masks)).sum(0).flatten().bincount(minlength=config.schedule.recursions + 1)
            visited &= bool((taken[1:] > 0).all())
    if has_experts(config):
        for chosen in trace.experts.values():
            ids = torch.cat([part[part >= 0].flatten() for part in chosen])
            visited &= len(ids.unique()) == config.mixer.router.experts
    return visited


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_alive(case: str) -> None:
    largest = gradients(case)
    median = torch.tensor(list(largest.values())).median().item()
    assert median > 0
    dead = [name for name, value in largest.items() if value < 1e-6 * median and not is_exempt(case, name)]
    assert not dead


@pytest.mark.parametrize("case", ["more", "expert+aux_router", "expert+unweighted", "recursive+learned"])
def test_exceptions_are_really_dead(case: str) -> None:
    """The list of exceptions names nothing that is alive."""
    largest = gradients(case)
    exempt = {name: value for name, value in largest.items() if is_exempt(case, name)}
    assert exempt
    assert max(exempt.values()) <= 1e-12


@pytest.mark.parametrize("case", ["expert+aux_router", "expert+unweighted"])
def test_what_has_a_loss_of_its_own_learns_from_it(case: str) -> None:
    model, tokens = fresh_model(case), random_tokens(case, 4, 24)
    model(tokens, labels=tokens).loss.backward()
    own = [(n, p) for n, p in model.named_parameters() if ".router." in n and is_exempt(case, n)]
    assert own
    for name, parameter in own:
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


GATED = [case for case in cases("expert_choice", "threshold", "token_choice", "halting") if case != "expert+unweighted"]


@pytest.mark.parametrize("case", GATED)
def test_routers_learn_from_the_objective(case: str) -> None:
    """The gate carries the gradient: every recursion's router gets one."""
    model, tokens = fresh_model(case), random_tokens(case, 4, 24)
    out = model(tokens, labels=labels_for(case, tokens))
    out.losses[out.objective].backward()
    scorers = [(n, p) for n, p in model.named_parameters() if ".groups." in n and ".router.score." in n]
    assert scorers
    for name, parameter in scorers:
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("case", cases(mixer="moe") + cases(mixer="recursive"))
def test_expert_routers_learn_from_the_objective(case: str) -> None:
    """For one expert a token too: the probability itself is the weight."""
    model, tokens = fresh_model(case), random_tokens(case, 4, 24)
    out = model(tokens, labels=labels_for(case, tokens))
    out.losses[out.objective].backward()
    routers = [(n, p) for n, p in model.named_parameters() if n.endswith("mixer.router.weight")]
    assert routers
    for name, parameter in routers:
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-8, name
