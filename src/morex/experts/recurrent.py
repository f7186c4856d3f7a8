"""Huginn's recurrent block at the size of an expert (Geiping et al. 2025, arXiv 2502.05171, section 3.2).

A latent state s meets the input x again at every step, with weights shared over the S steps:

    s_0 = 0, in training N(0, state_std^2)
    S times:  s <- adapter [s; x];  s <- norm(s + attention(norm(s)));  s <- norm(s + swiglu(norm(s)))

The input's half of the adapter is the same at every step and is computed once.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from morex.experts.attention import ExpertRows, attend_alone, attend_routed, cache_slots, fast_plan
from morex.experts.dispatch import expert_linear, expert_rows
from morex.experts.moe import expert_gated
from morex.nn import fast
from morex.nn.attention import AttentionShape, kept_heads
from morex.nn.costs import AttentionCosts, Costs, Kept, Rows, linear_costs
from morex.nn.mixers import ExpertViews, feed_forward_costs
from morex.nn.moves import Watch
from morex.nn.noise import noise_like
from morex.nn.norm import rms_norm
from morex.nn.packing import Packing

NORMS = 4


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


def initial_state(x: Tensor, packing: Packing, std: float, training: bool) -> Tensor:
    """s_0 of the packing's tokens [N, D], whose input is x [N, D]."""
    return noise_like(x, packing).mul_(std) if training and std else torch.zeros_like(x)


def recur(
    s: Tensor,
    x: Tensor,
    w: dict[str, Tensor],
    steps: int,
    shape: AttentionShape,
    eps: float,
    rows: ExpertRows,
    views: ExpertViews | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """S steps of each block on its own rows.

    Args:
        s, x: state and input [M, D], block by block.
        w: weights of the blocks, stacked [E, ...]; without queries and keys a token sees only itself.
        steps: S.
        shape: of the attention.
        eps: of the norms.
        rows: what stands in the rows of each block.
        views: the cache slots of the blocks.
        watch: sees the state after each step, for a trace.

    Returns:
        The last state [M, D].
    """
    plan = fast_plan(x, w, shape, eps, rows, together=True) if views is None and watch is None else None
    if plan is not None:
        return fast.recurrent_experts(s, x, w, plan, steps)
    counts = rows.counts
    attention = attend_routed(w, shape, cache_slots(views, len(counts), steps)) if "q" in w else attend_alone(w, shape)
    of_state, of_input = w["adapter"].chunk(2, dim=-1)
    norm1, norm2, norm3, norm4 = (expert_rows(w[f"norm{i + 1}"], counts) for i in range(NORMS))
    injected = expert_linear(x, of_input, counts)
    for step in range(steps):
        s = expert_linear(s, of_state, counts) + injected
        s = rms_norm(s + attention(rms_norm(s, norm1, eps), rows, step), norm2, eps)
        hidden = expert_gated("swiglu", rms_norm(s, norm3, eps), w["gate"], w["up"], w["down"], counts)
        s = rms_norm(s + hidden, norm4, eps)
        if watch is not None:
            watch.see(s)
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

    def kept(rows: Rows) -> Kept:
        return kept_heads(shape, rows if experts == 1 else replace(rows, are_even=False)) * visits

    pairs = AttentionCosts(4.0 * queries * visits, top_k / experts, 2.0 * keys * visits, rereads=False, kept=kept)
    parameters = experts * (once + each + NORMS * d_model)
    joint = Kept(fast_fp32=4.0 * d_model * (queries + 2 * keys if routed else d_model))
    return Costs(
        parameters,
        2.0 * (visits * each + top_k * once),
        (pairs,) if routed else (),
        per_token_stopped=2.0 * top_k * d_model * d_model,  # no gradient goes into the first state
        kept=_kept(d_model, d_ff, routed, steps, experts) * top_k,
        kept_weights=linear_costs(1, each + once).cast_weights * (experts * steps) + joint * experts,
    )


def _kept(d_model: int, d_ff: int, routed: bool, steps: int, experts: int) -> Kept:
    """What a token keeps in one block, attention's heads left out: four norms and the net a step, its input once.

    The second norm's output is the third one's input, and in bf16 what the first two norms take is bf16 itself. With
    several experts norms have a row of weights for each token.
    """
    own = 4.0 * d_model
    maps = (4 if routed else 2) * 2.0 * d_model
    step = Kept(11 * own + 16, 6 * own + 16 + maps, 4 * own + 16, 5 * own + 16)
    step += feed_forward_costs("swiglu", d_model, d_ff).kept
    rows = NORMS * own if experts > 1 else 0.0
    return step * steps + Kept(2 * own + rows, 2 * own + rows, 3 * own, 2 * own + rows)
