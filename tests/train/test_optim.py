"""Weight decay reaches the right parameters once, and learning rates have the right values."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import morex
from morex.model.lm import LanguageModel, build_model
from morex.sections.train import TrainConfig
from morex.train.optim import build_optimizer, decay_groups, learning_rate, same_path
from train.helpers import configure

# Presets whose tiny forms differ in kinds of parameters; the others repeat them.
PRESETS = ["vanilla", "recursive", "mor-expert", "mor-token", "mor-threshold", "mor-act", "moe", "more", "more-tuned"]


def tiny(preset: str, *overrides: str) -> LanguageModel:
    return build_model(morex.load_config(preset, list(overrides), tiny=True).model)


@pytest.mark.parametrize("decay", ["matrices", "all"])
@pytest.mark.parametrize("preset", [*PRESETS, "paper-360m-mor-2", "mor-llm-small"])
def test_each_parameter_stands_in_one_group(preset: str, decay: str) -> None:
    model = tiny(preset)
    optimizer = build_optimizer(model, TrainConfig(decay=decay))  # type: ignore[arg-type]
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len({id(parameter) for parameter in grouped})
    assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("preset", PRESETS)
def test_decay_shrinks_matrices_and_nothing_else(preset: str) -> None:
    """A step with zero gradients shows the decay alone: times 1 - lr * decay, or times 1."""
    model = tiny(preset, "model.tie_embeddings=false")
    if model.config.schedule.sharing != "none":
        model = tiny(preset, "model.tie_embeddings=false", "model.step_embedding=true")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, TrainConfig(lr=0.1, weight_decay=0.5)).step()
    spared = ("embedding.weight", "step_embedding", "norm.weight", "norm1.weight", "norm2.weight")
    spared += ("norm_attention", "norm_mixer", "norm_out", "router.bias")  # norms of experts are stacked to [E, D]
    shrunk = 0
    for name, parameter in model.named_parameters():
        is_spared = name.endswith(spared)
        expected = 1.0 if is_spared else 1 - 0.1 * 0.5
        assert parameter.detach().flatten().tolist() == pytest.approx([expected] * parameter.numel()), name
        shrunk += not is_spared
    names = {name for name, _ in model.named_parameters()}
    assert shrunk >= 5 and "head.weight" in names and "embedding.weight" in names


def test_decay_all_shrinks_everything() -> None:
    model = tiny("more")
    decayed, spared = decay_groups(model, "all")
    assert decayed.keys() == dict(model.named_parameters()).keys() and not spared


def test_biases_and_foreign_norms_are_spared_and_a_shared_parameter_counts_once() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.first = nn.Embedding(7, 4), nn.LayerNorm(4)
            self.map, self.head = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.words.weight
            self.gate_bias = nn.Parameter(torch.zeros(2, 4))

    decayed, spared = decay_groups(Model(), "matrices")
    assert decayed.keys() == {"map.weight"}
    assert spared.keys() == {"words.weight", "first.weight", "first.bias", "map.bias", "gate_bias"}


def test_adamw_follows_its_formula() -> None:
    """One parameter, two steps, by hand (Loshchilov and Hutter 2019, algorithm 2)."""
    model = nn.Linear(1, 1, bias=False).double()
    w, lr, decay, betas, eps = 2.0, 0.1, 0.5, (0.9, 0.99), 1e-6
    config = TrainConfig(lr=lr, weight_decay=decay, betas=betas, eps=eps)
    model.weight.data.fill_(w)
    optimizer = build_optimizer(model, config)
    m = v = 0.0
    for step, gradient in enumerate((0.3, -0.7), start=1):
        model.weight.grad = torch.tensor([[gradient]], dtype=torch.float64)
        optimizer.step()
        m, v = betas[0] * m + (1 - betas[0]) * gradient, betas[1] * v + (1 - betas[1]) * gradient**2
        change = (m / (1 - betas[0] ** step)) / (math.sqrt(v / (1 - betas[1] ** step)) + eps)
        w = w - lr * decay * w - lr * change
        assert model.weight.item() == pytest.approx(w, abs=1e-12)


def plan(**options: Any) -> TrainConfig:
    return TrainConfig(lr=1.0, **options)


def rates(config: TrainConfig) -> list[float]:
    return [learning_rate(config, step) for step in range(config.steps)]


def test_constant_after_warm_up() -> None:
    assert rates(plan(schedule="constant", steps=6, warmup_steps=4)) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(plan(schedule="constant", steps=3)) == [1.0, 1.0, 1.0]


def test_cosine_goes_from_the_top_to_the_last_ratio() -> None:
    found = rates(plan(schedule="cosine", steps=7, warmup_steps=3, min_lr_ratio=0.2))
    # After the top at the third update, four equal parts of half a cosine.
    fall = [0.2 + 0.8 * (0.5 + 0.5 * math.cos(math.pi * part / 4)) for part in range(1, 5)]
    assert found == pytest.approx([1 / 3, 2 / 3, 1.0, *fall])
    assert found[4] == pytest.approx(0.6) and found[-1] == pytest.approx(0.2)
    assert rates(plan(schedule="cosine", steps=3, min_lr_ratio=0.0)) == pytest.approx([1.0, 0.5, 0.0])


def test_trapezoid_is_flat_then_falls_in_a_line() -> None:
    found = rates(plan(schedule="trapezoid", steps=10, warmup_steps=2, cooldown_fraction=0.4, min_lr_ratio=0.2))
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("schedule", ["cosine", "trapezoid", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (2, 1), (5, 5), (3, 10)])
def test_short_runs_have_rates_too(schedule: str, steps: int, warmup: int) -> None:
    found = rates(plan(schedule=schedule, steps=steps, warmup_steps=warmup))
    assert len(found) == steps and all(0 < rate <= 1 for rate in found)


def test_plans_share_a_path_until_one_falls() -> None:
    short, long = plan(schedule="trapezoid", steps=10), plan(schedule="trapezoid", steps=20)
    assert same_path(short, long, 8) and not same_path(short, long, 9)
    assert same_path(plan(schedule="constant", steps=3), plan(schedule="constant", steps=9), 3)
    assert not same_path(plan(schedule="cosine", steps=10), plan(schedule="cosine", steps=20), 2)


def test_the_run_reports_the_rate_it_used(corpus: Path, tmp_path: Path) -> None:
    from train.helpers import run

    config = configure("vanilla", corpus)
    lines = run(config, tmp_path / "run").metrics("train")
    assert [line["lr"] for line in lines] == [learning_rate(config.train, step) for step in range(6)]
