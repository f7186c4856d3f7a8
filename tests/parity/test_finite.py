"""Invariant 6: finite with saturated routers, with nothing active, with one token, one row, and in bf16."""

import math
from typing import Any

import pytest
import torch

import morex
from parity.helpers import (
    CASES,
    LM_CASES,
    REPEATABLE,
    build,
    cases,
    config_of,
    fresh_model,
    has_experts,
    labels_for,
    load,
    pad,
    ragged_rows,
    random_tokens,
    tensors_in,
)

EXPERT_CASES = [case for case in CASES if has_experts(config_of(case))]
LEARNED = cases("expert_choice", "token_choice", "threshold", "halting", "exit_gate")


def router_weights(model: Any) -> list[torch.nn.Parameter]:
    """Weights of the last linear map of every depth and expert router."""
    found = [p for name, p in model.named_parameters() if ".router." in name]
    assert found
    return found


def objective(out: Any) -> torch.Tensor:
    """The loss that the model learns from, without the auxiliary ones."""
    loss: torch.Tensor = out.losses[out.objective]
    return loss


def assert_finite_step(case: str, model: Any, tokens: torch.Tensor, lengths: torch.Tensor | None = None) -> None:
    """Forward and backward: finite loss, finite logits, a finite gradient for every parameter, none missing."""
    out = model(tokens, labels=labels_for(case, tokens, lengths), lengths=lengths)
    assert torch.isfinite(out.loss)
    real = torch.ones_like(tokens, dtype=torch.bool)
    if lengths is not None:
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
    assert torch.isfinite(out.logits if out.logits.dim() == 2 else out.logits[real]).all()
    assert all(torch.isfinite(loss) for loss in out.losses.values())
    out.loss.backward()
    config: Any = model.config
    for name, parameter in model.named_parameters():
        unused = name.endswith((".mixer.q", ".mixer.k")) and getattr(config.mixer, "keep_unused_qk", False)
        assert parameter.grad is not None or unused, f"{name} has no gradient"
        assert unused or torch.isfinite(parameter.grad).all(), f"{name} has a gradient that is not finite"
    model.update_routers(out.stats, 1)
    for name, buffer in model.named_buffers():
        assert not torch.isnan(buffer).any(), name


@pytest.mark.parametrize("factor", [1e4, -1e4])
@pytest.mark.parametrize("case", sorted({*LEARNED, *EXPERT_CASES}))
def test_finite_with_saturated_routers(case: str, factor: float) -> None:
    model = build(config_of(case), torch.float32)
    with torch.no_grad():
        for weight in router_weights(model):
            weight.mul_(factor)
    assert_finite_step(case, model, random_tokens(case))
    assert torch.isfinite(model.eval()(random_tokens(case)).logits).all()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", cases("threshold"))
def test_finite_with_no_token_active(case: str, mode: str) -> None:
    model = fresh_model(case)
    for name, buffer in model.named_buffers():
        if name.endswith(".threshold"):
            buffer[torch.isfinite(buffer)] = 1e9
    tokens = random_tokens(case)
    if mode == "train":
        assert_finite_step(case, model, tokens)
    model.eval()
    out = model(tokens, return_trace=True)
    empty = [mask for masks in out.trace.active.values() for mask in masks if not mask.any()]
    assert empty
    assert torch.isfinite(out.logits).all()


@pytest.mark.parametrize("case", cases("expert_choice", head="lm"))
def test_finite_when_inference_visits_no_recursion(case: str) -> None:
    """All causal logits negative: recursions that not every token takes are empty, with and without cache."""
    model: Any = fresh_model(case).eval()
    dislike_everything(model)
    tokens = random_tokens(case)
    out = model(tokens, return_trace=True)
    shares = config_of(case).depth.shares(config_of(case).schedule.recursions)
    for masks in out.trace.active.values():
        for share, mask in zip(shares, masks, strict=True):
            assert mask.all() if share == 1 else not mask.any()
    assert torch.isfinite(out.logits).all()
    prompts = [row.tolist() for row in ragged_rows(case, [5, 2])]
    cached = model.generate(prompts, max_new_tokens=4)
    assert cached == model.generate(prompts, max_new_tokens=4, use_cache=False)


def dislike_everything(model: Any) -> None:
    """Moves every state far along one direction, for which every depth router has a negative logit."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".groups." in name and ".router." in name:
                parameter.fill_(1e-2 if name.endswith("hidden") else -1e-4)
        model.embedding.weight.add_(1e4)


@pytest.mark.parametrize("case", cases("token_choice"))
def test_finite_when_all_tokens_choose_one_depth(case: str) -> None:
    recursions = config_of(case).schedule.recursions
    for favourite in range(recursions):
        model: Any = fresh_model(case)
        dislike_everything(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".groups." in name and name.endswith(".router.score.weight"):
                    parameter[favourite].mul_(-1)
        tokens = random_tokens(case)
        first = next(iter(model(tokens, return_trace=True).trace.active.values()))
        assert torch.stack(list(first)).sum(0).unique().tolist() == [favourite + 1]
        assert_finite_step(case, model, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_where_every_depth_scores_nothing(dtype: torch.dtype) -> None:
    """Sigmoid scores that all vanish still have shares, in the balance loss and in the entropy."""
    model: Any = build(load("mor-token", "model.depth.score=sigmoid").model, dtype)
    dislike_everything(model)
    with torch.no_grad():
        model.stack.core.groups[0].router.score.weight.mul_(1e3)
    tokens = random_tokens("mor-token")
    out = model(tokens, return_trace=True)
    assert all((score == 0).all() for scores in out.trace.scores.values() for score in scores)
    assert not any(torch.isnan(statistic).any() for statistic in tensors_in(out.stats))
    assert_finite_step("mor-token", model, tokens)


@pytest.mark.parametrize("case", EXPERT_CASES)
def test_finite_when_an_expert_is_never_visited(case: str) -> None:
    """Its parameters still have a gradient, of zeros, so that ranks stay in step."""
    model = fresh_model(case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mixer.router.weight"):
                parameter.zero_()  # ties go one way for all tokens
    out = model(random_tokens(case), return_trace=True)
    config: Any = model.config
    for chosen in out.trace.experts.values():
        ids = torch.cat([part[part >= 0].flatten() for part in chosen])
        assert len(ids.unique()) == config.mixer.router.top_k
    assert_finite_step(case, model, random_tokens(case))


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 7)])
@pytest.mark.parametrize("case", CASES)
def test_finite_on_the_smallest_batches(case: str, shape: tuple[int, int]) -> None:
    """One row, one token. A single token has no next one: its loss is that of the label given in the window."""
    tokens = random_tokens(case, *shape)
    model = fresh_model(case)
    is_lm = config_of(case).head.kind == "lm"
    window = torch.cat([tokens, tokens[:, :1]], 1) if is_lm else labels_for(case, tokens)
    out = model(tokens, labels=window)
    expected = (*shape, config_of(case).vocab_size) if is_lm else (shape[0], config_of(case).head.classes)
    assert out.logits.shape == expected
    assert torch.isfinite(out.loss)
    out.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    model.update_routers(out.stats, 1)
    assert torch.isfinite(model.eval()(tokens).logits).all()


@pytest.mark.parametrize("case", CASES)
def test_finite_with_rows_of_one_token(case: str) -> None:
    tokens, lengths = pad(ragged_rows(case, [12, 1, 2]))
    assert_finite_step(case, fresh_model(case), tokens, lengths)


@pytest.mark.parametrize("case", CASES)
def test_finite_in_bf16_autocast(case: str) -> None:
    model = build(config_of(case), torch.float32, std=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_finite_step(case, model, random_tokens(case))


@pytest.mark.parametrize("case", REPEATABLE)
def test_bf16_autocast_is_close_to_fp32(case: str) -> None:
    full = build(config_of(case), torch.float32, std=0.1)
    tokens = random_tokens(case)
    labels = labels_for(case, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half_loss = objective(full(tokens, labels=labels)).item()
    assert half_loss == pytest.approx(objective(full(tokens, labels=labels)).item(), abs=0.1)


@pytest.mark.parametrize("case", CASES)
def test_finite_in_bf16(case: str) -> None:
    model: Any = morex.build_model(config_of(case), dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(random_tokens(case)).logits).all()


@pytest.mark.parametrize("case", LM_CASES)
def test_generates_in_bf16(case: str) -> None:
    model: Any = morex.build_model(config_of(case), dtype=torch.bfloat16).eval()
    prompts = [row.tolist() for row in ragged_rows(case, [5, 2])]
    assert [len(ids) for ids in model.generate(prompts, max_new_tokens=3)] == [8, 5]


def test_loss_at_initialisation_is_that_of_a_guess() -> None:
    """Before training every token, or class, is about equally likely."""
    for case in morex.presets():
        tokens = random_tokens(case, 4, 24)
        model = morex.build_model(load(case).model)
        head = config_of(case).head
        guess = math.log(97 if head.kind == "lm" else head.classes)
        loss = objective(model(tokens, labels=labels_for(case, tokens)))
        assert loss.item() == pytest.approx(guess, abs=0.4), case


@pytest.mark.parametrize("case", ["vanilla", "mor-expert", "more-tuned"])
def test_long_training_stays_finite(case: str) -> None:
    """Twenty steps at a high rate on one batch: the loss falls and nothing breaks."""
    tokens = random_tokens(case, 4, 24)
    model: Any = morex.build_model(config_of(case)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(1, 21):
        out = model(tokens, labels=tokens)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_routers(out.stats, step)
        losses.append(out.losses["lm"].item())
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.7 * losses[0]
