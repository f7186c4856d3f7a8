"""What the invariant tests share: the cases (every preset and the variants that no preset covers), models, batches.

Models are tiny, float64 unless said otherwise, and perturbed at random in every parameter, so that routers really
split the tokens and no weight sits at a special value. A model from `eval_model` is shared between tests and must not
be changed; `fresh_model` gives a copy of one's own.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

import morex
from morex.config import Config, ModelConfig
from morex.loading import validate
from morex.nn.fast.switch import enabled
from morex.sections.dropout import DropoutConfig
from morex.sections.mixers import FeedForwardConfig

EXPERTS = "model.mixer={kind: recursive, d_ff: 16, steps: 2, router: {experts: 3, top_k: 2}}"
# One block before one that recurs: each has experts, which is what these cases cost.
SHORT = "model.schedule={sharing: cycle, prelude: 1, core: 1, coda: 0, recursions: 3}"

# What no preset covers: name -> (preset, overrides on its tiny form).
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "recursive+shared_first": ("recursive", ["model.kv=shared_first"]),
    "recursive+refresh": ("recursive", ["model.kv=refresh"]),
    "expert+refresh": ("mor-expert", ["model.kv=refresh"]),
    "expert+refresh+all_candidates": ("mor-expert", ["model.depth.hierarchical=false", "model.kv=refresh"]),
    "expert+refresh+window": (
        "mor-expert",
        ["model.attention={heads: 4, window: 4, global_every: 4}", "model.kv=refresh"],
    ),
    "expert+refresh+recursive_experts": ("mor-expert", [SHORT, EXPERTS, "model.kv=refresh"]),
    "token+refresh": ("mor-token", ["model.kv=refresh", "model.schedule.sharing=sequence"]),
    "token+refresh+recursive_experts": ("mor-token", [SHORT, EXPERTS, "model.kv=refresh"]),
    "threshold+refresh": ("mor-threshold", ["model.kv=refresh", "model.depth.capacities=[0.75, 0.5, 0.25]"]),
    "act+refresh": ("mor-act", ["model.kv=refresh"]),
    "random+refresh": ("mor-random", ["model.kv=refresh"]),
    "ouro+shared_first": ("ouro", ["model.kv=shared_first", "model.norm_placement=pre"]),
    "ouro+prelude": (
        "ouro",
        ["model.schedule={sharing: sequence, prelude: 1, core: 1, recursions: 3}", "model.depth.threshold=0.7"],
    ),
    "ouro+window": ("ouro", ["model.attention={heads: 4, window: 4}", "model.step_embedding=true"]),
    "ouro+recursive_experts": ("ouro", [SHORT, EXPERTS, "model.tie_embeddings=false"]),
    "huginn+truncated": (
        "huginn",
        ["model.depth={kind: sampled, state: input, gradient_recursions: 1}", "model.input_injection=add"],
    ),
    "huginn+recursive_experts": (
        "huginn",
        [SHORT, EXPERTS, "model.norm_placement=pre", "model.depth.gradient_recursions=2"],
    ),
    "recursive+sampled": (
        "recursive",
        ["model.depth={kind: sampled, gradient_recursions: null, seed: 1}", "model.kv=shared_first"],
    ),
    "recursive+step_embedding": ("recursive", ["model.step_embedding=true"]),
    "recursive+add_input": (
        "recursive",
        ["model.input_injection=add", "model.kv=shared_first", "model.step_embedding=true"],
    ),
    "recursive+concat_input": ("recursive", ["model.input_injection=concat"]),
    "sequence+concat_input": ("mor-token", ["model.schedule.sharing=sequence", "model.input_injection=concat"]),
    "expert+concat_input": ("mor-expert", ["model.input_injection=concat", "model.depth.gate=delta"]),
    "threshold+concat_input": (
        "mor-threshold",
        ["model.input_injection=concat", "model.kv=shared_first", "model.norm_placement=sandwich"],
    ),
    "act+concat_input": ("mor-act", ["model.input_injection=concat"]),
    "random+add_input": ("mor-random", ["model.input_injection=add"]),
    "vanilla+dropout": ("vanilla", ["model.dropout={attention: 0.3, residual: 0.2, embedding: 0.1}"]),
    "expert+dropout": ("mor-expert", ["model.dropout={attention: 0.1, residual: 0.2}", "model.kv=shared_first"]),
    "tuned+dropout": ("more-tuned", ["model.dropout={residual: 0.2, embedding: 0.1}", "model.norm_placement=sandwich"]),
    "classifier+dropout": ("sandbox-token", ["model.dropout={attention: 0.1, residual: 0.1, embedding: 0.1}"]),
    "recursive+scale": ("recursive", ["model.residual_scale=recursions", "model.norm_placement=pre_post"]),
    "recursive+norms": (
        "recursive",
        ["model.recursion_norms=true", "model.norm=layer", "model.norm_placement=sandwich", "model.kv=shared_first"],
    ),
    "recursive+lora": (
        "recursive",
        ["model.lora={rank: 3, alpha: 6}", "model.attention={heads: 4, kv_heads: 2, qk_norm: true, bias: true}"],
    ),
    "recursive+lora_gelu": ("recursive", ["model.lora={rank: 2}", "model.mixer.kind=gelu", "model.kv=shared_first"]),
    "expert+lora": ("mor-expert", ["model.lora={rank: 4}", "model.recursion_norms=true", "model.mixer.kind=geglu"]),
    "sequence+lora": ("mor-token", ["model.schedule.sharing=sequence", "model.lora={rank: 2, alpha: 1}"]),
    "threshold+lora": (
        "mor-threshold",
        ["model.lora={rank: 4}", "model.kv=shared_first", "model.input_injection=concat"],
    ),
    "act+norms": ("mor-act", ["model.recursion_norms=true", "model.residual_scale=recursions"]),
    "random+lora": ("mor-random", ["model.lora={rank: 4}", "model.residual_scale=recursions"]),
    "expert+norms_of_experts": (
        "mor-expert",
        [
            "model.schedule={sharing: sequence, prelude: 0, core: 2, coda: 0}",
            EXPERTS,
            "model.recursion_norms=true",
            "model.residual_scale=recursions",
        ],
    ),
    "recursive+sequence": ("recursive", ["model.schedule.sharing=sequence"]),
    "recursive+gelu": ("recursive", ["model.mixer={kind: gelu, d_ff: 48}", "model.tie_embeddings=false"]),
    "vanilla+biases": (
        "vanilla",
        ["model.attention={heads: 4, kv_heads: 2, bias: true, output_bias: true}", "model.mixer.kind=geglu"],
    ),
    "recursive+qk_norm": ("recursive", ["model.attention.qk_norm=true"]),
    "recursive+learned": ("recursive", ["model.attention={heads: 4, kv_heads: 2, positions: learned, bias: true}"]),
    "recursive+llama3": (
        "recursive",
        ["model.attention.rope_scaling={factor: 4, original_max_seq_len: 32, low_freq_factor: 0.5}"],
    ),
    "expert+no_positions": ("mor-expert", ["model.attention.positions=none", "model.kv=shared_first"]),
    "tuned+no_positions": ("more-tuned", ["model.attention={heads: 4, head_dim: 7, positions: none}"]),
    "recursive+sandwich": (
        "recursive",
        ["model.norm_placement=sandwich", "model.embedding_scale=true", "model.logit_cap=5.0"],
    ),
    "expert+pre_post": (
        "mor-expert",
        ["model.norm_placement=pre_post", "model.norm=rms_plus_one", "model.attention.qk_norm=true"],
    ),
    "token+layer_norm": ("mor-token", ["model.norm=layer", "model.attention.qk_norm=true"]),
    "tuned+sandwich": ("more-tuned", ["model.norm_placement=sandwich"]),
    "vanilla+window": ("vanilla", ["model.attention={heads: 4, window: 4, positions: learned}"]),
    "recursive+window": ("recursive", ["model.attention={heads: 4, kv_heads: 2, window: 5, global_every: 3}"]),
    "sequence+window": (
        "mor-token",
        [
            "model.schedule.sharing=sequence",
            "model.attention={heads: 4, window: 3, global_every: 2, local_rope_base: 50, qk_norm: true}",
        ],
    ),
    "expert+window": (
        "mor-expert",
        ["model.attention={heads: 4, window: 4, global_every: 4, local_rope_base: 100, rope_base: 1000}"],
    ),
    "threshold+window": ("mor-threshold", ["model.attention={heads: 4, window: 5}", "model.kv=shared_first"]),
    "token+window": ("mor-token", ["model.attention={heads: 4, window: 4}"]),
    "random+window": ("mor-random", ["model.attention={heads: 4, window: 2}"]),
    "expert+shared_first": ("mor-expert", ["model.kv=shared_first"]),
    "expert+aux_router": ("mor-expert", ["model.depth.causal=aux_router", "model.depth.router=mlp"]),
    "expert+all_candidates": ("mor-expert", ["model.depth.hierarchical=false", "model.depth.score=tanh"]),
    "expert+unweighted": ("mor-expert", ["model.depth.score=unweighted"]),
    "expert+sequence": ("mor-expert", ["model.schedule.sharing=sequence", "model.depth.gate=delta"]),
    "expert+few_at_first": ("mor-expert", ["model.depth.capacities=[0.75, 0.5, 0.25]", "model.depth.z_weight=0.001"]),
    "expert+recursive_experts": ("mor-expert", [EXPERTS, "model.step_embedding=true"]),
    "token+shared_first": ("mor-token", ["model.kv=shared_first", "model.depth.gate=each"]),
    "token+sigmoid": ("mor-token", ["model.depth.score=sigmoid", "model.depth.balance=loss_free"]),
    "token+sequence": ("mor-token", ["model.schedule.sharing=sequence", "model.depth.router=mlp"]),
    "token+recursive_experts": ("mor-token", [SHORT, EXPERTS]),
    "threshold+shared_first": ("mor-threshold", ["model.kv=shared_first"]),
    "threshold+few_at_first": ("mor-threshold", ["model.depth.capacities=[0.75, 0.5, 0.25]"]),
    "threshold+moe": (
        "mor-threshold",
        ["model.mixer={kind: moe, expert: {kind: swiglu, d_ff: 16}, router: {experts: 4, top_k: 2, bias_rate: 0.01}}"],
    ),
    "act+sequence": ("mor-act", ["model.schedule.sharing=sequence", "model.depth.epsilon=0.2"]),
    "act+step_embedding": ("mor-act", ["model.step_embedding=true", "model.depth.initial_bias=1.0"]),
    "act+recursive_experts": ("mor-act", [SHORT, EXPERTS, "model.depth.ponder_weight=0.0"]),
    "moe+geglu": ("moe", ["model.mixer.expert.kind=geglu", "model.mixer.router.top_k=2"]),
    "moe+gelu": ("moe", ["model.mixer.expert.kind=gelu", "model.mixer.router.top_k=2"]),
    "random+shared_first": ("mor-random", ["model.kv=shared_first"]),
    "huginn+alone": ("more-a", ["model.mixer.attention_scope=token", "model.mixer.router.top_k=2"]),
    "huginn+grouped_heads": ("more-a", ["model.attention={heads: 4, kv_heads: 2}", "model.mixer.router.top_k=2"]),
    "shared_recurrent+expert_choice": (
        "mor-expert",
        [
            SHORT,
            "model.mixer={kind: shared_recurrent, d_ff: 24, router: {experts: 3, top_k: 2}}",
            "model.kv=shared_first",
        ],
    ),
    "layer_recurrent+threshold": (
        "mor-threshold",
        [
            SHORT,
            "model.mixer={kind: layer_recurrent, expert: {kind: swiglu, d_ff: 16}, router: {experts: 4, top_k: 2}}",
        ],
    ),
    "layer_recurrent+free": ("more-c", ["model.mixer.ema=0", "model.mixer.entropy_floor=0", "model.mixer.steps=3"]),
    "tuned+one_expert_each": ("more-tuned", ["model.mixer.router.top_k=1", "model.mixer.branch=output"]),
    "tuned+token_scope": ("more-tuned", ["model.mixer.attention_scope=token"]),
    "tuned+expert_choice_steps": (
        "more-tuned",
        ["model.mixer.depth={kind: expert_choice, alpha: 1.0}", "model.mixer.steps=3"],
    ),
    "tuned+token_choice_steps": ("more-tuned", ["model.mixer.depth.kind=token_choice", "model.mixer.router.top_k=1"]),
    "tuned+threshold_steps": ("more-tuned", ["model.mixer.depth={kind: threshold, alpha: 1.0}"]),
    "tuned+halting_steps": ("more-tuned", ["model.mixer.depth={kind: halting, epsilon: 0.2}"]),
    "alone+random_steps": ("more-tuned", ["model.mixer.depth.kind=random", "model.mixer.attention_scope=token"]),
    "expert+halting_steps": ("mor-expert", [SHORT, EXPERTS, "model.mixer.depth.kind=halting"]),
    "tuned+grouped_heads": ("more-tuned", ["model.attention={heads: 4, kv_heads: 2}"]),
    "classifier+mean": ("mor-act", ["model.head={kind: classifier, classes: 3, pooling: mean}"]),
    "classifier+experts": ("more-tuned", ["model.head={kind: classifier, classes: 5}", "model.logit_cap=4.0"]),
}
PRESETS = morex.presets()
CASES = [*PRESETS, *VARIANTS]
"""Of all models; `LM_CASES`, further down, are those that give logits for every token and decode."""


@cache
def config_of(case: str) -> ModelConfig:
    """The tiny model config of a case."""
    return load(case).model


def load(case: str, *overrides: str) -> Config:
    preset, changes = VARIANTS.get(case, (case, []))
    config = morex.load_config(preset, [*changes, *overrides], tiny=True)
    if getattr(config.model.mixer, "state_std", 0):
        # The random first state of training has tests of its own; without it, two passes can be compared.
        config = morex.load_config(preset, [*changes, *overrides, "model.mixer.state_std=0"], tiny=True)
    if getattr(config.model.depth, "state", None) == "random":
        config = morex.load_config(preset, [*changes, *overrides, "model.depth.state_std=0"], tiny=True)
    return config


LM_CASES = [case for case in CASES if config_of(case).head.kind == "lm"]
CLASSIFIER_CASES = [case for case in CASES if config_of(case).head.kind == "classifier"]

REPEATABLE = [case for case in CASES if config_of(case).dropout == DropoutConfig()]
"""Cases of which two passes in training mode can be compared, whatever else they compute: nothing is dropped."""
MODES = [(case, mode) for case in CASES for mode in ("eval", "train") if mode == "eval" or case in REPEATABLE]
"""Every case in eval mode, and in training mode where it is repeatable."""


def cases(*depth_kinds: str, kv: str | None = None, mixer: str | None = None, head: str | None = None) -> list[str]:
    """Cases whose depth router is of one of these kinds (all when none is named), with this KV rule, mixer and head."""
    found = []
    for case in CASES:
        config = config_of(case)
        fits = head is None or config.head.kind == head
        fits &= not depth_kinds or config.depth.kind in depth_kinds
        fits &= kv is None or config.kv == kv
        fits &= mixer is None or config.mixer.kind == mixer
        if fits:
            found.append(case)
    assert found, f"no case has {depth_kinds} {kv} {mixer}"
    return found


def has_experts(config: ModelConfig) -> bool:
    return not isinstance(config.mixer, FeedForwardConfig)


def every_step(config: ModelConfig) -> ModelConfig:
    """The config without a router for the steps inside experts."""
    if not hasattr(config.mixer, "depth"):
        return config
    mixer = config.mixer.model_dump() | {"depth": {"kind": "fixed"}}
    return validate(ModelConfig, config.model_dump() | {"mixer": mixer})


def build(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 1, std: float = 0.2) -> Any:
    """A model in training mode with every parameter moved at random by `std`."""
    model = morex.build_model(config, dtype=dtype)
    perturb(model, seed, std)
    return model.train()


def perturb(model: torch.nn.Module, seed: int = 1, std: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((std * noise).to(parameter.dtype))


@cache
def eval_model(case: str, dtype: torch.dtype = torch.float64) -> Any:
    """The perturbed model of a case in eval mode, whose router splits `random_tokens(case)`. Shared: do not change it.

    Seeds are tried in order until the routing is not trivial; that one is found is asserted here, for every test.
    """
    return splitting_model(config_of(case), random_tokens(case), dtype)


def splitting_model(
    config: ModelConfig, tokens: Tensor, dtype: torch.dtype = torch.float64, training: bool = False
) -> Any:
    """A perturbed model in eval or training mode whose router splits these tokens."""
    for seed in range(1, 60):
        model = build(config, dtype, seed).train(training)
        if routing_splits(model, tokens):
            return model
    raise AssertionError(f"no perturbation of {config} makes its routers split the tokens")


def fresh_model(case: str, dtype: torch.dtype = torch.float64) -> Any:
    """A copy of `eval_model` of one's own, in training mode."""
    return copy.deepcopy(eval_model(case, dtype)).train()


def routing_splits(model: Any, tokens: Tensor) -> bool:
    """Whether every router there is decides differently for different tokens of this batch."""
    config: Any = model.config
    with torch.no_grad():
        trace = model(tokens, return_trace=True).trace
    split = True
    all_go_on = config.depth.kind in ("fixed", "sampled") or (config.depth.kind == "exit_gate" and model.training)
    if not all_go_on and config.schedule.recursions > 1:
        for active in trace.active.values():
            shares = [mask.double().mean().item() for mask in active]
            split &= any(0 < share < 1 for share in shares)
            split &= shares[min(1, len(shares) - 1)] > 0
    if has_experts(config) and config.mixer.router.top_k < config.mixer.router.experts:
        for chosen in trace.experts.values():
            loads = torch.cat([ids[ids >= 0].flatten() for ids in chosen]).bincount(
                minlength=config.mixer.router.experts
            )
            split &= int((loads > 0).sum()) > config.mixer.router.top_k
    return bool(split)


def plain_path() -> AbstractContextManager[Any]:
    """Turns the hand-written fast paths off: what torch's counter sees into, and what a reader reads."""
    return enabled(False)


def random_tokens(case: str, batch: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    """Token ids [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config_of(case).vocab_size, (batch, length), generator=generator)


def pad(rows: Sequence[Tensor], value: int = 0) -> tuple[Tensor, Tensor]:
    """Right-padded [B, T] and the true lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.full((len(rows), int(lengths.max())), value)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    return padded, lengths


def ragged_rows(case: str, lengths: Sequence[int], seed: int = 3) -> list[Tensor]:
    """One row of token ids for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(config_of(case).vocab_size, (length,), generator=generator) for length in lengths]


def labels_of(tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The tokens themselves, -100 on padding."""
    labels = tokens.clone()
    if lengths is not None:
        labels[torch.arange(tokens.shape[1]) >= lengths[:, None]] = -100
    return labels


def labels_for(case: str, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Labels that the case's head learns: the tokens themselves, or a class for each row, from its own tokens."""
    return labels_in(config_of(case), tokens, lengths)


def labels_in(config: ModelConfig, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Labels that a model of this config learns, as `labels_for` those of a case."""
    labels, head = labels_of(tokens, lengths), config.head
    return labels if head.kind == "lm" else labels.clamp(min=0).sum(1) % head.classes


def row_logits(logits: Tensor, length: int) -> Tensor:
    """What a model says about one row of a batch: logits of its real tokens, or those of its class."""
    return logits if logits.dim() == 1 else logits[:length]


def tensors_in(stats: Any) -> Iterator[Tensor]:
    """Every tensor of the routers' statistics."""
    for fields in stats.values():
        yield from (value for value in fields.values() if isinstance(value, Tensor))


def largest_change(first: Tensor, second: Tensor) -> float:
    """Largest absolute difference; NaN anywhere counts as infinite."""
    assert first.shape == second.shape, f"shapes {tuple(first.shape)} and {tuple(second.shape)}"
    if first.numel() == 0:
        return 0.0
    difference = (first.double() - second.double()).abs().max().item()
    return float("inf") if difference != difference else difference
