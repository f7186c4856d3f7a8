"""Attention of a block."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from morex.sections.base import Section, divisors


class RopeScalingConfig(Section):
    """Longer rotary periods for sequences longer than a model was trained on, as in Llama 3.

    Periods up to original_max_seq_len / high_freq_factor stay, those from original_max_seq_len / low_freq_factor on are
    `factor` times as long, and those between them change smoothly.
    """

    kind: Literal["llama3"] = "llama3"
    factor: Annotated[float, Field(ge=1)] = 8.0
    """How many times as long the long periods become."""
    low_freq_factor: PositiveFloat = 1.0
    """Turns within the original length up to which a period counts as long."""
    high_freq_factor: PositiveFloat = 4.0
    """Turns within the original length from which on a period counts as short."""
    original_max_seq_len: PositiveInt = 8192
    """Longest sequence before the scaling."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} must be below high_freq_factor {self.high_freq_factor}"
            )
        return self


class AttentionConfig(Section):
    """Causal attention of a block, with grouped key/value heads."""

    heads: PositiveInt = 4
    """Query heads H."""
    kv_heads: PositiveInt | None = None
    """Key/value heads; default: as many as query heads."""
    head_dim: PositiveInt | None = None
    """Width of a head; default: d_model / heads."""
    scale: PositiveFloat | None = None
    """Factor on the scores; default: 1 / sqrt(head_dim)."""
    positions: Literal["rope", "learned", "none"] = "rope"
    """`rope` turns queries and keys; `learned` adds a vector per position to the token embeddings, for max_seq_len
    positions; with `none` the order of tokens is known from causality alone."""
    rope_base: PositiveFloat = 10_000.0
    """Base of the rotary position embedding (rotate-half convention)."""
    rope_scaling: RopeScalingConfig | None = None
    """Stretches the rotary periods for longer sequences; default: not at all."""
    window: PositiveInt | None = None
    """Keys that a query of a local step sees, its own included; default: no step is local."""
    global_every: Annotated[int, Field(ge=2)] | None = None
    """With n, steps n, 2n, 3n ... of the unrolled depth see all keys; default: with a window, every step is local."""
    local_rope_base: PositiveFloat | None = None
    """Base of the rotary position embedding in local steps, without rope_scaling; default: they turn as all others."""
    bias: bool = False
    """Biases on queries, keys and values."""
    output_bias: bool = False
    """A bias on the output projection."""
    qk_norm: bool = False
    """A norm on each head of queries and keys, before rotation; its weight is shared by the heads."""

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @model_validator(mode="after")
    def _grouping(self) -> Self:
        if self.heads % self.num_kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}; use {divisors(self.heads)}")
        if self.positions == "rope" and self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary positions turn pairs of channels")
        if self.positions != "rope" and self.rope_scaling is not None:
            raise ValueError(
                f"rope_scaling stretches rotary positions, and positions is {self.positions!r}; use positions "
                "'rope' or leave rope_scaling out"
            )
        return self

    @model_validator(mode="after")
    def _local_steps(self) -> Self:
        for option in ("global_every", "local_rope_base"):
            if self.window is None and getattr(self, option) is not None:
                raise ValueError(f"{option} goes with local steps, and there are none; give window, or leave it out")
        if self.positions != "rope" and self.local_rope_base is not None:
            raise ValueError(
                f"local_rope_base is for rotary positions, and positions is {self.positions!r}; use positions "
                "'rope' or leave local_rope_base out"
            )
        return self

    def options(self, d_model: int) -> dict[str, Any]:
        """Sizes of an attention in a model of width `d_model`, defaults filled in; positions stand apart."""
        dim = self.head_dim or d_model // self.heads
        return {
            "heads": self.heads,
            "kv_heads": self.num_kv_heads,
            "head_dim": dim,
            "scale": self.scale or dim**-0.5,
            "bias": self.bias,
            "output_bias": self.output_bias,
        }
