"""Closed-form costs of a part: parameters, FLOPs per visiting token, cached values. Arithmetic only.

A multiply-add is two FLOPs. Attention is counted over the full square of queries and keys, as torch's FLOP counter
counts the math attention backend.
"""

from dataclasses import dataclass


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

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(
            self.parameters + other.parameters,
            self.per_token + other.per_token,
            self.attention + other.attention,
            self.per_token_keys + other.per_token_keys,
            self.per_token_stopped + other.per_token_stopped,
            self.per_token_alone + other.per_token_alone,
        )


def linear_costs(inputs: int, outputs: int) -> Costs:
    """A linear map without bias."""
    return Costs(inputs * outputs, 2.0 * inputs * outputs)
