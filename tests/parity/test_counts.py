"""Invariant 8: parameters, FLOPs and KV bytes come from closed forms that agree with the tensors and with torch."""

import re
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import morex
from morex.config import ModelConfig
from morex.loading import validate
from morex.nn.signals import RouterStats
from parity.helpers import (
    CASES,
    LM_CASES,
    PRESETS,
    build,
    cases,
    config_of,
    every_step,
    labels_for,
    load,
    plain_path,
    random_tokens,
    splitting_model,
)

ROUTED = cases("token_choice", "threshold", "random", "expert_choice", "halting", "exit_gate")

LENGTH = 24  # divides into the capacities of R = 2, 3, 4, 6 and 8 recursions
EXACT = {
    "more": 1_457_920,
    "more-baseline": 336_640,
    "mor-llm-small": 68_244_992 + 4 * 512,
    "mor-llm-medium": 1_015_420_928 + 6 * 2048,
    "smollm2-135m": 134_515_008,
    "gemma3-270m": 268_098_176,
    "mor-llm-large": 6_887_976_960 + 8 * 4096,
}
EXACT_NON_EMBEDDING = {
    "paper-360m-vanilla": 314_635_200,
    "paper-360m-recursive-3": 117_988_800,
    "paper-360m-mor-2": 167_150_400 + 2 * 960,
    "paper-360m-mor-3": 117_988_800 + 3 * 960,
    "paper-360m-mor-4": 98_324_160 + 4 * 960,
}


def flops(case: str, model: Any, tokens: torch.Tensor, backward: bool, **options: Any) -> int:
    """Torch's count, on the plain path and the math attention backend, which it can see into."""
    counter = FlopCounterMode(display=False)
    with plain_path(), sdpa_kernel(SDPBackend.MATH), counter, torch.set_grad_enabled(backward):
        out = model(tokens, labels=labels_for(case, tokens) if backward else None, **options)
        if backward:
            out.loss.backward()
    return counter.get_total_flops()


def visits_everything(case: str) -> ModelConfig:
    """The case with every token at every expert and step, so that the lengths of packed rows are known beforehand."""
    config = every_step(config_of(case))
    if getattr(config.mixer, "attention_scope", "token") == "token":
        return config
    router = config.mixer.router.model_copy(update={"top_k": config.mixer.router.experts})
    return config.model_copy(update={"mixer": config.mixer.model_copy(update={"router": router})})


def amortised(config: ModelConfig) -> int:
    """How many times larger a batch must be for W_o W_v, folded once a forward pass, to weigh under 1 % a token."""
    return 6 if config.mixer.kind == "recursive" and config.mixer.attention_scope == "token" else 1


def whole_length(config: ModelConfig) -> int:
    """A length of which every capacity is a whole number of tokens."""
    shares = config.depth.shares(config.schedule.recursions) if config.depth.kind == "expert_choice" else ()
    lengths = range(LENGTH, 3 * LENGTH)
    return next(length for length in lengths if all(abs(c * length - round(c * length)) < 1e-9 for c in shares))


def measured_shares(stats: RouterStats) -> tuple[float, ...]:
    """Share of the tokens active at recursion r = 1..R, mean over the routed groups."""
    groups = [fields["active"].double() / fields["tokens"] for fields in stats.values() if "active" in fields]
    return tuple(torch.stack(groups).mean(0).tolist())


def uneven_attention_flops(config: ModelConfig, groups: list[list[torch.Tensor]]) -> float:
    """Forward FLOPs of attention in frames as wide as their longest row, less those of rows of the mean length.

    Args:
        groups: active tokens [B, T] of each recursion of each routed group.
    """
    head_dim = config.attention.head_dim or config.d_model // config.attention.heads
    per_pair = 4 * config.attention.heads * head_dim
    visits = 0
    if getattr(config.mixer, "attention_scope", "token") == "routed":
        visits = config.mixer.router.experts * config.mixer.steps
    elif config.mixer.kind == "shared_recurrent":
        visits = config.mixer.steps
    masks = torch.stack([torch.stack(masks) for masks in groups])  # [groups, R, B, T]
    batch = masks.shape[2]

    def widest_and_mean(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counts = chosen.sum(-1).double()
        return counts.amax(-1), counts.mean((0, 2)).expand(counts.shape[:2])

    widest, mean = widest_and_mean(masks)
    own = batch * (widest**2 - mean**2)
    # Keys that a recursion meets: its own tokens', those of recursion 1, or of all who have come by.
    met = masks.cummax(1).values if config.kv == "refresh" else masks[:, :1].expand_as(masks)
    widest_met, mean_met = widest_and_mean(met)
    others = batch * (widest * widest_met - mean * mean_met)
    attended = own if config.kv == "per_recursion" else torch.cat((own[:, :1], others[:, 1:]), 1)
    blocks = config.schedule.resolved.core / len(groups)
    return per_pair * blocks * (attended.sum() + visits * own.sum()).item()


def call_time_depth(config: ModelConfig) -> str | None:
    """Expert choice has known lengths in training; where the lengths depend on the input, two recursions for all."""
    return None if config.depth.kind in ("fixed", "expert_choice") else "uniform:2"


@pytest.mark.parametrize("preset", PRESETS)
def test_counts_equal_tensors(preset: str) -> None:
    """Full sizes, on the meta device."""
    config = morex.load_config(preset).model
    model = morex.build_model(config, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    counts = morex.count(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = sum(p.numel() for n, p in model.named_parameters() if re.match(r"(position_)?embedding|head", n))
    assert counts.parameters == total
    assert counts.unique_non_embedding == total - embeddings
    assert counts.unrolled_depth == config.schedule.resolved.unrolled_depth


@pytest.mark.parametrize("case", CASES)
def test_counts_equal_tensors_in_every_case(case: str) -> None:
    model = morex.build_model(config_of(case))
    assert morex.count(config_of(case)).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("preset", "squares"),
    [
        ("moe", 8 * 4),
        ("more-a", 12 * 4),
        ("more-b", 4 * 4 + 18),
        ("more-c", 8 * 4),
        ("moe-base", 8 * 8),
        ("more-a-base", 12 * 8),
        ("more-b-base", 4 * 8 + 18),
        ("more-c-base", 8 * 8),
    ],
)
def test_expert_layers_have_as_many_squares_of_the_width_as_documented(preset: str, squares: int) -> None:
    """Their matrices in D^2 a layer, without the router."""
    config = morex.load_config(preset).model
    model = morex.build_model(config, device="meta")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if ".0.mixer." in name}
    matrices = [size for name, size in sizes.items() if "norm" not in name and "router" not in name]
    assert sum(matrices) == squares * config.d_model**2


@pytest.mark.parametrize("preset", EXACT)
def test_counts_are_the_published_totals(preset: str) -> None:
    assert morex.count(morex.load_config(preset).model).parameters == EXACT[preset]


@pytest.mark.parametrize(
    ("preset", "published", "positions"), [("mor-act-400m", 404_249_601, 256), ("standard-400m", 405_613_568, 512)]
)
def test_counts_are_the_published_totals_but_for_biases_and_positions(
    preset: str, published: int, positions: int
) -> None:
    """Two models that were published with biases in their feed-forward nets, and one of them with fewer positions."""
    config = morex.load_config(preset).model
    ours = morex.count(config).parameters
    assert ours == pytest.approx(published, rel=1e-3)
    biases = config.schedule.resolved.num_blocks * (4096 + 1024)
    assert ours + biases - (config.max_seq_len - positions) * config.d_model == published


@pytest.mark.parametrize("preset", EXACT_NON_EMBEDDING)
def test_counts_are_the_published_figures_without_embeddings(preset: str) -> None:
    assert morex.count(morex.load_config(preset).model).unique_non_embedding == EXACT_NON_EMBEDDING[preset]


@pytest.mark.parametrize("case", CASES)
def test_flops_agree_with_torch_counter(case: str) -> None:
    """Forward, and forward with backward, of a training batch, within 1 %."""
    config = visits_everything(case)
    model, depth, length = build(config), call_time_depth(config), whole_length(config)
    tokens = random_tokens(case, 4 * amortised(config), length)
    counts = morex.count(config, seq_len=length, depth=depth)
    measured = flops(case, model, tokens, backward=False, depth=depth) / tokens.numel()
    assert counts.forward_flops_per_token == pytest.approx(measured, rel=0.01)
    measured = flops(case, model, tokens, backward=True, depth=depth) / tokens.numel()
    assert counts.train_flops_per_token == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("case", [case for case in cases("fixed") if config_of(case).schedule.recursions > 1])
def test_flops_agree_with_torch_counter_in_fewer_recursions(case: str) -> None:
    config = visits_everything(case)
    model, tokens = build(config), random_tokens(case, 4, LENGTH)
    for depth in (1, "uniform:2"):
        counts = morex.count(config, seq_len=LENGTH, depth=depth)
        measured = flops(case, model, tokens, backward=False, depth=depth) / tokens.numel()
        assert counts.forward_flops_per_token == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("case", ROUTED)
def test_flops_at_measured_shares_agree_with_torch_counter(case: str) -> None:
    """One routed sequence, at the shares that its own forward pass had, within 1 %.

    With one sequence nothing is padding. What is left, 0.3 % here, is `sequence`: `count` takes one share for all
    groups, and attention in groups of M1 and M2 tokens costs more than twice that in a group of their mean.
    """
    config, tokens = visits_everything(case), random_tokens(case, 1, LENGTH)
    model = splitting_model(config, tokens)
    with torch.no_grad():
        shares = measured_shares(model(tokens).stats)
    counts = morex.count(config, seq_len=LENGTH, shares=shares)
    measured = flops(case, model, tokens, backward=False) / tokens.numel()
    assert counts.forward_flops_per_token == pytest.approx(measured, rel=0.01)
    if len(config.schedule.resolved.groups) == 1:
        assert counts.forward_flops_per_token == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", ROUTED)
def test_flops_of_a_routed_batch_are_the_closed_form_and_its_uneven_rows(case: str, training: bool) -> None:
    """Rows of a batch have different numbers of active tokens M, which the shares do not say.

    Torch counts attention over the frame, max(M)^2 a row, the closed form over mean(M)^2: padding, and E[M^2] beyond
    E[M]^2. In tiny models that is some percent of all FLOPs, and most with routed experts; it is worked out
    here from the masks, so that everything but attention, and attention itself, agree to rounding.
    """
    config, tokens = visits_everything(case), random_tokens(case, 8, LENGTH)
    model = splitting_model(config, tokens, training=training)
    torch.manual_seed(0)
    out = model(tokens, return_trace=True)
    counts = morex.count(config, seq_len=LENGTH, shares=measured_shares(out.stats))
    expected = counts.train_flops_per_token if training else counts.forward_flops_per_token
    uneven = (3 if training else 1) * uneven_attention_flops(config, list(out.trace.active.values()))
    # Leaving early leaves the numbers of active tokens least alike.
    most = 0.2 if config.depth.kind in ("halting", "exit_gate") else 0.1
    assert -1e-6 <= uneven <= most * expected * tokens.numel()
    torch.manual_seed(0)  # what is dropped decides who is active
    measured = flops(case, model, tokens, backward=training)
    assert expected * tokens.numel() + uneven == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize("case", LM_CASES)
def test_flops_of_decoding_agree_with_torch_counter(case: str) -> None:
    """One more token for each row, after a context of known length; too few for work to be shared by a batch."""
    config, context = visits_everything(case), 32
    rows = 2
    depth = None if config.depth.kind == "fixed" else "uniform:2"
    model: Any = build(config).eval()
    tokens = random_tokens(case, rows, context)
    with torch.no_grad():
        cache = model.new_cache(rows)
        model(tokens[:, :-1], cache=cache, depth=depth)
    counts = morex.count(config, seq_len=context, context=context, depth=depth)
    measured = flops(case, model, tokens[:, -1:], backward=False, cache=cache, depth=depth) / rows
    assert counts.decode_flops_per_token == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("case", LM_CASES)
def test_kv_bytes_equal_the_cache(case: str) -> None:
    config = every_step(config_of(case))
    depth = None if config.depth.kind == "fixed" else "uniform:2"
    model: Any = build(config, torch.float32).eval()
    tokens = random_tokens(case, 3, LENGTH)
    with torch.no_grad():
        cache = model.new_cache(3)
        model(tokens, cache=cache, depth=depth)
    expected = morex.count(config, seq_len=LENGTH, depth=depth).kv_bytes_per_token
    assert cache.bytes() / tokens.numel() == pytest.approx(expected)


def test_flops_of_published_programs() -> None:
    """Forward FLOPs per token of both models, counted by torch on the program they come from (batch 32 x 128)."""
    baseline = morex.count(morex.load_config("more-baseline").model, seq_len=128)
    assert baseline.forward_flops_per_token == pytest.approx(803_072, rel=0.01)
    assert baseline.train_flops_per_token == pytest.approx(2_409_216, rel=0.01)
    folded = morex.count(morex.load_config("more").model, seq_len=128)
    assert folded.forward_flops_per_token == pytest.approx(3_164_416, rel=0.02)


def test_capacities_save_flops_and_cache() -> None:
    """Shares 1, 2/3, 1/3 of three recursions: two thirds of the linear work, four ninths more is saved in attention."""
    dense, routed = (morex.count(config_of(name), seq_len=LENGTH) for name in ("recursive", "mor-expert"))
    schedule = config_of("recursive").schedule.resolved
    ends = schedule.prelude + schedule.coda
    shares = (3 * schedule.core * 2 / 3 + ends) / (3 * schedule.core + ends)
    assert routed.kv_bytes_per_token == pytest.approx(dense.kv_bytes_per_token * shares)
    assert shares * 0.9 < routed.forward_flops_per_token / dense.forward_flops_per_token < shares * 1.1
    assert routed.unrolled_depth == dense.unrolled_depth


def test_experts_cost_what_they_are_visited() -> None:
    """K of E experts: FLOPs follow K, parameters follow E."""
    counts = {}
    for experts, chosen in ((4, 1), (4, 2), (8, 2)):
        router = {"experts": experts, "top_k": chosen}
        mixer = {"kind": "moe", "router": router, "expert": {"kind": "relu", "d_ff": 64}}
        tree = {"vocab_size": 97, "d_model": 32, "mixer": mixer, "schedule": {"layers": 1}}
        counts[experts, chosen] = morex.count(validate(ModelConfig, tree), seq_len=LENGTH)
    expert = 2 * 2 * 32 * 64
    more = counts[4, 2].forward_flops_per_token - counts[4, 1].forward_flops_per_token
    assert more == pytest.approx(expert)
    assert counts[8, 2].parameters - counts[4, 2].parameters == 4 * (2 * 32 * 64 + 32)
    routing = counts[8, 2].forward_flops_per_token - counts[4, 2].forward_flops_per_token
    assert routing == pytest.approx(2 * 32 * 4)


def test_counts_of_a_preset_are_those_of_its_overrides() -> None:
    wider = load("vanilla", "model.mixer.d_ff=96").model
    more = morex.count(wider).parameters - morex.count(load("vanilla", "model.mixer.d_ff=64").model).parameters
    assert more == 3 * 32 * 32 * wider.schedule.resolved.num_blocks
