"""Invariant 4: shared blocks are one tensor, and a schedule computes what its untied copy computes."""

import re
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
from morex.sections.schedule import ScheduleConfig
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

RECURRENT = [case for case in cases("fixed") if config_of(case).schedule.recursions > 1]

# What makes recursions the blocks alone.
ALIKE: dict[str, Any] = {
    "step_embedding": False,
    "input_injection": "none",
    "residual_scale": "none",
    "recursion_norms": False,
    "lora": None,
}


def changed(config: ModelConfig, **changes: Any) -> ModelConfig:
    return validate(ModelConfig, config.model_dump() | changes)


def untied(config: ModelConfig) -> ModelConfig:
    """The dense model of the same unrolled depth."""
    schedule = {"sharing": "none", "layers": config.schedule.resolved.unrolled_depth}
    dense = {"depth": {"kind": "fixed"}, "kv": "per_recursion"}
    return changed(config, schedule=schedule, **dense, **ALIKE)


def recurs_alike(config: ModelConfig) -> bool:
    """Whether every recursion does the same, and nothing but the blocks."""
    return all(getattr(config, option) == value for option, value in ALIKE.items())


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


def scorer_of(depth: Any, recursions: int, d: int) -> int:
    """Weights of a depth router, `aux_router` left out."""
    if depth.kind in ("expert_choice", "token_choice", "threshold"):
        scored = recursions
        if depth.score == "unweighted":  # scores only serve to leave tokens out
            scored = sum(share < 1 for share in depth.shares(recursions))
        return scored * d if depth.router == "linear" else 2 * d * d + 2 * d * scored
    return d + 1 if depth.kind in ("halting", "exit_gate") else 0  # one unit with a bias, for all recursions


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
        channel += scorer_of(mixer.depth, mixer.steps, d)
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
    scorer = scorer_of(config.depth, schedule.recursions, d)
    per_group = scorer + (schedule.recursions * d if config.step_embedding else 0)
    per_group += 2 * d * d if config.input_injection == "concat" else 0
    if config.recursion_norms:
        blocks += schedule.core * (schedule.recursions - 1) * norms
    if config.lora is not None:
        assert isinstance(mixer, FeedForwardConfig)
        of_mixer = feed_forward(mixer) // (d * mixer.hidden(d)) * (d + mixer.hidden(d))
        queries_output, keys_values = 2 * (d + q // d), 2 * (d + kv // d)
        made = schedule.recursions if config.kv == "per_recursion" else 1
        per_block = schedule.recursions * (queries_output + of_mixer) + made * keys_values
        blocks += schedule.core * config.lora.rank * per_block
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


@pytest.mark.parametrize("case", [case for case in CASES if recurs_alike(config_of(case))])
def test_schedule_equals_its_untied_copy(case: str) -> None:
    """With every token in every recursion, sharing is only a matter of storage: equal to the bit."""
    config = changed(config_of(case), depth={"kind": "fixed"}, kv="per_recursion")
    shared = build(config).eval()
    plain: Any = morex.build_model(untied(config), dtype=torch.float64).eval()
    copy_weights(shared, plain, visited_blocks(config))
    tokens = random_tokens(case)
    assert torch.equal(shared(tokens).logits, plain(tokens).logits)
    assert sum(p.numel() for p in shared.parameters()) <= sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("case", RECURRENT)
def test_shared_gradient_is_the_sum_over_its_uses(case: str) -> None:
    config = changed(config_of(case), kv="per_recursion", **ALIKE)
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


@pytest.mark.parametrize(
    "case",
    [case for case in RECURRENT if config_of(case).residual_scale == "none"],  # 1/R is another number in the other
)
def test_depth_at_call_time_is_the_shallower_model(case: str) -> None:
    """`depth=r` of the fixed router is the model with r recursions and the same weights, deeper than trained too."""
    config, model, tokens = config_of(case), eval_model(case), random_tokens(case)
    schedule = config.schedule.resolved
    have_own = config.recursion_norms or config.lora is not None
    deepest = schedule.recursions if have_own or config.step_embedding else schedule.recursions + 2
    for r in range(2 if have_own else 1, deepest + 1):
        general = {"sharing": schedule.order, "core": schedule.core, "prelude": schedule.prelude, "coda": schedule.coda}
        shallow: Any = morex.build_model(
            changed(config, schedule=general | {"recursions": r}), dtype=torch.float64
        ).eval()
        weights = {
            name: value[:r] if name.endswith("step_embedding") else value
            for name, value in model.state_dict().items()
            if not (own := re.match(r"stack\.core\.groups\.\d+\.(?:norms|lora)\.(\d+)", name)) or int(own[1]) < r
        }
        shallow.load_state_dict(weights)
        for depth in (r, f"uniform:{r}"):
            assert largest_change(model(tokens, depth=depth).logits, shallow(tokens).logits) <= 1e-12


@pytest.mark.parametrize("order", ["cycle", "sequence"])
def test_a_middle_form_by_its_core(order: str) -> None:
    parts = {"core": 2, "recursions": 3}
    expected = ScheduleConfig.model_validate({"sharing": order, "prelude": 1, "coda": 1, **parts}).resolved
    for ends in ({}, {"prelude": 1, "coda": 1}):
        assert ScheduleConfig.model_validate({"sharing": f"middle_{order}", **ends, **parts}).resolved == expected
    with pytest.raises(ValueError, match=rf"schedule.coda is 2; use '{order}'"):
        ScheduleConfig.model_validate({"sharing": f"middle_{order}", "coda": 2, **parts})


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


@pytest.mark.parametrize("case", [case for case in CASES if config_of(case).lora is not None])
def test_low_rank_changes_begin_as_none(case: str) -> None:
    """Before training, and not after: a model with them is the one without."""
    config, tokens = config_of(case), random_tokens(case)
    relaxed: Any = morex.build_model(config, dtype=torch.float64).eval()
    plain: Any = morex.build_model(changed(config, lora=None), dtype=torch.float64).eval()
    plain.load_state_dict({name: weight for name, weight in relaxed.state_dict().items() if ".lora." not in name})
    before = plain(tokens, depth="uniform:2").logits
    assert largest_change(relaxed(tokens, depth="uniform:2").logits, before) <= 1e-12
    changes = [parameter for name, parameter in relaxed.named_parameters() if ".lora." in name]
    with torch.no_grad():
        for parameter in changes:
            parameter.add_(0.1)
    assert changes and largest_change(relaxed(tokens, depth="uniform:2").logits, before) > 1e-6


@pytest.mark.parametrize("order", ["cycle", "sequence"])
def test_routed_groups_are_counted_without_their_steps(order: Any) -> None:
    for core in (1, 3):
        schedule = Schedule(1, core, 2, 4, order)
        assert schedule.num_groups == len(schedule.groups) == (core if order == "sequence" else 1)
