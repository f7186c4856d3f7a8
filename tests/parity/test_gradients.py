"""Gradients are those of the loss: hand-written backward passes and gathers included, against central differences."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from parity.helpers import (
    CASES,
    cases,
    config_of,
    fresh_model,
    labels_for,
    pad,
    plain_path,
    ragged_rows,
)

STEP = 1e-5


# Parameters of one part move together; names are searched for these in this order.
PARTS = ["mixer.router", "router", "step_embedding", "mixer", "attention", "norm", "embedding", "position", "head"]


def part_of(name: str) -> str:
    return next(part for part in PARTS if f".{part}" in f".{name}")


@contextmanager
def moved(model: Any, direction: dict[str, torch.Tensor], distance: float) -> Iterator[None]:
    """Parameters moved along a direction, for a while."""
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in direction}
    with torch.no_grad():
        for name, way in direction.items():
            parameters[name].add_(distance * way)
        yield
        for name, value in before.items():
            parameters[name].copy_(value)


def loss_of(case: str, model: Any, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The whole training loss; without the predictor's, whose gradient is stopped on purpose."""
    out = model(tokens, labels=labels_for(case, tokens, lengths), lengths=lengths)
    depth = model.config.depth
    stopped = depth.kind == "expert_choice" and depth.causal == "aux_router"
    loss: torch.Tensor = out.losses[out.objective] if stopped else out.loss
    return loss


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_loss(case: str) -> None:
    """Along a random direction through each part of the model, in a ragged batch."""
    model = fresh_model(case)
    tokens, lengths = pad(ragged_rows(case, [12, 7, 1]))
    loss_of(case, model, tokens, lengths).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    parts = sorted({part_of(name) for name in gradients})
    assert {"embedding", "norm", "attention", "mixer"} <= set(parts)
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        direction = {
            name: torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
            for name, gradient in gradients.items()
            if part_of(name) == part
        }
        length = sum(way.square().sum() for way in direction.values()) ** 0.5
        direction = {name: way / length for name, way in direction.items()}
        slope = sum((gradients[name] * way).sum().item() for name, way in direction.items())
        losses = []
        for distance in (STEP, -STEP):
            with moved(model, direction, distance):
                losses.append(loss_of(case, model, tokens, lengths).item())
        assert slope == pytest.approx((losses[0] - losses[1]) / (2 * STEP), rel=1e-4, abs=1e-8), part


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_plain_path(case: str) -> None:
    """What a reader reads and what runs give the same gradients."""
    tokens, lengths = pad(ragged_rows(case, [12, 7, 1]))
    models = [fresh_model(case), fresh_model(case)]
    losses = [loss_of(case, models[0], tokens, lengths)]
    losses[0].backward()
    with plain_path():
        losses.append(loss_of(case, models[1], tokens, lengths))
        losses[1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-9)
    for (name, first), (_, second) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        if first.grad is not None:
            assert second.grad is not None
            torch.testing.assert_close(first.grad, second.grad, rtol=0, atol=1e-9, msg=f"gradient of {name}")


@pytest.mark.parametrize("case", cases("fixed", mixer="swiglu"))
def test_gradients_under_bf16_autocast(case: str) -> None:
    """Fast paths under autocast are as near to the gradients in float64 as the plain path is, over several batches."""
    errors = {False: 0.0, True: 0.0}
    for seed in range(4):
        tokens, lengths = pad(ragged_rows(case, [24, 7, 1], seed))
        exact = fresh_model(case)
        loss_of(case, exact, tokens, lengths).backward()
        for plain in errors:
            model = fresh_model(case).float()
            with plain_path() if plain else contextlib.nullcontext():
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = loss_of(case, model, tokens, lengths)
                loss.backward()
            errors[plain] += relative_error(model, exact) / 4
    # A norm over the stream after every branch passes each rounding on in full: the plain path is off by 0.37 there.
    assert errors[False] < (0.5 if config_of(case).norm_placement == "sandwich" else 0.2)
    assert errors[False] < 2 * errors[True]


def relative_error(model: Any, exact: Any) -> float:
    """Length of the difference between two models' gradients, over the length of the exact one."""
    pairs = [(mine.grad, true.grad) for mine, true in zip(model.parameters(), exact.parameters(), strict=True)]
    assert all(mine.dtype == torch.float32 for mine, _ in pairs)
    wrong = sum((mine.double() - true).square().sum().item() for mine, true in pairs)
    return (wrong / sum(true.square().sum().item() for _, true in pairs)) ** 0.5
