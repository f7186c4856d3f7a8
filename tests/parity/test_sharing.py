"""Invariant 4: shared blocks are one tensor, and a schedule computes what its untied copy computes."""

from typing import Any

import pytest
import torch

import morex
from morex.config import ModelConfig
from morex.depth.schedule import Schedule
from morex.loading import validate
from morex.sections.mixers import (
    FeedForwardConfig,
    HuginnExpertsConfig,
    LayerRecurrentConfig,
    MoEConfig,
    SharedRecurrentConfig,
)
from parity.helpers import (
    CASES,
    build,
    cases,
    config_of,
    eval_model,
    labels_for,
    largest_change,
    load,
    random_tokens,
)
from parity.reference import plain_names


def changed(config: ModelConfig, **changes: Any) -> ModelConfig:
    return validate(ModelConfig, config.model_dump() | changes)


def untied(config: ModelConfig) -> ModelConfig:
    """The dense model of the same unrolled depth."""
    schedule = {"sharing": "none", "layers": config.schedule.resolved.unrolled_depth}
    return changed(config, schedule=schedule, depth={"kind": "fixed"}, kv="per_recursion", step_embedding=False)


def visited_blocks(config: ModelConfig) -> list[int]:
    """Block of each layer of the unrolled model, worked out by hand: prelude, core in its order, coda."""
    schedule = config.schedule.resolved
    core = range(schedule.prelude, schedule.prelude + schedule.core)
    if schedule.order == "cycle":
        middle = [block for _ in range(schedule.recursions) for block in core]
    else:
        middle = [block for block in core for _ in range(schedule.recursions)]
    last = range(schedule.prelude + schedule.core, schedule.num_blocks)
    return [*range(schedule.prelude), *middle, *last]


def copy_weights(source: Any, target: Any, blocks: list[int]) -> None:
    """Layer i of `target` gets the weights of block `blocks[i]` of `source`."""
    weights = source.state_dict()
    given = {plain: weights[name] for name, plain in plain_names(weights).items()}
    copied = {}
    for name, plain in plain_names(target.state_dict()).items():
        if plain.startswith("stack.blocks."):
            _, _, layer, rest = plain.split(".", 3)
            plain = f"stack.blocks.{blocks[int(layer)]}.{rest}"
        copied[name] = given[plain]
    target.load_state_dict(copied, strict=True)


def closed_form(config: ModelConfig) -> int:
    """Parameters, counted from the shapes that the documentation states."""
    d, schedule = config.d_model, config.schedule.resolved
    head_dim = config.attention.head_dim or d // config.attention.heads
    kv_heads = config.attention.kv_heads or config.attention.heads
    q, kv = d * config.attention.heads * head_dim, d * kv_heads * head_dim
    mixer = config.mixer

    def feed_forward(section: FeedForwardConfig) -> int:
        return (3 if section.kind in ("swiglu", "geglu") else 2) * d * section.hidden(d)

    if isinstance(mixer, FeedForwardConfig):
        channel = feed_forward(mixer)
    elif isinstance(mixer, MoEConfig | LayerRecurrentConfig):
        channel = mixer.router.experts * (d + feed_forward(mixer.expert))
    elif isinstance(mixer, HuginnExpertsConfig):
        qk = q + kv if mixer.attention_scope == "routed" else 0
        one = 2 * d * d + qk + q + kv + 3 * d * (mixer.d_ff or 2 * d) + 4 * d
        channel = mixer.router.experts * (d + one)
    elif isinstance(mixer, SharedRecurrentConfig):
        light = 2 * d * (mixer.expert.d_ff or 2 * d)
        channel = (
            mixer.router.experts * (d + light) + 2 * d * d + 2 * q + 2 * kv + 3 * d * (mixer.d_ff or 4 * d) + 4 * d
        )
    else:
        attention = 2 * kv + 2 * q
        if mixer.attention_scope == "token" and not mixer.keep_unused_qk:
            attention -= q + kv
        norms = 3 if mixer.branch == "output" else 2
        channel = mixer.router.experts * (d + attention + 3 * d * mixer.d_ff + norms * d + mixer.steps * d)
    heads = (config.attention.heads + 2 * kv_heads) * head_dim * config.attention.bias
    of_norm = 2 if config.norm == "layer" else 1
    heads += d * config.attention.output_bias + 2 * of_norm * head_dim * config.attention.qk_norm
    norms = (2 if config.norm_placement == "pre" else 4) * of_norm * d
    blocks = schedule.num_blocks * (2 * q + 2 * kv + heads + channel + norms)
    embeddings = config.vocab_size * d
    if config.head.kind == "classifier":
        embeddings += config.head.classes * (d + 1)
    elif not config.tie_embeddings:
        embeddings += config.vocab_size * d
    groups = 1 if schedule.order == "cycle" else schedule.core
    depth: Any = config.depth
    scorer = 0
    if depth.kind in ("expert_choice", "token_choice", "threshold"):
        scored = schedule.recursions
        if depth.score == "unweighted":  # scores only serve to leave tokens out
            scored = sum(share < 1 for share in depth.shares(schedule.recursions))
        scorer = scored * d if depth.router == "linear" else 2 * d * d + 2 * d * scored
    if depth.kind == "halting":  # one unit with a bias, for all recursions
        scorer = d + 1
    per_group = scorer + (schedule.recursions * d if config.step_embedding else 0)
    if config.attention.positions == "learned":
        embeddings += config.max_seq_len * d
    return embeddings + blocks + of_norm * d + groups * per_group


@pytest.mark.parametrize("case", CASES)
def test_sharing_is_real(case: str) -> None:
    """One name, one tensor: no storage has two names, and only the stored blocks have weights."""
    model = morex.build_model(config_of(case))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    storages = [parameter.data_ptr() for parameter in parameters.values()]
    assert len(set(storages)) == len(storages)
    state = model.state_dict()
    assert set(parameters) <= set(state)
    names = plain_names(state).values()
    blocks = {int(name.split(".")[2]) for name in names if name.startswith("stack.blocks.")}
    assert blocks == set(range(config_of(case).schedule.resolved.num_blocks))
    tied = config_of(case).tie_embeddings and config_of(case).head.kind == "lm"
    assert ("head.weight" in state) != tied


@pytest.mark.parametrize("case", CASES)
def test_parameters_equal_the_closed_form(case: str) -> None:
    model, config = morex.build_model(config_of(case)), config_of(case)
    count = sum(p.numel() for name, p in model.named_parameters() if ".predictor." not in name)
    depth: Any = config.depth
    if depth.kind in ("expert_choice", "token_choice", "threshold") and depth.router == "mlp":
        routers = sum(p.numel() for name, p in model.named_parameters() if ".router.score." in name)
        assert routers > config.schedule.recursions * config.d_model
        linear = changed(config, depth=depth.model_dump() | {"router": "linear"})
        groups = len(config.schedule.resolved.groups)
        assert count == closed_form(linear) - groups * config.schedule.recursions * config.d_model + routers
    else:
        assert count == closed_form(config)


@pytest.mark.parametrize("case", [case for case in CASES if not config_of(case).step_embedding])
def test_schedule_equals_its_untied_copy(case: str) -> None:
    """With every token in every recursion, sharing is only a matter of storage: equal to the bit."""
    config = changed(config_of(case), depth={"kind": "fixed"}, kv="per_recursion")
    shared = build(config).eval()
    plain: Any = morex.build_model(untied(config), dtype=torch.float64).eval()
    copy_weights(shared, plain, visited_blocks(config))
    tokens = random_tokens(case)
    assert torch.equal(shared(tokens).logits, plain(tokens).logits)
    assert sum(p.numel() for p in shared.parameters()) <= sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("case", [case for case in cases("fixed") if config_of(case).schedule.recursions > 1])
def test_shared_gradient_is_the_sum_over_its_uses(case: str) -> None:
    config = changed(config_of(case), step_embedding=False, kv="per_recursion")
    shared: Any = build(config)
    plain: Any = morex.build_model(untied(config), dtype=torch.float64)
    blocks = visited_blocks(config)
    copy_weights(shared, plain, blocks)
    tokens = random_tokens(case)
    for model in (shared, plain):
        model(tokens, labels=labels_for(case, tokens)).loss.backward()
    parameters = dict(plain.named_parameters())
    names = plain_names(parameters)
    unshared = {names[name]: parameter for name, parameter in parameters.items()}
    names = plain_names(dict(shared.named_parameters()))
    for own_name, parameter in shared.named_parameters():
        name = names[own_name]
        if name.startswith("stack.blocks."):
            _, _, block, rest = name.split(".", 3)
            uses = [unshared[f"stack.blocks.{i}.{rest}"].grad for i, b in enumerate(blocks) if b == int(block)]
            assert largest_change(parameter.grad, torch.stack(uses).sum(0)) <= 1e-9, name


@pytest.mark.parametrize("case", [case for case in cases("fixed") if config_of(case).schedule.recursions > 1])
def test_depth_at_call_time_is_the_shallower_model(case: str) -> None:
    """`depth=r` of the fixed router is the model with r recursions and the same weights, deeper than trained too."""
    config, model, tokens = config_of(case), eval_model(case), random_tokens(case)
    schedule = config.schedule.resolved
    deepest = schedule.recursions if config.step_embedding else schedule.recursions + 2
    for r in range(1, deepest + 1):
        general = {"sharing": schedule.order, "core": schedule.core, "prelude": schedule.prelude, "coda": schedule.coda}
        shallow: Any = morex.build_model(
            changed(config, schedule=general | {"recursions": r}), dtype=torch.float64
        ).eval()
        weights = {
            name: value[:r] if name.endswith("step_embedding") else value for name, value in model.state_dict().items()
        }
        shallow.load_state_dict(weights)
        for depth in (r, f"uniform:{r}"):
            assert largest_change(model(tokens, depth=depth).logits, shallow(tokens).logits) <= 1e-12


@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
def test_one_recursion_equals_the_plain_model(sharing: str) -> None:
    layers = ["model.schedule.core=null", "model.schedule.prelude=null", "model.schedule.coda=null"]
    schedule = [f"model.schedule.sharing={sharing}", "model.schedule.layers=4", "model.schedule.recursions=1"]
    once = build(load("recursive", *layers, *schedule).model).eval()
    plain: Any = morex.build_model(load("vanilla", "model.schedule.layers=4").model, dtype=torch.float64).eval()
    copy_weights(once, plain, [0, 1, 2, 3])
    tokens = random_tokens("recursive")
    assert torch.equal(once(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize("kind", ["expert_choice", "threshold"])
def test_one_gated_recursion_is_h_plus_g_core(kind: str) -> None:
    """R = 1: H + g * core(H), from the embedding and the last state of the plain model with the same weights."""
    options = {"vocab_size": 31, "d_model": 16, "attention": {"heads": 2}, "mixer": {"kind": "swiglu", "d_ff": 24}}
    once_schedule = {"sharing": "cycle", "core": 2, "recursions": 1}
    once = build(validate(ModelConfig, options | {"schedule": once_schedule, "depth": {"kind": kind}})).eval()
    plain: Any = morex.build_model(
        validate(ModelConfig, options | {"schedule": {"sharing": "none", "layers": 2}}), dtype=torch.float64
    ).eval()
    copy_weights(once, plain, [0, 1])
    states: list[torch.Tensor] = []
    for model in (once, plain):
        norm: Any = model.norm
        norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        model(torch.arange(12)[None])
    routed, core = (state.reshape(12, 16) for state in states)
    weights = once.state_dict()
    h = weights["embedding.weight"][:12]
    (scorer,) = (weight for name, weight in weights.items() if ".router.score." in name)
    gate = 0.1 * torch.sigmoid(h @ scorer[0])
    assert largest_change(routed, h + gate[:, None] * core) <= 1e-12


@pytest.mark.parametrize(
    ("sharing", "order"),
    [
        ("cycle", [0, 1, 2, 0, 1, 2]),
        ("sequence", [0, 0, 1, 1, 2, 2]),
        ("middle_cycle", [0, 1, 2, 1, 2, 3]),
        ("middle_sequence", [0, 1, 1, 2, 2, 3]),
    ],
)
def test_orders_of_sharing(sharing: str, order: list[int]) -> None:
    """Six layers, two recursions: blocks run in the order that the strategy names."""
    options = {"vocab_size": 31, "d_model": 16, "attention": {"heads": 2}, "mixer": {"kind": "swiglu", "d_ff": 24}}
    schedule = {"sharing": sharing, "layers": 6, "recursions": 2}
    shared = build(validate(ModelConfig, options | {"schedule": schedule})).eval()
    plain: Any = morex.build_model(
        validate(ModelConfig, options | {"schedule": {"sharing": "none", "layers": 6}}), dtype=torch.float64
    ).eval()
    copy_weights(shared, plain, order)
    tokens = torch.arange(20).reshape(2, 10)
    assert torch.equal(shared(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize("order", ["cycle", "sequence"])
def test_places_number_the_steps(order: Any) -> None:
    schedule = Schedule(prelude=2, core=3, coda=1, recursions=4, order=order)
    assert [schedule.place(step) for step in schedule.steps] == list(range(15))
