"""Parameters, FLOPs and KV bytes in closed form, from a config alone.

Every cost is a part's cost times the share of tokens that visit it: c_r for routers with capacities, balance for
token choice, all recursions for halting (an upper bound), or shares that were measured. FLOPs leave padding out; a
multiply-add is two; training is three forward passes (Kaplan et al. 2020, section 2.1). Attention is counted over the
full square, the causal half and what a window hides included.
"""

from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul

from morex.config import ModelConfig, expect_model
from morex.depth.policy import PEEKING, Depth, DepthPolicy, parse_depth
from morex.depth.routers import ROUTERS
from morex.experts.kinds import EXPERTS
from morex.model.heads import classifier_costs
from morex.model.lm import attention_shape, lora_maps, takes_any_depth
from morex.nn.attention import attention_costs
from morex.nn.costs import Costs, linear_costs
from morex.nn.injection import injection_costs
from morex.nn.mixers import feed_forward_costs
from morex.nn.norm import norm_costs
from morex.sections.head import ClassifierHeadConfig
from morex.sections.mixers import FeedForwardConfig


@dataclass(frozen=True)
class Count:
    """Closed-form counts of a model."""

    parameters: int
    """All parameters, each shared one once."""
    unique_non_embedding: int
    """Parameters without the embeddings of tokens and positions and a head of its own weights."""
    unrolled_depth: int
    """Blocks that a token passes when it takes every recursion."""
    forward_flops_per_token: float
    """Forward FLOPs of a token in a sequence of `seq_len`."""
    train_flops_per_token: float
    """Forward and backward FLOPs of a token in a sequence of `seq_len`."""
    decode_flops_per_token: float
    """FLOPs of one decoded token with `context` tokens in the cache; 0 for a classifier, which does not decode."""
    kv_bytes_per_token: float
    """Bytes of keys and values that a token leaves in the cache, in the model's fp32; 0 for a classifier."""


def count(
    config: ModelConfig,
    seq_len: int = 1024,
    context: int | None = None,
    depth: Depth = None,
    shares: tuple[float, ...] | None = None,
    step_shares: tuple[float, ...] | None = None,
    bytes_per_value: int = 4,
) -> Count:
    """Counts a model without building it.

    Args:
        config: the model.
        seq_len: tokens of a training sequence.
        context: tokens in the cache when decoding; default `seq_len`.
        depth: depth at call time, as in the model's forward.
        shares: share of the tokens active at recursion r = 1..R, where it was measured.
        step_shares: share of an expert's tokens that takes step s = 1..S, where a router decides and it was measured.
        bytes_per_value: of a cached value; 4 for fp32, 2 for bf16.

    Raises:
        TypeError: `config` is no ModelConfig.
        ValueError: `seq_len` or `context` is no number of tokens, or `depth` is none that the model can take.
    """
    expect_model(config)
    if seq_len < 1 or (context is not None and context < 0):
        raise ValueError(f"seq_len {seq_len} must be 1 or more, and context {context} 0 or more")
    schedule, policy = config.schedule.resolved, _policy(config, depth)
    active = shares or expected_shares(config, seq_len, depth)
    block, extra, head = block_costs(config, step_shares), lora_costs(config), head_costs(config)
    router = router_costs(config, active, depth) + _injection(config, sum(active))
    embedding = config.vocab_size * config.d_model
    classifies = isinstance(config.head, ClassifierHeadConfig)
    positions = config.max_seq_len * config.d_model * (config.attention.positions == "learned")
    steps = config.d_model * schedule.recursions * config.step_embedding
    last = norm_costs(config.norm, config.d_model).parameters
    norms = last * (2 if config.norm_placement == "pre" else 4)
    unique = schedule.num_blocks * block.parameters + schedule.num_groups * (router.parameters + steps) + last
    unique += schedule.core * (extra.parameters + config.recursion_norms * (schedule.recursions - 1) * norms)
    values = (schedule.prelude + schedule.coda) * _cached(block, 1.0, rereads=False)
    for r, share in enumerate(active, start=1):
        values += schedule.core * _cached(block, share, config.kv == "shared_first" and r > 1)
    flops = _Flops(config, policy, active, shares is not None or policy.is_forced, block, block + extra, router, head)
    return Count(
        parameters=unique + embedding + head.parameters + positions,
        unique_non_embedding=unique,
        unrolled_depth=schedule.unrolled_depth,
        forward_flops_per_token=flops.forward(seq_len),
        train_flops_per_token=flops.training(seq_len),
        decode_flops_per_token=0.0 if classifies else flops.decoding(seq_len if context is None else context),
        kv_bytes_per_token=0.0 if classifies else values * bytes_per_value,
    )


@dataclass(frozen=True)
class _Flops:
    """FLOPs of a token, from the costs of the parts and the share of the tokens that visits each of them."""

    config: ModelConfig
    policy: DepthPolicy
    active: tuple[float, ...]
    """Share of the tokens at each recursion that is run."""
    is_known: bool
    """Whether training runs these recursions, and not those that its router would draw."""
    block: Costs
    recurring: Costs
    """Of a block in the core."""
    router: Costs
    """Of one group, what is injected there included."""
    head: Costs

    def forward(self, tokens: int) -> float:
        """Forward FLOPs of a token among `tokens`."""
        config, schedule, active = self.config, self.config.schedule.resolved, self.active
        met = {"per_recursion": active, "shared_first": (active[0],) * len(active), "refresh": _reached(config, active)}
        flops = (schedule.prelude + schedule.coda) * _visit(self.block, 1.0, 1.0, tokens, rereads=False)
        for r, share in enumerate(active, start=1):
            rereads = config.kv == "shared_first" and r > 1
            flops += schedule.core * _visit(self.recurring, share, met[config.kv][r - 1], tokens, rereads)
        if (
            self.policy.rule in PEEKING
        ):  # after every recursion but the last, the coda on each token alone, and the head
            peek = schedule.coda * _visit(self.block, 1.0, 1.0, 1, rereads=False) + self.head.per_token
            flops += sum(active[:-1]) * peek
        read = self.head.per_token / (tokens if isinstance(config.head, ClassifierHeadConfig) else 1)
        return flops + schedule.num_groups * self.router.per_token + read

    def training(self, tokens: int) -> float:
        """Forward and backward FLOPs of a token among `tokens`."""
        config, schedule, router = self.config, self.config.schedule.resolved, ROUTERS[self.config.depth.kind]
        groups, trained = schedule.num_groups, sum(self.active)
        exits = self.policy.recursions if router.reads_every_state and not self.policy.is_forced else 1
        flops = 3 * (self.forward(tokens) + (exits - 1) * self.head.per_token)
        taken = len(self.active) if self.is_known else None
        drawn = router.train_visits(taken, schedule.recursions, **config.depth.options(schedule.recursions))
        if drawn is not None:
            # Recursions without a gradient have no backward pass.
            trained = drawn[1]
            one = schedule.core * _visit(self.recurring, 1.0, 1.0, tokens, rereads=config.kv == "shared_first")
            one += groups * (_injection(config, 1).per_token - _injection(config, 0).per_token)
            flops += (drawn[0] + 2 * drawn[1] - 3 * len(self.active)) * one
        visits = schedule.prelude + schedule.coda + schedule.core * trained
        return flops - visits * self.block.per_token_stopped - groups * self.router.per_token_stopped

    def decoding(self, context: int) -> float:
        """FLOPs of a token that is decoded after `context` others."""
        schedule = self.config.schedule.resolved
        visits = schedule.prelude + schedule.coda + schedule.core * sum(self.active)
        return self.forward(context) + visits * self.block.per_token_alone


def _injection(config: ModelConfig, visits: float) -> Costs:
    return injection_costs(config.d_model, config.input_injection, visits)


def block_costs(config: ModelConfig, step_shares: tuple[float, ...] | None = None) -> Costs:
    """Costs of one block: attention, mixer and their norms. `step_shares` as in `count`."""
    mixer, d_model = config.mixer, config.d_model
    shape = attention_shape(config)
    own = attention_costs(d_model, shape)
    norms = [d_model] * (2 if config.norm_placement == "pre" else 4)
    norms += [shape.head_dim] * (2 if config.attention.qk_norm else 0)
    for channels in norms:
        own += norm_costs(config.norm, channels)
    if config.attention.qk_norm:
        own += Costs(kept=norm_costs(config.norm, shape.head_dim).kept * (shape.heads + shape.kv_heads - 2))
    if isinstance(mixer, FeedForwardConfig):
        return own + feed_forward_costs(mixer.kind, d_model, mixer.hidden(d_model))
    experts, top_k = mixer.router.experts, mixer.router.top_k
    options = mixer.options(d_model)
    if (router := mixer.steps_router) is not None:
        kind, steps, of_router = ROUTERS[router.kind], mixer.num_steps, router.options(mixer.num_steps)
        options["step_shares"] = step_shares or kind.shares(steps, **of_router)
        asked = kind.costs(d_model, steps, shares=options["step_shares"], **of_router)
        per_token, stopped = top_k * asked.per_token, top_k * asked.per_token_stopped
        own += Costs(asked.parameters, per_token, per_token_stopped=stopped, kept=asked.kept * top_k)
        options["always"] = router.kind == "fixed"
    return own + EXPERTS[mixer.kind].costs(d_model, experts, top_k, shape, **options)


def lora_costs(config: ModelConfig) -> Costs:
    """What low-rank changes add to a core block: parameters of all recursions, FLOPs of a visit that makes keys."""
    if config.lora is None:
        return Costs()

    def weights(maps: dict[str, tuple[int, int]]) -> int:
        assert config.lora is not None
        return sum(config.lora.rank * (inputs + outputs) for inputs, outputs in maps.values())

    maps = lora_maps(config, 1)
    keys = {name: maps[name] for name in "kv"}
    parameters = sum(weights(lora_maps(config, r)) for r in range(1, config.schedule.recursions + 1))
    return Costs(parameters, 2.0 * weights(maps), per_token_keys=2.0 * weights(keys))


def head_costs(config: ModelConfig) -> Costs:
    """Costs of the head, its weights left out where they are the embedding's; a classifier runs once a sequence."""
    if isinstance(config.head, ClassifierHeadConfig):
        return classifier_costs(config.d_model, config.head.classes)
    own = linear_costs(config.d_model, config.vocab_size)
    return replace(own, parameters=0) if config.tie_embeddings else own


def router_costs(config: ModelConfig, active: tuple[float, ...], depth: Depth = None) -> Costs:
    """Costs of one group's depth router, where `active` are the shares of the tokens at each recursion."""
    recursions, policy = config.schedule.recursions, _policy(config, depth)
    taken = policy.recursions if policy.is_forced else None
    options = config.depth.options(recursions)
    return ROUTERS[config.depth.kind].costs(config.d_model, recursions, taken, shares=active, **options)


def expected_shares(config: ModelConfig, seq_len: int, depth: Depth = None) -> tuple[float, ...]:
    """Share of the tokens that takes recursion r = 1..R, in sequences of `seq_len`."""
    kind, recursions = ROUTERS[config.depth.kind], config.schedule.recursions
    policy = _policy(config, depth)
    if not policy.is_forced:
        return kind.shares(recursions, **config.depth.options(recursions))
    return tuple(_reach(policy, seq_len, r) for r in range(1, policy.recursions + 1))


def _policy(config: ModelConfig, depth: Depth) -> DepthPolicy:
    recursions, exit_rules = config.schedule.recursions, ROUTERS[config.depth.kind].exit_rules
    return parse_depth(depth, recursions, config.max_seq_len, takes_any_depth(config), exit_rules)


def _reached(config: ModelConfig, active: tuple[float, ...]) -> tuple[float, ...]:
    """Share of the tokens that have taken a recursion r' <= r, for each r.

    Where active sets are not nested, and not all tokens take recursion 1, as if each recursion chose by itself.
    """
    if getattr(config.depth, "hierarchical", True):
        return tuple(accumulate(active, max))
    missed = accumulate((1 - share for share in active), mul)
    return tuple(1 - share for share in missed)


def _reach(policy: DepthPolicy, seq_len: int, r: int) -> float:
    """Share of the positions 0..seq_len - 1 whose depth is r or more."""
    if policy.kind == "uniform":
        return 1.0
    import torch

    positions = torch.arange(seq_len)
    return float((policy.depths(positions, torch.zeros_like(positions)) >= r).double().mean())


def _visit(block: Costs, share: float, key_share: float, tokens: int, rereads: bool) -> float:
    """Forward FLOPs per token of the sequence, when `share` of the tokens visit and queries meet `key_share`."""
    flops = block.per_token - (block.per_token_keys if rereads else 0.0)
    for attention in block.attention:
        present = key_share if attention.rereads else share
        flops += attention.per_pair * attention.share * present * tokens
    return share * flops


def _cached(block: Costs, share: float, rereads: bool) -> float:
    """Values cached per token of the sequence."""
    return share * sum(a.key_values for a in block.attention if not (rereads and a.rereads))
