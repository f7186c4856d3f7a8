"""Huginn's recurrent block at the size of an expert (Geiping et al. 2025, arXiv 2502.05171, section 3.2).

A latent state s meets the input x again at every step, with weights shared over the S steps:

    s_0 = 0, in training N(0, state_std^2)
    S times:  s <- adapter [s; x];  s <- norm(s + attention(norm(s)));  s <- norm(s + swiglu(norm(s)))

The input's half of the adapter is the same at every step and is computed once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from morex.experts.attention import attend_routed, for_query_heads
from morex.experts.dispatch import expert_linear, expert_rows
from morex.experts.moe import expert_gated
from morex.nn import fast
from morex.nn.attention import AttentionShape, KeyView, attend, has_fast_rows, turn
from morex.nn.costs import AttentionCosts, Costs
from morex.nn.norm import rms_norm
from morex.nn.packing import Packing

NORMS = 4


@dataclass(frozen=True, eq=False)
class Visitors:
    """The rows [M, D] that pass the E blocks of a layer, block by block."""

    counts: list[int]
    """Rows of each block."""
    packing: Packing
    """All of them; each block has rows of its own."""
    cached: Sequence[tuple[Packing, Callable[[int], KeyView | None]]] | None = None
    """Where a cache outlives the call: the tokens of each block and the slot of each of its steps."""


def recurrent_parameters(
    experts: int, d_model: int, shape: AttentionShape, d_ff: int, attention_scope: str
) -> dict[str, nn.Parameter]:
    """The weights of E blocks by name, stacked [E, ...]. `token` needs no queries and keys."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {"adapter": (d_model, 2 * d_model)}
    sizes |= {f"norm{i + 1}": (d_model,) for i in range(NORMS)}
    if attention_scope == "routed":
        sizes |= {"q": (queries, d_model), "k": (keys, d_model)}
    sizes |= {"v": (keys, d_model), "o": (d_model, queries)}
    sizes |= {"gate": (d_ff, d_model), "up": (d_ff, d_model), "down": (d_model, d_ff)}
    return {name: nn.Parameter(torch.empty(experts, *size)) for name, size in sizes.items()}


def initial_state(x: Tensor, std: float, training: bool) -> Tensor:
    """s_0 of each token [N, D]. Drawn in the order of the tokens, so that no later token changes an earlier one's."""
    return torch.randn_like(x) * std if training and std else torch.zeros_like(x)


def recur(
    s: Tensor, x: Tensor, w: Mapping[str, Tensor], steps: int, shape: AttentionShape, eps: float, visitors: Visitors
) -> Tensor:
    """S steps of each block on its own rows.

    Args:
        s, x: state and input [M, D].
        w: weights of the blocks, stacked [E, ...]; without `q` a token attends to itself only.
        steps: S.
        visitors: where the rows belong.

    Returns:
        The last state [M, D].
    """
    counts = visitors.counts
    of_state, of_input = w["adapter"].chunk(2, dim=-1)
    norm1, norm2, norm3, norm4 = (expert_rows(w[f"norm{i + 1}"], counts) for i in range(NORMS))
    injected = expert_linear(x, of_input, counts)
    attention = _attention(w, shape, visitors)
    for step in range(steps):
        s = expert_linear(s, of_state, counts) + injected
        s = rms_norm(s + attention(rms_norm(s, norm1, eps), step), norm2, eps)
        hidden = expert_gated("swiglu", rms_norm(s, norm3, eps), w["gate"], w["up"], w["down"], counts)
        s = rms_norm(s + hidden, norm4, eps)
    return s


def _attention(w: Mapping[str, Tensor], shape: AttentionShape, visitors: Visitors) -> Callable[[Tensor, int], Tensor]:
    """The blocks' attention as a function of rows [M, D] and step."""
    counts, packing, dim = visitors.counts, visitors.packing, shape.head_dim

    def alone(x: Tensor, step: int) -> Tensor:
        """Of each token to itself only: softmax over one key is 1, so it is W_o W_v."""
        return expert_linear(for_query_heads(expert_linear(x, w["v"], counts), 1, shape), w["o"], counts)

    def apart(x: Tensor, step: int) -> Tensor:
        """Block by block, each with its slot of the cache."""
        assert visitors.cached is not None
        outputs = []
        for e, (rows, (own, view)) in enumerate(zip(x.split(counts), visitors.cached, strict=True)):
            weights = {name: w[name][e] for name in "qkvo"}
            outputs.append(attend_routed(rows, weights, shape, own, view(step)) if rows.shape[0] else rows)
        return torch.cat(outputs)

    def together(x: Tensor, step: int) -> Tensor:
        q, k, v = (expert_linear(x, w[name], counts).view(x.shape[0], -1, dim) for name in "qkv")
        y = attend(turn(q, packing, shape.rope), turn(k, packing, shape.rope), v, packing, shape.scale)
        return expert_linear(y.flatten(1), w["o"], counts)

    if "q" not in w:
        return alone
    if visitors.cached is not None:
        return apart
    if shape.rope is None or not has_fast_rows(packing) or not fast.available(w["q"]):
        return together
    joint = fast.joint_weight(w["q"], w["k"], w["v"], dim, shape.scale)

    def in_frames(x: Tensor, step: int) -> Tensor:
        projected = expert_linear(x, joint, counts)
        frames = shape.frames(packing, shape.rope, torch.promote_types(projected.dtype, torch.float32))
        return expert_linear(fast.attend(projected, frames), w["o"], counts)

    return in_frames


def recurrent_costs(
    d_model: int,
    shape: AttentionShape,
    d_ff: int,
    attention_scope: str,
    steps: int,
    experts: int = 1,
    top_k: int = 1,
) -> Costs:
    """Closed-form costs of `experts` blocks and a token that passes `top_k` of them."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    routed = attention_scope == "routed"
    once = d_model * d_model
    each = d_model * d_model + d_model * (queries + keys) * (2 if routed else 1) + 3 * d_model * d_ff
    visits = top_k * steps
    pairs = AttentionCosts(4.0 * queries * visits, top_k / experts, 2.0 * keys * visits, rereads=False)
    parameters = experts * (once + each + NORMS * d_model)
    return Costs(
        parameters,
        2.0 * (visits * each + top_k * once),
        (pairs,) if routed else (),
        per_token_stopped=2.0 * top_k * d_model * d_model,  # no gradient goes into the first state
    )
