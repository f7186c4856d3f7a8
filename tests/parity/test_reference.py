"""The model agrees with the plain reference, formula by formula, in float64."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from morex.config import ModelConfig
from morex.depth.policy import parse_depth
from morex.loading import validate
from parity.formulas import rms_norm, rotate
from parity.helpers import build, labels_of, largest_change, pad
from parity.reference import Reference, softmax

SMALL: dict[str, Any] = {
    "vocab_size": 11,
    "d_model": 8,
    "attention": {"heads": 2, "kv_heads": 1},
    "mixer": {"kind": "swiglu", "d_ff": 12},
    "schedule": {"sharing": "none", "layers": 2},
}
RECURRING = {"schedule": {"sharing": "cycle", "prelude": 1, "core": 2, "coda": 1, "recursions": 3}}
IN_SEQUENCE = {"schedule": {"sharing": "sequence", "prelude": 1, "core": 2, "coda": 1, "recursions": 3}}
ONCE = {"schedule": {"sharing": "cycle", "core": 2, "recursions": 1}}
ONE_LAYER = {"schedule": {"sharing": "none", "layers": 1}}
SHARED_FIRST = {"kv": "shared_first"}
REFRESH = {"kv": "refresh"}
WINDOW: dict[str, Any] = {"attention": {"heads": 2, "window": 3, "global_every": 3, "local_rope_base": 20.0}}


def routed(kind: str, **options: Any) -> dict[str, Any]:
    return {**RECURRING, "depth": {"kind": kind, **options}}


def experts(kind: str, top_k: int = 2, **options: Any) -> dict[str, Any]:
    if kind == "moe":
        return {"mixer": {"kind": "moe", "router": {"experts": 4, "top_k": top_k}, **options}}
    router = {"experts": 3, "top_k": top_k}
    return {"mixer": {"kind": "recursive", "steps": 2, "d_ff": 6, "router": router, **options}}


CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "gelu": {"mixer": {"kind": "gelu", "d_ff": 12}},
    "relu": {"mixer": {"kind": "relu", "d_ff": 12}},
    "geglu": {"mixer": {"kind": "geglu", "d_ff": 12}},
    "biases": {"attention": {"heads": 2, "kv_heads": 1, "bias": True, "output_bias": True}},
    "query and key norms": {"attention": {"heads": 2, "kv_heads": 1, "qk_norm": True}},
    "own head": {"tie_embeddings": False, "norm_eps": 1e-2},
    "attention options": {"attention": {"heads": 3, "head_dim": 6, "scale": 0.3, "rope_base": 100.0}},
    "learned positions": {"attention": {"heads": 2, "positions": "learned"}, "max_seq_len": 9},
    "no positions": {"attention": {"heads": 2, "head_dim": 5, "positions": "none"}},
    "rope scaling": {
        "attention": {
            "heads": 1,
            "rope_scaling": {"factor": 4.0, "original_max_seq_len": 64, "low_freq_factor": 0.5, "high_freq_factor": 5},
        }
    },
    "own head, scale and cap": {"tie_embeddings": False, "embedding_scale": True, "logit_cap": 0.7},
    "layer norm": {"norm": "layer", "norm_eps": 1e-3, "attention": {"heads": 2, "qk_norm": True}},
    "norms of 1 + w": {"norm": "rms_plus_one", "attention": {"heads": 2, "qk_norm": True}},
    "sandwich": {**RECURRING, "norm_placement": "sandwich"},
    "pre and post": {**RECURRING, "norm_placement": "pre_post", "norm": "rms_plus_one"},
    "window": {"attention": {"heads": 2, "window": 3}},
    "window of one": {"attention": {"heads": 2, "window": 1, "global_every": 2}},
    "cycle, window": {**RECURRING, **WINDOW},
    "sequence, window": {**IN_SEQUENCE, **WINDOW},
    "window, scaling": {
        **RECURRING,
        "attention": WINDOW["attention"] | {"rope_scaling": {"factor": 4.0, "original_max_seq_len": 16}},
    },
    "expert choice, window": {**routed("expert_choice"), **WINDOW},
    "token choice, sequence, window": {**routed("token_choice"), **IN_SEQUENCE, **WINDOW},
    "threshold, shared first, window": {
        **routed("threshold"),
        **SHARED_FIRST,
        "attention": {"heads": 2, "window": 2, "global_every": 3},
    },
    "cycle": RECURRING,
    "sequence": IN_SEQUENCE,
    "step embedding": {**RECURRING, "step_embedding": True},
    "residual scale": {**RECURRING, "residual_scale": "recursions"},
    "residual scale, sandwich": {**RECURRING, "residual_scale": "recursions", "norm_placement": "sandwich"},
    "residual scale, pre and post": {**IN_SEQUENCE, "residual_scale": "recursions", "norm_placement": "pre_post"},
    "norms by recursion": {**RECURRING, "recursion_norms": True, "norm": "layer"},
    "norms by recursion, sandwich": {**RECURRING, "recursion_norms": True, "norm_placement": "sandwich"},
    "norms by recursion, sequence": {**IN_SEQUENCE, "recursion_norms": True, "norm_placement": "pre_post"},
    "lora": {**RECURRING, "lora": {"rank": 2, "alpha": 3.0}},
    "lora, gelu": {**RECURRING, "lora": {"rank": 2}, "mixer": {"kind": "gelu", "d_ff": 12}},
    "lora, geglu, shared first": {
        **RECURRING,
        **SHARED_FIRST,
        "lora": {"rank": 2, "alpha": 1.0},
        "mixer": {"kind": "geglu", "d_ff": 12},
    },
    "lora, sequence": {**IN_SEQUENCE, "lora": {"rank": 3}, "attention": {"heads": 2, "qk_norm": True, "bias": True}},
    "expert choice, lora": {**routed("expert_choice"), "lora": {"rank": 2}, "recursion_norms": True},
    "token choice, lora, sequence": {**routed("token_choice"), **IN_SEQUENCE, "lora": {"rank": 2}},
    "halting, lora, scale": {
        **routed("halting"),
        **SHARED_FIRST,
        "lora": {"rank": 2},
        "residual_scale": "recursions",
    },
    "input added": {**RECURRING, "input_injection": "add"},
    "input beside the state": {**RECURRING, "input_injection": "concat"},
    "input beside the state, sequence": {**IN_SEQUENCE, "input_injection": "concat", "step_embedding": True},
    "expert choice, input added": {**routed("expert_choice"), "input_injection": "add"},
    "expert choice, input beside the state": {**routed("expert_choice", gate="delta"), "input_injection": "concat"},
    "token choice, input beside the state": {**routed("token_choice"), **IN_SEQUENCE, "input_injection": "concat"},
    "threshold, input beside the state": {**routed("threshold"), **SHARED_FIRST, "input_injection": "concat"},
    "halting, input beside the state": {**routed("halting"), **SHARED_FIRST, "input_injection": "concat"},
    "fixed, shared first": {**RECURRING, **SHARED_FIRST},
    "expert choice": routed("expert_choice"),
    "expert choice, delta": routed("expert_choice", gate="delta", alpha=0.7),
    "expert choice, tanh": routed("expert_choice", score="tanh", alpha=0.5),
    "expert choice, unweighted": routed("expert_choice", score="unweighted"),
    "expert choice, all candidates": routed("expert_choice", hierarchical=False, capacities=[0.5, 1.0, 0.25]),
    "expert choice, capacities": routed("expert_choice", capacities=[0.9, 0.5, 0.1]),
    "expert choice, mlp": routed("expert_choice", router="mlp"),
    "expert choice, aux router": routed("expert_choice", causal="aux_router"),
    "expert choice, sequence": {**routed("expert_choice"), **IN_SEQUENCE},
    "expert choice, shared first": {**routed("expert_choice"), **SHARED_FIRST},
    "expert choice, step embedding": {**routed("expert_choice"), "step_embedding": True},
    "expert choice, once": {**routed("expert_choice"), **ONCE},
    "expert choice, once, half": {**routed("expert_choice", capacities=[0.5]), **ONCE},
    "token choice": routed("token_choice"),
    "token choice, sigmoid": routed("token_choice", score="sigmoid"),
    "token choice, alpha": routed("token_choice", alpha=0.5),
    "token choice, each": routed("token_choice", gate="each"),
    "token choice, temperature": routed("token_choice", temperature=2.5),
    "token choice, mlp": routed("token_choice", router="mlp"),
    "token choice, loss free": routed("token_choice", balance="loss_free"),
    "token choice, sequence": {**routed("token_choice"), **IN_SEQUENCE},
    "token choice, shared first": {**routed("token_choice"), **SHARED_FIRST},
    "token choice, step embedding": {**routed("token_choice"), "step_embedding": True},
    "threshold": routed("threshold"),
    "threshold, capacities": routed("threshold", capacities=[0.8, 0.8, 0.3]),
    "threshold, delta": routed("threshold", gate="delta", score="tanh"),
    "threshold, shared first": {**routed("threshold"), **SHARED_FIRST},
    "threshold, once": {**routed("threshold", capacities=[0.6]), **ONCE},
    "halting": {**routed("halting"), **SHARED_FIRST},
    "halting, epsilon": {**routed("halting", epsilon=0.3, initial_bias=-1.5), **SHARED_FIRST},
    "halting, sequence": {**routed("halting"), **IN_SEQUENCE, **SHARED_FIRST},
    "halting, step embedding": {**routed("halting"), **SHARED_FIRST, "step_embedding": True},
    "halting of recursive experts": {**routed("halting"), **SHARED_FIRST, **experts("recursive")},
    "fixed, refresh": {**RECURRING, **REFRESH},
    "expert choice, refresh": {**routed("expert_choice"), **REFRESH},
    "expert choice, refresh, all candidates": {
        **routed("expert_choice", hierarchical=False, capacities=[0.5, 0.25, 0.75]),
        **REFRESH,
    },
    "expert choice, refresh, window": {
        **routed("expert_choice"),
        **REFRESH,
        "attention": {"heads": 2, "window": 3, "global_every": 3},
    },
    "token choice, refresh, each": {**routed("token_choice", gate="each"), **REFRESH},
    "token choice, refresh, sequence": {**routed("token_choice"), **IN_SEQUENCE, **REFRESH},
    "threshold, refresh, capacities": {**routed("threshold", capacities=[0.8, 0.8, 0.3]), **REFRESH},
    "halting, refresh": {**routed("halting"), **REFRESH},
    "halting, refresh, sequence": {**routed("halting", epsilon=0.3), **IN_SEQUENCE, **REFRESH},
    "expert choice, refresh, of recursive experts": {**routed("expert_choice"), **experts("recursive"), **REFRESH},
    "moe, one": experts("moe", 1, expert={"kind": "relu", "d_ff": 10}),
    "moe, two": experts("moe", 2, expert={"kind": "swiglu", "d_ff": 10}),
    "moe, geglu": experts("moe", 2, expert={"kind": "geglu", "d_ff": 10}),
    "moe, gelu": experts("moe", 2, expert={"kind": "gelu", "d_ff": 10}),
    "recursive, routed, change": experts("recursive"),
    "recursive, routed, output": experts("recursive", branch="output"),
    "recursive, token, change": experts("recursive", attention_scope="token"),
    "recursive, token, output": experts("recursive", attention_scope="token", branch="output", keep_unused_qk=True),
    "recursive, one": experts("recursive", 1),
    "recursive, all": experts("recursive", 3),
    "recursive, more heads": {**experts("recursive"), "attention": {"heads": 4, "kv_heads": 2, "head_dim": 4}},
    "recursive, no positions": {**experts("recursive"), "attention": {"heads": 2, "positions": "none"}},
    "recursive, sandwich": {**experts("recursive"), "norm_placement": "sandwich"},
    "expert choice of recursive experts": {**routed("expert_choice"), **experts("recursive")},
    "token choice of moe": {**routed("token_choice"), **experts("moe", expert={"kind": "swiglu", "d_ff": 10})},
    "threshold of recursive experts": {**routed("threshold"), **experts("recursive")},
}
LENGTHS = [9, 6, 1]


def config_of(*changes: Mapping[str, Any]) -> ModelConfig:
    tree = SMALL
    for change in changes:
        tree = {**tree, **change}
    return validate(ModelConfig, tree)


def model_of(config: ModelConfig, seed: int = 5, std: float = 0.5) -> Any:
    """A perturbed model; thresholds and loss-free biases get values that matter."""
    model = build(config, seed=seed, std=std)
    for name, buffer in model.named_buffers():
        if name.endswith(".threshold"):
            finite = torch.isfinite(buffer)
            buffer[finite] = torch.linspace(-0.3, 0.4, len(buffer), dtype=buffer.dtype)[finite]
        if name.endswith(".bias"):
            buffer.copy_(torch.linspace(-0.2, 0.2, len(buffer), dtype=buffer.dtype))
    return model


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(SMALL["vocab_size"], (length,), generator=generator) for length in LENGTHS]


def reference_of(model: Any, training: bool) -> Reference:
    config: Any = model.config
    return Reference(config.model_dump(), model.state_dict(), training)


def agree(model: Any, reference: Reference, rows: Sequence[torch.Tensor]) -> None:
    tokens, lengths = pad(rows)
    logits = model(tokens, lengths=lengths).logits
    for row, own in zip(rows, logits, strict=True):
        expected = reference.logits(row.tolist())
        assert expected.std() > 0.1, "logits that are all alike would agree whatever the formula"
        assert largest_change(own[: len(row)], expected) <= 1e-9


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_model_agrees_with_the_reference(name: str, mode: str) -> None:
    model = model_of(config_of(CASES[name])).train(mode == "train")
    agree(model, reference_of(model, mode == "train"), sequences())


@pytest.mark.parametrize("name", [name for name in CASES if re.search("choice|threshold|halting", name)])
def test_reference_routing_is_not_trivial(name: str) -> None:
    """The agreement above says little where all tokens go one way; here they do not."""
    model = model_of(config_of(CASES[name]))
    reference = reference_of(model, training=True)
    for row in sequences():
        reference.logits(row.tolist())
    decisions = [active for seen in reference.record.candidates.values() for _, active in seen]
    depths = [taken for seen in reference.record.depths.values() for taken, _, _ in seen]
    depths += [taken for seen in reference.record.halted.values() for taken, _ in seen]
    if name != "expert choice, once":
        assert len(set(decisions)) == 2 or len(set(depths)) >= 2


def test_bias_changes_the_choice_of_experts_only() -> None:
    router = {"experts": 4, "top_k": 2, "bias_rate": 0.01}
    config = config_of(
        experts("moe"), {"mixer": {"kind": "moe", "expert": {"kind": "relu", "d_ff": 10}, "router": router}}
    )
    model = model_of(config).eval()
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("mixer.router.bias")]
    assert len(biases) == 2
    plain = model(sequences()[0][None]).logits
    for bias in biases:
        bias.copy_(torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    agree(model, reference_of(model, False), sequences())
    assert largest_change(model(sequences()[0][None]).logits, plain) > 1e-6


@pytest.mark.parametrize("mixer", ["moe", "recursive"])
def test_expert_losses(mixer: str) -> None:
    change = experts(mixer)
    change["mixer"]["router"] |= {"balance_weight": 0.3, "z_weight": 0.2}
    model = model_of(config_of(change, ONE_LAYER)).train()
    reference, rows = reference_of(model, True), sequences()
    tokens, lengths = pad(rows)
    for row in rows:
        reference.logits(row.tolist())
    out = model(tokens, labels=labels_of(tokens, lengths), lengths=lengths)
    assert out.losses["expert_balance"].item() == pytest.approx(reference.expert_balance(0), abs=1e-9)
    assert out.losses["expert_z"].item() == pytest.approx(reference.expert_z(0), abs=1e-9)
    total = out.losses["lm"] + 0.3 * out.losses["expert_balance"] + 0.2 * out.losses["expert_z"]
    assert out.loss.item() == pytest.approx(total.item(), abs=1e-9)


def test_expert_balance_is_one_at_balance() -> None:
    model = build(config_of(experts("moe", 2), ONE_LAYER), std=0.0)
    (router,) = (weight for name, weight in model.named_parameters() if name.endswith("mixer.router.weight"))
    with torch.no_grad():
        router.zero_()
    tokens = sequences()[0][None]
    assert model(tokens, labels=tokens).losses["expert_balance"].item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("causal", ["aux_loss", "aux_router"])
def test_expert_choice_losses(causal: str) -> None:
    """One routed recursion, so that each loss has one term."""
    depth = {"kind": "expert_choice", "capacities": [0.5], "z_weight": 0.2, "causal_weight": 0.3, "causal": causal}
    model = model_of(config_of(ONCE, {"depth": depth})).train()
    reference, rows = reference_of(model, True), sequences()
    for row in rows:
        reference.logits(row.tolist())
    tokens, lengths = pad(rows)
    out = model(tokens, labels=labels_of(tokens, lengths), lengths=lengths)
    assert out.losses["router_z"].item() == pytest.approx(reference.squared_logits()[0, 1], abs=1e-9)
    if causal == "aux_loss":
        assert out.losses["router_bce"].item() == pytest.approx(reference.binary_cross_entropy()[0, 1], abs=1e-9)
    weights = {"router_bce": 0.3, "router_z": 0.2}
    total = out.losses["lm"] + sum(weights[name] * out.losses[name] for name in weights)
    assert out.loss.item() == pytest.approx(total.item(), abs=1e-9)


def test_no_cross_entropy_where_all_go_on() -> None:
    """Recursion 1 takes every token, so only recursion 2 has a term."""
    schedule = {"schedule": {"sharing": "cycle", "core": 2, "recursions": 2}}
    model = model_of(config_of(schedule, {"depth": {"kind": "expert_choice"}})).train()
    reference, rows = reference_of(model, True), sequences()[:1]
    reference.logits(rows[0].tolist())
    out = model(rows[0][None], labels=rows[0][None])
    assert out.losses["router_bce"].item() == pytest.approx(reference.binary_cross_entropy()[0, 2], abs=1e-9)


def test_losses_are_means_over_recursions() -> None:
    """Of the recursions that decide; each is a mean over its own candidates."""
    depth = {"kind": "expert_choice", "z_weight": 0.1, "capacities": [0.75, 0.5, 0.25]}
    model = model_of(config_of(RECURRING, {"depth": depth})).train()
    reference, rows = reference_of(model, True), sequences()
    for row in rows:
        reference.logits(row.tolist())
    tokens, lengths = pad(rows)
    out = model(tokens, labels=labels_of(tokens, lengths), lengths=lengths)
    for name, terms in (("router_bce", reference.binary_cross_entropy()), ("router_z", reference.squared_logits())):
        assert len(terms) == 3
        assert out.losses[name].item() == pytest.approx(sum(terms.values()) / 3, abs=1e-9)


def test_losses_are_means_over_layers() -> None:
    model = model_of(config_of(experts("moe"))).train()
    reference, tokens = reference_of(model, True), sequences()[0]
    reference.logits(tokens.tolist())
    expected = (reference.expert_balance(0) + reference.expert_balance(1)) / 2
    out = model(tokens[None], labels=tokens[None])
    assert out.losses["expert_balance"].item() == pytest.approx(expected, abs=1e-9)


def test_predictor_leaves_the_model_alone() -> None:
    """Its gradient stops at its input: only the predictor itself learns from its loss."""
    model = model_of(config_of(routed("expert_choice", causal="aux_router"))).train()
    tokens = sequences()[0][None]
    model(tokens, labels=tokens).losses["router_bce"].backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved
    assert all(".predictor." in name for name in moved), moved


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_token_choice_losses(score: str) -> None:
    depth = {"kind": "token_choice", "score": score, "balance_weight": 0.3, "z_weight": 0.2}
    model = model_of(config_of(RECURRING, {"depth": depth})).train()
    reference, rows = reference_of(model, True), sequences()
    for row in rows:
        reference.logits(row.tolist())
    tokens, lengths = pad(rows)
    out = model(tokens, labels=labels_of(tokens, lengths), lengths=lengths)
    assert out.losses["depth_balance"].item() == pytest.approx(reference.depth_balance(0), abs=1e-9)
    assert out.losses["router_z"].item() == pytest.approx(reference.depth_z(0), abs=1e-9)
    total = out.losses["lm"] + 0.3 * out.losses["depth_balance"] + 0.2 * out.losses["router_z"]
    assert out.loss.item() == pytest.approx(total.item(), abs=1e-9)


@pytest.mark.parametrize("name", ["halting", "halting, epsilon", "halting, sequence"])
def test_halting_stops_and_ponders_as_the_reference(name: str) -> None:
    """N of every token, the sum of the remainders, and the ponder cost, in a ragged batch."""
    model = model_of(config_of(CASES[name], {"depth": CASES[name]["depth"] | {"ponder_weight": 0.3}})).train()
    reference, rows = reference_of(model, True), sequences()
    for row in rows:
        reference.logits(row.tolist())
    tokens, lengths = pad(rows)
    out = model(tokens, labels=labels_of(tokens, lengths), lengths=lengths, return_trace=True)
    groups = reference.record.halted
    for index, seen in groups.items():
        masks = torch.stack(out.trace.active[f"stack.core.groups.{index}"])
        taken = masks.sum(0)[torch.arange(tokens.shape[1]) < lengths[:, None]]
        assert sorted(taken.tolist()) == sorted(count for count, _ in seen)
        remainder = out.stats[f"stack.core.groups.{index}.router"]["remainder"].item()
        assert remainder == pytest.approx(sum(left for _, left in seen), abs=1e-9)
    expected = sum(reference.ponder(index) for index in groups) / len(groups)
    assert out.losses["ponder"].item() == pytest.approx(expected, abs=1e-9)
    assert out.loss.item() == pytest.approx((out.losses["lm"] + 0.3 * out.losses["ponder"]).item(), abs=1e-9)


@pytest.mark.parametrize("depth", ["uniform:2", "uniform:3", "adaptive:6", "progressive:8"])
@pytest.mark.parametrize("bias", [-1.0, 1.0])
def test_halting_at_depths_that_the_caller_fixes(bias: float, depth: str) -> None:
    """Units that would stop later, and earlier: the weights are theirs, the number of recursions is not."""
    model = model_of(config_of(CASES["halting"])).eval()
    with torch.no_grad():
        model.stack.core.groups[0].router.bias.fill_(bias)
    policy = parse_depth(depth, 3, 6, any_depth=False)
    reference = reference_of(model, False)
    reference.forced = policy.depths(torch.arange(max(LENGTHS)), torch.zeros(max(LENGTHS), dtype=torch.int64)).tolist()
    for row in sequences():
        assert largest_change(model(row[None], depth=depth).logits[0], reference.logits(row.tolist())) <= 1e-9


def reference_loss(model: Any, weight: float) -> float:
    """Language-model loss plus weighted ponder cost by the plain reference; all N of the model must stand."""
    reference, rows = reference_of(model, True), sequences()
    losses = []
    for row in rows:
        logits = reference.logits(row.tolist())
        losses += [-math.log(softmax(logits[t].tolist())[row[t + 1]]) for t in range(len(row) - 1)]
    return sum(losses) / len(losses) + weight * reference.ponder(0)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_gradients_of_the_halting_unit_are_the_slopes_of_the_reference(weight: float) -> None:
    """Every weight and the bias, by central differences through the reference; no token is near to halting or not."""
    model = model_of(config_of(CASES["halting"], routed("halting", ponder_weight=weight))).train()
    tokens, lengths = pad(sequences())
    model(tokens, labels=labels_of(tokens, lengths), lengths=lengths).loss.backward()
    unit = [(name, p) for name, p in model.named_parameters() if ".groups.0.router." in name]
    assert {name.rpartition("router.")[2] for name, _ in unit} == {"score.weight", "bias"}
    for name, parameter in unit:
        for place, gradient in enumerate(parameter.grad.flatten().tolist()):
            slopes = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter.view(-1)[place] += step
                    slopes.append(reference_loss(model, weight))
                    parameter.view(-1)[place] -= step
            assert gradient == pytest.approx((slopes[0] - slopes[1]) / 2e-6, rel=1e-5, abs=1e-8), (name, place)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_depth_balance_is_one_for_equal_scores(score: str) -> None:
    """Equal scores of any size are balanced: the loss cannot fall by lowering them all."""
    depth = {"kind": "token_choice", "score": score}
    model = build(config_of(RECURRING, {"depth": depth}), std=0.0)
    (scorer,) = (weight for name, weight in model.named_parameters() if ".router.score." in name)
    with torch.no_grad():
        scorer.zero_()
    tokens = sequences()[0][None]
    assert model(tokens, labels=tokens).losses["depth_balance"].item() == pytest.approx(1.0, abs=1e-9)


def test_norm_and_rotation_by_hand() -> None:
    """The reference itself, on values worked out by hand."""
    normed = rms_norm(torch.tensor([3.0, 4.0]).double(), torch.tensor([1.0, 2.0]).double(), 0.0)
    assert normed.tolist() == pytest.approx([3 / 12.5**0.5, 8 / 12.5**0.5])
    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 0.0]).double(), 3, 10_000.0)
    assert turned.tolist() == pytest.approx([-0.9899924966, 0.0, 0.1411200081, 0.0])
