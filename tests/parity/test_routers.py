"""What routers learn outside of gradients: thresholds, biases, warm-ups; and the decisions that are not learned."""

import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from morex.config import ModelConfig
from morex.depth.random_choice import KNOWN, RandomRouter, uniform_hash
from morex.loading import validate
from parity.helpers import (
    REPEATABLE,
    build,
    cases,
    config_of,
    eval_model,
    fresh_model,
    labels_for,
    load,
    pad,
    ragged_rows,
    random_tokens,
)


def has_oracle(case: str) -> bool:
    """Whether a router of the steps inside experts has another rule in training."""
    return getattr(getattr(config_of(case).mixer, "depth", None), "kind", None) == "expert_choice"


def small(depth: dict[str, Any], recursions: int = 3) -> ModelConfig:
    schedule = {"sharing": "cycle", "core": 1, "recursions": recursions}
    mixer = {"kind": "swiglu", "d_ff": 12}
    tree = {"vocab_size": 97, "d_model": 8, "attention": {"heads": 2}, "mixer": mixer, "max_seq_len": 256}
    return validate(ModelConfig, {**tree, "schedule": schedule, "depth": depth})


def active_masks(model: Any, tokens: Tensor, **options: Any) -> list[Tensor]:
    """Active [B, T] of every recursion of the only routed group."""
    (masks,) = model(tokens, return_trace=True, **options).trace.active.values()
    return list(masks)


def state(model: Any, ending: str) -> Tensor:
    (value,) = (value for name, value in model.state_dict().items() if name.endswith(ending))
    return value


def many_tokens(batch: int = 4, length: int = 120) -> Tensor:
    return torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(2))


def test_threshold_tracks_the_quantile_of_the_candidates() -> None:
    """With momentum 0 one update puts the threshold where share c_r / c_{r-1} of the candidates lies above."""
    model = build(small({"kind": "threshold", "momentum": 0.0}), std=0.5)
    tokens = many_tokens()
    model.update_routers(model(tokens, labels=tokens).stats, 1)
    masks = active_masks(model, tokens)
    assert masks[0].all()
    assert masks[1].double().mean().item() == pytest.approx(2 / 3, abs=0.01)
    model.update_routers(model(tokens, labels=tokens).stats, 2)
    third, second = (mask.sum().item() for mask in reversed(active_masks(model, tokens)[1:]))
    assert third / second == pytest.approx(1 / 2, abs=0.01)


def test_threshold_moves_by_its_momentum() -> None:
    tokens = many_tokens()
    quick = build(small({"kind": "threshold", "momentum": 0.0}), std=0.5)
    slow = build(small({"kind": "threshold", "momentum": 0.75}), std=0.5)
    for model in (quick, slow):
        state(model, ".threshold")[1:] = 0.125
        model.update_routers(model(tokens, labels=tokens).stats, 1)
    expected = 0.75 * 0.125 + 0.25 * state(quick, ".threshold")[1:]
    assert (state(quick, ".threshold")[1:] - 0.125).abs().min() > 1e-3
    torch.testing.assert_close(state(slow, ".threshold")[1:], expected, rtol=0, atol=1e-6)


def test_threshold_is_open_where_no_token_stops() -> None:
    model = build(small({"kind": "threshold", "capacities": [1.0, 1.0, 0.5]}))
    tokens = many_tokens()
    model.update_routers(model(tokens, labels=tokens).stats, 1)
    threshold = state(model, ".threshold")
    assert threshold[0] == threshold[1] == -math.inf
    assert math.isfinite(threshold[2])


def test_threshold_of_microbatches_is_that_of_the_batch() -> None:
    tokens = many_tokens()
    whole, parts = (build(small({"kind": "threshold", "momentum": 0.5}), std=0.5) for _ in range(2))
    whole.update_routers(whole(tokens, labels=tokens).stats, 1)
    halves = [parts(half, labels=half).stats for half in tokens.chunk(2)]
    parts.update_routers(halves[0] + halves[1], 1)
    torch.testing.assert_close(state(parts, ".threshold"), state(whole, ".threshold"), rtol=0, atol=1e-9)


def test_budget_of_threshold_can_be_turned_after_training() -> None:
    model = fresh_model("mor-threshold").eval()
    tokens = random_tokens("mor-threshold", 4, 24)
    taken = []
    for border in (-10.0, 0.0, 10.0):
        state(model, ".threshold")[1:] = border
        taken.append(sum(mask.sum().item() for mask in active_masks(model, tokens)))
    assert taken[0] == 3 * tokens.numel()
    assert taken[2] == tokens.numel()
    assert taken[2] < taken[1] < taken[0]


def test_loss_free_bias_of_token_choice() -> None:
    """b_i moves by u towards depths that are chosen too seldom."""
    model = build(small({"kind": "token_choice", "balance": "loss_free", "bias_rate": 0.01}), std=0.5)
    tokens = many_tokens()
    out = model(tokens, labels=tokens, return_trace=True)
    shares = out.trace.depth.flatten().bincount(minlength=4)[1:].double() / tokens.numel()
    model.update_routers(out.stats, 1)
    assert shares.max() > 1 / 3 > shares.min()
    torch.testing.assert_close(state(model, ".bias").double(), 0.01 * torch.sign(1 / 3 - shares))
    assert "depth_balance" not in out.loss_weights or out.loss_weights["depth_balance"] == 0


def test_loss_free_bias_of_experts() -> None:
    mixer = {"kind": "moe", "router": {"experts": 4, "top_k": 2, "bias_rate": 0.01}, "expert": {"d_ff": 8}}
    tree = {"vocab_size": 97, "d_model": 8, "attention": {"heads": 2}, "mixer": mixer}
    model = build(validate(ModelConfig, {**tree, "schedule": {"layers": 1}}), std=0.5)
    tokens = many_tokens()
    out = model(tokens, labels=tokens, return_trace=True)
    (chosen,) = out.trace.experts.values()
    loads = torch.cat([ids.flatten() for ids in chosen]).bincount(minlength=4).double()
    model.update_routers(out.stats, 1)
    torch.testing.assert_close(state(model, "router.bias").double(), 0.01 * torch.sign(loads.mean() - loads))


def test_capacity_warm_up_falls_along_a_cosine() -> None:
    model = build(small({"kind": "expert_choice", "warmup_steps": 10}), std=0.5)
    tokens = many_tokens(2, 120)
    for step in (0, 5, 10, 15):
        if step:
            model.update_routers(model(tokens, labels=tokens).stats, step)
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, step / 10)))
        for recursion, mask in enumerate(active_masks(model, tokens)):
            target = (3 - recursion) / 3
            expected = math.floor((target + (1 - target) * left) * 120 + 1e-9)
            assert abs(mask.sum(1) - expected).max() <= 1, (step, recursion)


def test_the_causal_rule_is_not_trained_where_all_go_on() -> None:
    """A warm-up starts at capacity 1: the rule `all are active` is not one to learn."""
    model = build(small({"kind": "expert_choice", "warmup_steps": 10}), std=0.5)
    tokens = many_tokens(2, 40)
    out = model(tokens, labels=tokens)
    assert out.losses["router_bce"] == 0
    model.update_routers(out.stats, 5)
    assert model(tokens, labels=tokens).losses["router_bce"] > 0


@pytest.mark.parametrize("case", cases("expert_choice"))
def test_expert_choice_takes_its_share_of_each_sequence(case: str) -> None:
    """max(1, floor(c_r T)) tokens, T the sequence's own unpadded length; no padding is ever active."""
    model = fresh_model(case)
    config: Any = model.config
    tokens, lengths = pad(ragged_rows(case, [24, 13, 5, 1]))
    shares = config.depth.shares(config.schedule.resolved.recursions)
    for masks in model(tokens, lengths=lengths, return_trace=True).trace.active.values():
        for share, mask in zip(shares, masks, strict=True):
            expected = [max(1, math.floor(share * length)) for length in lengths.tolist()]
            assert mask.sum(1).tolist() == expected
            assert not mask[torch.arange(24) >= lengths[:, None]].any()


@pytest.mark.parametrize(
    "case", cases("expert_choice", "threshold", "token_choice", "halting", "exit_gate", "sampled", "fixed", "random")
)
def test_active_tokens_were_active_before(case: str) -> None:
    """Of nested routers, which all are but those whose tokens are all candidates again and again."""
    model = eval_model(case)
    config: Any = model.config
    groups: Any = model.stack.core.groups
    is_nested = getattr(config.depth, "hierarchical", True)
    assert all(group.router.is_nested == is_nested for group in groups)
    trace = model(random_tokens(case), return_trace=True).trace
    for masks in trace.active.values() if is_nested else ():
        for before, after in pairwise(masks):
            assert not (after & ~before).any()
    if len(trace.active) == 1 and is_nested:
        (masks,) = trace.active.values()
        assert torch.equal(trace.depth, torch.stack(list(masks)).sum(0))


@pytest.mark.parametrize("case", cases("random"))
def test_random_routing_depends_on_position_alone(case: str) -> None:
    model = eval_model(case)
    first = active_masks(model, random_tokens(case, 3, 24, seed=1))
    second = active_masks(model, random_tokens(case, 3, 24, seed=2))
    for mask, other in zip(first, second, strict=True):
        assert torch.equal(mask, other)
        assert (mask == mask[0]).all()


def test_random_depths_that_are_kept_are_those_that_are_computed() -> None:
    """Over the border of the positions whose depths are kept, and beyond it."""
    router = RandomRouter(8, 3, (1.0, 0.7, 0.2), 0.5, "full", seed=5)
    for first, last in ((0, 50), (KNOWN - 5, KNOWN - 1), (KNOWN - 5, KNOWN + 5), (10**9, 10**9 + 50)):
        positions = torch.arange(first, last + 1)
        wanted = torch.ones_like(positions)
        for r, share in ((2, 0.7), (3, 0.2 / 0.7)):
            wanted += (wanted == r - 1) & (uniform_hash(5, positions, r) < share)
        assert torch.equal(router._depths(positions), wanted)


def test_random_routing_takes_its_shares() -> None:
    tokens = torch.zeros(1, 256, dtype=torch.long)
    seen = []
    for seed in (0, 1):
        masks = active_masks(build(small({"kind": "random", "seed": seed})).eval(), tokens)
        for recursion, mask in enumerate(masks):
            assert mask.double().mean().item() == pytest.approx((3 - recursion) / 3, abs=0.12)
        seen.append(torch.stack(masks))
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("gate", ["output", "delta"])
def test_random_gate_is_half_alpha(gate: str) -> None:
    """With one recursion of which every token is a part, H + alpha/2 core(H) is linear in alpha."""

    def last_state(alpha: float) -> Tensor:
        config = small({"kind": "random", "capacities": [1.0], "alpha": alpha, "gate": gate}, recursions=1)
        model = build(config, std=0.3).eval()
        states: list[Tensor] = []
        norm: Any = model.norm
        norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        model(torch.arange(10)[None])
        return states[0].reshape(10, -1)

    plain = build(small({"kind": "fixed"}, recursions=1), std=0.3).eval()
    states: list[Tensor] = []
    plain_norm: Any = plain.norm
    plain_norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    plain(torch.arange(10)[None])
    embedded = dict(plain.named_parameters())["embedding.weight"][:10]
    core = states[0].reshape(10, -1)
    for alpha in (0.1, 0.6):
        expected = embedded + alpha / 2 * (core if gate == "output" else core - embedded)
        torch.testing.assert_close(last_state(alpha), expected, rtol=0, atol=1e-12)


CAUSAL = [
    case
    for case in cases("threshold", "token_choice", "halting", "random", "fixed")
    if case in REPEATABLE and not has_oracle(case)
]


@pytest.mark.parametrize("case", CAUSAL)
def test_routing_in_training_is_that_of_inference(case: str) -> None:
    """No oracle gap: the same logits with and without training mode."""
    tokens = random_tokens(case)
    trained = fresh_model(case)(tokens, labels=labels_for(case, tokens)).logits
    torch.testing.assert_close(trained, eval_model(case)(tokens).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", cases())
def test_statistics_count_every_token_once(case: str) -> None:
    """Padding is counted nowhere; expert loads add up to K assignments a visit."""
    tokens, lengths = pad(ragged_rows(case, [16, 9, 3]))
    model = fresh_model(case)
    config: Any = model.config
    out = model(tokens, labels=labels_for(case, tokens, lengths), lengths=lengths, return_trace=True)
    for name, fields in out.stats.items():
        if "load" in fields:
            assert fields["load"].sum().item() == config.mixer.router.top_k * fields["tokens"].item(), name
            assert fields["importance"].sum().item() == pytest.approx(fields["tokens"].item()), name
            assert 0 < fields["entropy"].item() <= fields["tokens"].item() * math.log(config.mixer.router.experts)
        elif name.endswith("mixer.depth"):
            steps = torch.cat(out.trace.expert_steps[name.replace("depth", "router")])
            assert fields["tokens"].item() == (steps >= 0).sum().item()
            assert fields["active"].tolist() == [(steps > s).sum().item() for s in range(config.mixer.steps)]
        elif "active" in fields:
            assert fields["tokens"].item() == 28
            group = list(out.trace.active.values())[int(re.findall(r"groups\.(\d+)", name)[0])]
            assert fields["active"].tolist() == [mask.sum().item() for mask in group]
    double = out.stats + out.stats
    for name, fields in out.stats.items():
        assert double[name]["tokens"].item() == 2 * fields["tokens"].item()


def test_expert_choice_without_a_causal_rule() -> None:
    """Only the oracle loss exists: a plain eval forward and decoding are refused, with a sentence."""
    model = build(load("mor-expert", "model.depth.causal=none").model).eval()
    tokens = random_tokens("mor-expert")
    assert torch.isfinite(model(tokens, depth="oracle").logits).all()
    with pytest.raises(ValueError, match="oracle"):
        model(tokens)
    with pytest.raises(ValueError, match="causal"):
        model.generate(tokens, max_new_tokens=2)
