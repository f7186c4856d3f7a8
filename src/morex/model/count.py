"""Parameters, FLOPs and KV bytes in closed form, from a config alone.

Every cost is a part's cost times the share of tokens that visit it: c_r for routers with capacities, balance for
token choice, all recursions for halting (an upper bound), or shares that were measured. FLOPs leave padding out; a
multiply-add is two; training is three forward passes (Kaplan et al. 2020, section 2.1). Attention is counted over the
full square, the causal half and what a window hides included.
"""

from dataclasses import dataclass, replace

from morex.config import ModelConfig
from morex.depth.policy import Depth, DepthPolicy, parse_depth
from morex.depth.routers import ROUTERS
from morex.experts.kinds import EXPERTS
from morex.model.heads import classifier_costs
from morex.model.lm import attention_shape, takes_any_depth
from morex.nn.attention import attention_costs
from morex.nn.costs import Costs, linear_costs
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
    bytes_per_value: int = 4,
) -> Count:
    """Counts a model without building it.

    Args:
        config: the model.
        seq_len: tokens of a training sequence.
        context: tokens in the cache when decoding; default `seq_len`.
        depth: depth at call time, as in the model's forward.
        shares: share of the tokens active at recursion r = 1..R, where it was measured.
        bytes_per_value: of a cached value; 4 for fp32, 2 for bf16.

    Raises:
        ValueError: `seq_len` or `context` is no number of tokens, or `depth` is none that the model can take.
    """
    if seq_len < 1 or (context is not None and context < 0):
        raise ValueError(f"seq_len {seq_len} must be 1 or more, and context {context} 0 or more")
    schedule = config.schedule.resolved
    active = shares or expected_shares(config, seq_len, depth)
    block, router = block_costs(config), router_costs(config, active, depth)
    groups = len(schedule.groups)
    embedding = config.vocab_size * config.d_model
    classifies = isinstance(config.head, ClassifierHeadConfig)
    head = head_costs(config)
    positions = config.max_seq_len * config.d_model * (config.attention.positions == "learned")
    steps = config.d_model * schedule.recursions * config.step_embedding
    last = norm_costs(config.norm, config.d_model).parameters
    unique = schedule.num_blocks * block.parameters + groups * (router.parameters + steps) + last

    def forward(tokens: int) -> float:
        """Forward FLOPs of a token among `tokens`."""
        flops = (schedule.prelude + schedule.coda) * _visit(block, 1.0, 1.0, tokens, rereads=False)
        for r, share in enumerate(active, start=1):
            rereads = config.kv == "shared_first" and r > 1
            flops += schedule.core * _visit(block, share, active[0] if rereads else share, tokens, rereads)
        return flops + groups * router.per_token + (head.per_token / tokens if classifies else head.per_token)

    visits = schedule.prelude + schedule.coda + schedule.core * sum(active)
    alone = visits * block.per_token_alone
    stopped = visits * block.per_token_stopped + groups * router.per_token_stopped
    values = (schedule.prelude + schedule.coda) * _cached(block, 1.0, rereads=False)
    for r, share in enumerate(active, start=1):
        values += schedule.core * _cached(block, share, config.kv == "shared_first" and r > 1)
    return Count(
        parameters=unique + embedding + head.parameters + positions,
        unique_non_embedding=unique,
        unrolled_depth=schedule.unrolled_depth,
        forward_flops_per_token=forward(seq_len),
        train_flops_per_token=3 * forward(seq_len) - stopped,
        decode_flops_per_token=0.0 if classifies else forward(seq_len if context is None else context) + alone,
        kv_bytes_per_token=0.0 if classifies else values * bytes_per_value,
    )


def block_costs(config: ModelConfig) -> Costs:
    """Costs of one block: attention, mixer and their norms."""
    mixer, d_model = config.mixer, config.d_model
    shape = attention_shape(config)
    own = attention_costs(d_model, shape)
    norms = [d_model] * (2 if config.norm_placement == "pre" else 4)
    norms += [shape.head_dim] * (2 if config.attention.qk_norm else 0)
    for channels in norms:
        own += norm_costs(config.norm, channels)
    if isinstance(mixer, FeedForwardConfig):
        return own + feed_forward_costs(mixer.kind, d_model, mixer.hidden(d_model))
    experts, top_k = mixer.router.experts, mixer.router.top_k
    return own + EXPERTS[mixer.kind].costs(d_model, experts, top_k, shape, **mixer.options(d_model))


def head_costs(config: ModelConfig) -> Costs:
    """Costs of the head, its weights left out where they are the embedding's; a classifier runs once a sequence."""
    if isinstance(config.head, ClassifierHeadConfig):
        return classifier_costs(config.d_model, config.head.classes)
    own = linear_costs(config.d_model, config.vocab_size)
    return replace(own, parameters=0) if config.tie_embeddings else own


def router_costs(config: ModelConfig, active: tuple[float, ...], depth: Depth = None) -> Costs:
    """Costs of one group's depth router, where `active` are the shares of the tokens at each recursion."""
    recursions = config.schedule.recursions
    policy = parse_depth(depth, recursions, config.max_seq_len, takes_any_depth(config))
    taken = policy.recursions if policy.is_forced else None
    options = config.depth.options(recursions)
    return ROUTERS[config.depth.kind].costs(config.d_model, recursions, taken, shares=active, **options)


def expected_shares(config: ModelConfig, seq_len: int, depth: Depth = None) -> tuple[float, ...]:
    """Share of the tokens that takes recursion r = 1..R, in sequences of `seq_len`."""
    kind, recursions = ROUTERS[config.depth.kind], config.schedule.recursions
    policy = parse_depth(depth, recursions, config.max_seq_len, takes_any_depth(config))
    if not policy.is_forced:
        return kind.shares(recursions, **config.depth.options(recursions))
    return tuple(_reach(policy, seq_len, r) for r in range(1, policy.recursions + 1))


def _reach(policy: DepthPolicy, seq_len: int, r: int) -> float:
    """Share of the positions 0..seq_len - 1 whose depth is r or more."""
    if policy.kind == "uniform":
        return 1.0
    import torch

    return float((policy.depths(torch.arange(seq_len)) >= r).double().mean())


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
