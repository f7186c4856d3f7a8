"""Huginn's recurrent block at the size of an expert (Geiping et al. 2025, arXiv 2502.05171, section 3.2).

A latent state s meets the input x again at every step, with weights shared over the S steps:

    s_0 = 0, in training N(0, state_std^2)
    S times:  s <- adapter [s; x];  s <- norm(s + attention(norm(s)));  s <- norm(s + swiglu(norm(s)))

The input's half of the adapter is the same at every step and is computed once.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morex.experts.attention import attend_alone, attend_routed
from morex.nn.attention import AttentionShape, KeyView
from morex.nn.costs import AttentionCosts, Costs
from morex.nn.mixers import swiglu
from morex.nn.norm import rms_norm
from morex.nn.packing import Packing

NORMS = 4


def recurrent_parameters(
    d_model: int, shape: AttentionShape, d_ff: int, attention_scope: str, stack: tuple[int, ...] = ()
) -> dict[str, nn.Parameter]:
    """The weights of a block by name, or with `stack` (E,) those of E blocks. `token` needs no queries and keys."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {"adapter": (d_model, 2 * d_model)}
    sizes |= {f"norm{i + 1}": (d_model,) for i in range(NORMS)}
    if attention_scope == "routed":
        sizes |= {"q": (queries, d_model), "k": (keys, d_model)}
    sizes |= {"v": (keys, d_model), "o": (d_model, queries)}
    sizes |= {"gate": (d_ff, d_model), "up": (d_ff, d_model), "down": (d_model, d_ff)}
    return {name: nn.Parameter(torch.empty(*stack, *size)) for name, size in sizes.items()}


def initial_state(x: Tensor, std: float, training: bool) -> Tensor:
    """s_0 of each token [N, D]. Drawn in the order of the tokens, so that no later token changes an earlier one's."""
    return torch.randn_like(x) * std if training and std else torch.zeros_like(x)


def recur(
    s: Tensor,
    x: Tensor,
    w: Mapping[str, Tensor],
    steps: int,
    shape: AttentionShape,
    eps: float,
    packing: Packing,
    view: Callable[[int], KeyView | None] | None,
) -> Tensor:
    """S steps of one block.

    Args:
        s, x: state and input [M, D].
        w: weights of the block; without `q` a token attends to itself only.
        steps: S.
        packing: the M tokens.
        view: the cache slot of a step; None without a cache.

    Returns:
        The last state [M, D].
    """
    of_state, of_input = w["adapter"].chunk(2, dim=-1)
    injected = F.linear(x, of_input)
    for step in range(steps):
        s = F.linear(s, of_state) + injected
        inner = rms_norm(s, w["norm1"], eps)
        if "q" in w:
            seen = attend_routed(inner, w, shape, packing, None if view is None else view(step))
        else:
            seen = attend_alone(inner, w, shape)
        s = rms_norm(s + seen, w["norm2"], eps)
        s = rms_norm(s + swiglu(rms_norm(s, w["norm3"], eps), w["gate"], w["up"], w["down"]), w["norm4"], eps)
    return s


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
