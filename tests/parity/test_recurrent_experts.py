"""Expert layers that recur: their formulas, the entropy floor, the random first state and the trace."""

import math
from typing import Any

import pytest
import torch

import morex
from morex.config import ModelConfig
from morex.experts.layer_recurrent import temperature
from morex.loading import validate
from parity.helpers import build, labels_of, largest_change, pad
from parity.recurrent_reference import RecurrentReference
from parity.test_reference import SMALL, sequences

CASES: dict[str, dict[str, Any]] = {
    "huginn": {"kind": "huginn", "d_ff": 10},
    "huginn, one": {"kind": "huginn", "router": {"experts": 3, "top_k": 1}, "steps": 3},
    "huginn, alone": {"kind": "huginn", "attention_scope": "token"},
    "shared": {"kind": "shared_recurrent", "d_ff": 12},
    "shared, relu": {"kind": "shared_recurrent", "expert": {"kind": "relu", "d_ff": 6}, "steps": 3},
    "layer": {"kind": "layer_recurrent", "expert": {"kind": "relu", "d_ff": 12}},
    "layer, one": {"kind": "layer_recurrent", "router": {"experts": 3, "top_k": 1}, "steps": 3, "ema": 0.5},
    "layer, free": {"kind": "layer_recurrent", "ema": 0.0, "entropy_floor": 0.0, "scale": 0.5},
    "layer, high floor": {"kind": "layer_recurrent", "entropy_floor": 5.0, "ema": 0.2},
}


def config_of(mixer: dict[str, Any]) -> ModelConfig:
    return validate(ModelConfig, {**SMALL, "mixer": {"router": {"experts": 3, "top_k": 2}, **mixer}})


@pytest.mark.parametrize("case", CASES)
def test_formula(case: str) -> None:
    config = config_of(CASES[case])
    model = build(config, seed=5, std=0.5).eval()
    reference = RecurrentReference(config.model_dump(), model.state_dict(), training=False)
    rows = sequences()
    tokens, lengths = pad(rows)
    logits = model(tokens, lengths=lengths).logits
    for row, own in zip(rows, logits, strict=True):
        expected = reference.logits(row.tolist())
        assert expected.std() > 0.1
        assert largest_change(own[: len(row)], expected) <= 1e-9


def entropy(logits: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def test_the_temperature_lifts_the_entropy_to_the_floor_and_no_further() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(200, 5, generator=generator, dtype=torch.float64)
    floor = 0.8
    before, found = entropy(logits), temperature(logits, floor)
    assert 0 < (before < floor).sum() < 200
    assert (found[before >= floor] == 1).all()
    warm = entropy(logits / found.unsqueeze(1))[before < floor]
    assert (found[before < floor] > 1).all()
    torch.testing.assert_close(warm, torch.full_like(warm, floor), rtol=0, atol=1e-9)


@pytest.mark.parametrize("experts", [2, 4, 64])
@pytest.mark.parametrize("spread", [0.3, 2.0, 30.0, 3000.0])
def test_the_temperature_is_found_for_any_logits(experts: int, spread: float) -> None:
    """Ties at the top, one far ahead, all in steps: tokens that need many halvings stand beside ones that need few."""
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(300, experts, generator=generator, dtype=torch.float64)
    logits[:100, 1] = logits[:100, 0] = logits[:100].amax(1)
    logits[100:200, 0] += spread * 10
    floor = 0.85 * math.log(experts)
    found = temperature(logits, floor)
    below = entropy(logits) < floor
    warm = entropy(logits / found.unsqueeze(1))[below]
    torch.testing.assert_close(warm, torch.full_like(warm, floor), rtol=0, atol=1e-9)
    assert (found[~below] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_temperature_of_a_saturated_router_is_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [1e4, 1e4, -1e4], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    found = temperature(logits, 0.9 * math.log(3))
    assert torch.isfinite(found).all() and found[2] == 1
    warm = entropy(logits / found.unsqueeze(1))
    assert (warm >= 0.9 * math.log(3) - 1e-4).all()
    found.sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_the_temperature_has_its_gradient() -> None:
    logits = torch.tensor([[4.0, 1.0, -2.0], [0.1, 0.0, 0.2], [3.0, 3.5, -1.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: temperature(x, 0.8), logits.requires_grad_())


@pytest.mark.parametrize("preset", ["more-a", "more-b"])
def test_the_first_state_is_random_in_training_only(preset: str) -> None:
    model = morex.build_model(morex.load_config(preset, ["model.mixer.state_std=0.5"], tiny=True).model)
    tokens = torch.randint(97, (3, 12), generator=torch.Generator().manual_seed(0))

    def logits(seed: int, inputs: torch.Tensor = tokens) -> torch.Tensor:
        torch.manual_seed(seed)
        out: torch.Tensor = model(inputs).logits
        return out

    assert torch.equal(model.eval()(tokens).logits, model(tokens).logits)
    model.train()
    first = logits(1)
    assert torch.equal(first, logits(1))
    assert largest_change(first, logits(2)) > 1e-3
    # The last token of the last row is the last to be drawn for: nothing before it may move.
    changed = tokens.clone()
    changed[-1, -1] = (changed[-1, -1] + 1) % 97
    other = logits(1, changed)
    torch.testing.assert_close(other[:, :-1], first[:, :-1], rtol=0, atol=1e-6)


def test_a_trace_has_every_step_of_a_layer() -> None:
    model = morex.build_model(morex.load_config("more-c", ["model.mixer.steps=3"], tiny=True).model).eval()
    tokens = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9, 6])
    trace = model(tokens, lengths=lengths, return_trace=True).trace
    layers = [name for name, _ in model.named_modules() if name.endswith("mixer.router")]
    assert list(trace.experts) == list(trace.expert_logits) == list(trace.expert_states) == layers
    for name in layers:
        assert [load.sum().item() for load in trace.loads[name]] == [15] * 3  # one expert a token
        states, logits = trace.expert_states[name], trace.expert_logits[name]
        assert len(states) == len(logits) == 3
        assert states[0].shape == (2, 9, 32) and logits[0].shape == (2, 9, 4)
        assert torch.isnan(states[0][1, 6:]).all() and torch.isfinite(states[0][1, :6]).all()
        router = model.get_submodule(name)
        # The second choice averages the logits of the first with those of the state that it left behind.
        fresh = router.logits(states[0][0])
        torch.testing.assert_close(logits[1][0], 0.9 * logits[0][0] + 0.1 * fresh)


def test_the_averaged_logits_of_a_step_leave_no_graph_behind() -> None:
    model = morex.build_model(morex.load_config("more-c", tiny=True).model).train()
    tokens = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))

    def nodes() -> int:
        seen: set[Any] = set()
        waiting = [model(tokens, labels=labels_of(tokens)).loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [below for below, _ in node.next_functions]
        return len(seen)

    assert len({nodes() for _ in range(3)}) == 1
