"""Closed-form costs of a part: parameters, FLOPs per visiting token, cached values, kept bytes. Arithmetic only.

A multiply-add is two FLOPs. Attention is counted over the full square of queries and keys, as torch's FLOP counter
counts the math attention backend.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward pass keeps for its backward pass, weights apart, where weights are fp32.

    What autocast casts to bf16 is kept as it was cast, once for each map that takes it. The paths of `morex.nn.fast`
    keep other things than the plain ones.
    """

    fp32: float = 0.0
    bf16: float = 0.0
    """Under autocast."""
    fast_fp32: float = 0.0
    """Where fast paths run: on a CPU."""
    fast_bf16: float = 0.0

    @classmethod
    def alike(cls, fp32: float, bf16: float | None = None) -> "Kept":
        """Of a part without a fast path; the same in both formats unless `bf16` is given."""
        narrow = fp32 if bf16 is None else bf16
        return cls(fp32, narrow, fp32, narrow)

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(
            self.fp32 + other.fp32,
            self.bf16 + other.bf16,
            self.fast_fp32 + other.fast_fp32,
            self.fast_bf16 + other.fast_bf16,
        )

    def __mul__(self, factor: float) -> "Kept":
        return Kept(self.fp32 * factor, self.bf16 * factor, self.fast_fp32 * factor, self.fast_bf16 * factor)


@dataclass(frozen=True)
class Rows:
    """How tokens that attend to one another stand side by side."""

    width: float
    """Tokens of a row."""
    are_even: bool = True
    """Whether all rows have as many, so that nothing is padded."""
    is_plain: bool = False
    """Whether something keeps the fast path away: a mask, keys of another visit, a norm or dropout inside."""
    makes_keys: bool = True
    """Whether the visit makes keys and values of its own."""
    masked: float = 0.0
    """Keys that a mask speaks of, for each query; 0 where causality is all."""


def nothing_kept(rows: Rows) -> Kept:
    """`AttentionCosts.kept` where there is nothing to keep."""
    return Kept()


@dataclass(frozen=True)
class AttentionCosts:
    """One attention over the tokens that take part in it."""

    per_pair: float
    """FLOPs per pair of query and key, over all heads and all visits of a token."""
    share: float = 1.0
    """Share of the tokens present that a query meets (K / E for attention inside an expert)."""
    key_values: float = 0.0
    """Values cached per token."""
    rereads: bool = True
    """Whether a later recursion may read keys of earlier ones (`kv: shared_first`, `refresh`)."""
    kept: Callable[[Rows], Kept] = nothing_kept
    """Of a visiting token, from the rows that attention runs over; over all its visits inside the part."""


@dataclass(frozen=True)
class Costs:
    """Costs of a part; `a + b` is a then b."""

    parameters: int = 0
    per_token: float = 0.0
    """FLOPs of one token's forward visit, attention over pairs left out."""
    attention: tuple[AttentionCosts, ...] = ()
    per_token_keys: float = 0.0
    """Of `per_token`, what makes the keys and values that a rereading recursion does not make again."""
    per_token_stopped: float = 0.0
    """Of `per_token`, maps whose input carries no gradient: the backward pass makes one product and not two."""
    per_token_alone: float = 0.0
    """FLOPs beside `per_token` of a token that is decoded alone, where work is shared by the tokens of a batch."""
    maps: float = 0.0
    """Values that linear maps outside experts make of one token's visit."""
    per_token_maps: float = 0.0
    """Of `per_token`, what these maps take."""
    kept: Kept = Kept()
    """Of one token's visit, attention left out."""
    kept_weights: Kept = Kept()
    """Of a visit, however many tokens there are: weights that are cast or joined for it."""
    cast_weights: Kept = Kept()
    """Of a pass, however many visits there are: weights that autocast casts once."""

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(
            self.parameters + other.parameters,
            self.per_token + other.per_token,
            self.attention + other.attention,
            self.per_token_keys + other.per_token_keys,
            self.per_token_stopped + other.per_token_stopped,
            self.per_token_alone + other.per_token_alone,
            self.maps + other.maps,
            self.per_token_maps + other.per_token_maps,
            self.kept + other.kept,
            self.kept_weights + other.kept_weights,
            self.cast_weights + other.cast_weights,
        )


def linear_costs(inputs: int, outputs: int) -> Costs:
    """A linear map without bias."""
    weights = inputs * outputs
    flops = 2.0 * weights
    return Costs(weights, flops, maps=outputs, per_token_maps=flops, cast_weights=Kept.alike(0.0, 2.0 * weights))
