"""What the hand-written loops of experts have in common: where rows stand, and the map in front of attention."""

from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from morex.nn.fast.causal import joint_weight, joint_weight_backward
from morex.nn.fast.frame import Frames

Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Plan:
    """What a call needs beside tensors with gradients. Rows stand expert by expert."""

    counts: list[int]
    """Rows of each expert."""
    eps: float
    dim: int
    """Width of a head."""
    scale: float
    frames: list[Frames | None] | None
    """Frames of each expert's tokens, or one for those of all; None where attention sees only the token itself."""
    names: tuple[str, ...]
    """Names of the stacked weights, in their order."""
    keeps: bool
    """Whether a backward pass may follow."""

    @property
    def visited(self) -> list[tuple[int, slice]]:
        """Experts that somebody visits, and their rows."""
        ends = list(accumulate(self.counts))
        return [(e, slice(end - n, end)) for e, (n, end) in enumerate(zip(self.counts, ends, strict=True)) if n]


def attention_map(own: Weights, plan: Plan) -> Tensor:
    """What normed rows are multiplied by: the joint weight of queries, keys and values, or W_o W_v for a lone token."""
    if plan.frames is None:
        return own["o"] @ _shared_values(own, plan.dim)
    return joint_weight(own["q"], own["k"], own["v"], plan.dim, plan.scale)


def attention_map_backward(own: Weights, grad: Tensor, plan: Plan) -> Weights:
    """From the gradient of `attention_map` to those of its weights."""
    if plan.frames is not None:
        queries, keys = own["q"].shape[1], own["k"].shape[1]
        return dict(zip("qkv", joint_weight_backward(grad, queries, keys, plan.dim, plan.scale), strict=True))
    d_values = own["o"].transpose(1, 2) @ grad
    experts, keys, d_model = own["v"].shape
    d_v = d_values.view(experts, keys // plan.dim, -1, plan.dim, d_model).sum(2).view(experts, keys, d_model)
    return {"o": grad @ _shared_values(own, plan.dim).transpose(1, 2), "v": d_v}


def _shared_values(own: Weights, dim: int) -> Tensor:
    """Value weights of every query head [E, H * dim, D]: heads of one group read the same value head."""
    values, heads = own["v"], own["o"].shape[2] // dim
    values = values.view(values.shape[0], -1, dim, values.shape[2])
    return values.repeat_interleave(heads // values.shape[1], dim=1).flatten(1, 2)
