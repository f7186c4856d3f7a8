"""A depth router inside recursive experts: an expert's steps are the recursions of a core with one block.

The core, its routers and their formulas have references of their own. Here each expert is held against such a core
with the expert's weights, which sees that expert's tokens and nothing else.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import morex
from morex.config import ModelConfig
from morex.depth.policy import DepthPolicy
from morex.loading import ConfigError, validate
from morex.nn.packing import pack_batch
from parity.helpers import build, largest_change, load, plain_path

STEPS, EXPERTS, WIDTH = 3, 3, 24
ROUTERS: dict[str, dict[str, Any]] = {
    "expert_choice": {"kind": "expert_choice", "alpha": 0.7},
    "expert_choice+delta": {"kind": "expert_choice", "gate": "delta", "hierarchical": False, "score": "tanh"},
    "token_choice": {"kind": "token_choice"},
    "token_choice+each": {"kind": "token_choice", "gate": "each", "score": "sigmoid", "alpha": 0.8},
    "threshold": {"kind": "threshold", "alpha": 0.9, "router": "mlp"},
    "halting": {"kind": "halting", "epsilon": 0.3, "initial_bias": 0.0},
    "random": {"kind": "random", "alpha": 0.5},
}
COUNTED = {name: options for name, options in ROUTERS.items() if name != "expert_choice+delta"}


def config_of(depth: dict[str, Any], experts: int = EXPERTS, scope: str = "routed", **mixer: Any) -> ModelConfig:
    recursive = {
        "kind": "recursive",
        "depth": depth,
        "steps": STEPS,
        "d_ff": 40,
        "attention_scope": scope,
        "router": {"experts": experts, "top_k": min(2, experts)},
    }
    changes = {"d_model": WIDTH, "attention": {"heads": 4, "kv_heads": 2}, "mixer": recursive | mixer}
    return validate(ModelConfig, load("vanilla").model.model_dump() | changes)


def core_of(layer: Any, config: ModelConfig, e: int) -> Any:
    """A model whose core, S times one block, is expert e of the layer."""
    mixer: Any = config.mixer
    changes = {
        "mixer": {"kind": "swiglu", "d_ff": mixer.d_ff},
        "depth": mixer.depth.model_dump(),
        "schedule": {"core": 1, "recursions": STEPS, "sharing": "cycle"},
        "step_embedding": True,
        # Which tokens later steps see is for the cache rule; only this one leaves halting tokens unseen.
        "kv": "shared_first" if mixer.depth.kind == "halting" else "per_recursion",
    }
    model = morex.build_model(validate(ModelConfig, config.model_dump() | changes), dtype=torch.float64)
    model.stack.rule = "per_recursion"
    block, group = model.stack.core.blocks[0], model.stack.core.groups[0]
    own = {
        "norm1.weight": "norm_attention",
        "norm2.weight": "norm_mixer",
        **{f"attention.{name}.weight": name for name in "qkvo"},
        **{f"mixer.{name}.weight": name for name in ("gate", "up", "down")},
    }
    with torch.no_grad():
        block.load_state_dict({name: getattr(layer, stack)[e] for name, stack in own.items()})
        group.step_embedding.copy_(layer.step_embedding[e])
        group.router.load_state_dict(layer.depth.state_dict())
    return model.train(layer.training)


def rows() -> tuple[Tensor, Any]:
    """Inputs [N, D] of three sequences of different lengths, and their packing."""
    lengths = torch.tensor([14, 5, 9])
    x = torch.randn(28, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return x, pack_batch((3, 14), x.device, lengths).root()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ROUTERS)
def test_steps_of_an_expert_are_recursions_of_a_core(name: str, training: bool) -> None:
    config = config_of(ROUTERS[name])
    layer = build(config, std=0.5).stack.core.blocks[0].mixer.train(training)
    x, packing = rows()
    with torch.no_grad():
        y, reports = layer(x, packing)
        chosen, weights, _ = layer.router(x)
        expected, active, losses = torch.zeros_like(x), torch.zeros(STEPS, dtype=torch.long), []
        for e in range(EXPERTS):
            token, k = (chosen == e).nonzero(as_tuple=True)
            model = core_of(layer, config, e)
            out, record = model.stack(x[token], packing.select(token).root(), DepthPolicy("router", STEPS), None, False)
            expected = expected.index_add(0, token, weights[token, k].unsqueeze(1) * (out - x[token]))
            active += record.stats["stack.core.groups.0.router"]["active"]
            losses.append(record.losses)
    assert largest_change(y, expected) <= 1e-9
    assert reports["depth"].stats["active"].tolist() == active.tolist()
    assert reports["depth"].stats["tokens"].item() == 2 * 28
    assert active[1:].min() > 0 and active[1:].max() < 2 * 28, "the routing of this test is trivial"
    taken = torch.stack([choice.steps for choice in reports["router"].choices])[0]
    if name != "expert_choice+delta":  # there a token may leave out a step and take the next
        assert [(taken >= s).sum().item() for s in range(1, STEPS + 1)] == active.tolist()
    if training and name in ("halting", "threshold"):
        assert set(reports["depth"].losses) == set(losses[0])


def test_fixed_steps_are_those_without_a_router() -> None:
    """A router that lets every token take every step, ungated, changes nothing."""
    plain = build(config_of({"kind": "fixed"}), std=0.5).stack.core.blocks[0].mixer.eval()
    unweighted = {"kind": "expert_choice", "capacities": [1.0] * STEPS, "score": "unweighted", "gate": "delta"}
    routed = build(config_of(unweighted), std=0.5).stack.core.blocks[0].mixer.eval()
    routed.load_state_dict(plain.state_dict(), strict=False)
    x, packing = rows()
    for off in (plain_path, torch.no_grad):
        with off(), torch.no_grad():
            assert largest_change(plain(x, packing)[0], routed(x, packing)[0]) <= 1e-9


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize(("scope", "experts"), [("routed", 1), ("token", 1)])
def test_flops_at_measured_steps_agree_with_torch_counter(name: str, scope: str, experts: int) -> None:
    """One sequence and one expert, so that nothing is padding and no two rows of attention differ in length."""
    config = config_of(COUNTED[name], experts, scope)
    model = build(config, std=0.5).eval()
    tokens = torch.randint(config.vocab_size, (1, 96), generator=torch.Generator().manual_seed(1))
    counter = FlopCounterMode(display=False)
    with plain_path(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        layers = model(tokens).stats
        one = {path: fields for path, fields in layers.items() if path.endswith("mixer.depth")}
        with counter:
            model(tokens)
    expected = 0.0
    for fields in one.values():
        shares = tuple((fields["active"].double() / fields["tokens"]).tolist())
        alone = morex.count(config, seq_len=96, step_shares=shares).forward_flops_per_token
        expected += alone / len(one)
    folding = 0 if scope == "routed" else 2 * WIDTH**3 * len(one) / 96
    assert counter.get_total_flops() / 96 == pytest.approx(expected + folding, rel=1e-9)


@pytest.mark.parametrize("name", COUNTED)
def test_fewer_steps_cost_fewer_flops(name: str) -> None:
    routed, fixed = config_of(COUNTED[name]), config_of({"kind": "fixed"})
    few = morex.count(routed, seq_len=64, step_shares=(1.0, 0.5, 0.25))
    every = morex.count(fixed, seq_len=64)
    assert few.train_flops_per_token < 0.9 * every.train_flops_per_token
    assert few.kv_bytes_per_token < every.kv_bytes_per_token


def test_losses_of_steps_stand_apart_from_those_of_recursions() -> None:
    """The same kind of router at both places, with weights of its own at each."""
    depth = {"kind": "token_choice", "balance_weight": 0.3}
    steps = {"kind": "token_choice", "balance_weight": 0.7}
    changes = {"depth": depth, "schedule": {"core": 1, "recursions": 3, "sharing": "cycle"}}
    model = build(validate(ModelConfig, config_of(steps).model_dump() | changes))
    tokens = torch.arange(24).view(2, 12)
    out = model(tokens, labels=tokens)
    assert out.loss_weights["depth_balance"] == 0.3 and out.loss_weights["step_depth_balance"] == 0.7
    weighted = torch.stack([weight * out.losses[name] for name, weight in out.loss_weights.items()]).sum()
    assert (out.loss - out.losses["lm"]).item() == pytest.approx(weighted.item())
    assert out.losses["depth_balance"].item() != pytest.approx(out.losses["step_depth_balance"].item())


def test_threshold_of_steps_is_tracked() -> None:
    model = build(config_of({"kind": "threshold", "momentum": 0.5}))
    router = model.stack.core.blocks[0].mixer.depth
    before = router.threshold.clone()
    tokens = torch.arange(24).view(2, 12)
    out = model(tokens, labels=tokens)
    assert torch.equal(router.threshold, before)
    model.update_routers(out.stats, 1)
    assert (router.threshold[1:] != before[1:]).all()


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ({"depth": {"kind": "halting"}, "steps": 1}, "mixer.depth.kind 'halting' needs depths .* mixer.steps is 1"),
        ({"depth": {"kind": "threshold", "capacities": [1, 0.5]}}, "mixer.depth.capacities has 2 .* mixer.steps 3"),
        ({"depth": {"kind": "random", "capacities": [0.5, 1, 1]}}, "mixer.depth.capacities .* must not grow"),
        ({"depth": {"kind": "expert_choice", "causal": "none"}}, "mixer.depth.causal 'none'"),
    ],
)
def test_steps_that_cannot_be_decided_are_refused(mixer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**({"depth": {"kind": "fixed"}} | mixer))
