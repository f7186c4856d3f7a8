"""A few tokens, each of which sees only itself, through their recursive experts; without a backward pass.

With so few rows hardly any time goes into arithmetic and most of it into the number of calls: one kernel, or for a
single token without kernels, products of vectors, with the weights where they stand.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from morex.nn.fast.native import INTEGER, MULTIPLIED, POINTER, may_run, run_kernel
from morex.nn.fast.plan import Weights

ORDER = "step_embedding", "norm_attention", "v", "o", "norm_mixer", "gate", "up", "down", "norm_out"
MOST_BYTES = 2**20
"""Of one expert, where tokens that share an expert read its weights from a cache, each for itself."""
FEW_TOKENS = 16


def takes_tokens(x: Tensor, stacks: Weights, top_k: int) -> bool:
    """Whether `few_tokens` may take x [N, D], and is faster than rows by expert."""
    gate, tokens, weights = stacks["gate"], x.shape[0], stacks.values()
    if x.dtype not in MULTIPLIED or gate.dtype != x.dtype or tokens == 0:
        return False
    if tokens * top_k > gate.shape[0]:
        own = sum(weight.numel() for weight in weights) * x.element_size() // gate.shape[0]
        if tokens > FEW_TOKENS or own > MOST_BYTES:
            return False
    return may_run(x, *weights) and all(weight.is_contiguous() for weight in weights)


def few_tokens(x: Tensor, chosen: Tensor, weights: Tensor, stacks: Weights, eps: float, dim: int) -> Tensor:
    """What `morex.experts.recursive` does behind its router, for tokens each of which sees only itself.

    Args:
        x: [N, D].
        chosen: experts of each token [N, K].
        weights: of these experts [N, K].
        stacks, eps, dim: as for `single_token`.

    Returns:
        The branch [N, D].
    """
    x, chosen, shares = x.contiguous(), chosen.contiguous(), weights.float().contiguous()
    y, (loops, channels) = torch.empty_like(x), stacks["step_embedding"].shape[1:]
    values, queries, hidden = stacks["v"].shape[1], stacks["o"].shape[2], stacks["gate"].shape[1]
    pointers = (POINTER * len(ORDER))(*[stacks[name].data_ptr() if name in stacks else None for name in ORDER])
    sizes = (INTEGER * 8)(*chosen.shape, channels, values, queries, hidden, dim, loops)
    ends = chosen.data_ptr(), shares.data_ptr(), pointers, sizes, eps
    run_kernel("experts", x.dtype, x.data_ptr(), y.data_ptr(), *ends)
    return y


def single_token(x: Tensor, chosen: list[int], weights: list[float], stacks: Weights, eps: float, dim: int) -> Tensor:
    """What `morex.experts.recursive` does behind its router, for one token that sees only itself.

    Args:
        x: [1, D].
        chosen: experts of the token.
        weights: of these experts.
        stacks: weights of all experts by name, stacked [E, ...].
        eps: of the norms.
        dim: width of a head.

    Returns:
        The branch [1, D].
    """
    total = torch.zeros_like(x)
    for expert, share in zip(chosen, weights, strict=True):
        own = {name: stack[expert] for name, stack in stacks.items()}
        z = _loop(x[0], own, eps, dim)
        y = _normed(z, own["norm_out"], eps) if "norm_out" in own else z.sub_(x[0])
        total.add_(y, alpha=share)
    return total


def _loop(x: Tensor, own: Weights, eps: float, dim: int) -> Tensor:
    """The state [D] after all steps of one expert."""
    z = x
    for step in own["step_embedding"].unbind(0):
        z = z + step
        values = torch.mv(own["v"], z * own["norm_attention"])
        # The map is linear: it takes the norm's factor at its end.
        z.addmv_(own["o"], _for_query_heads(values, own["o"].shape[1], dim), alpha=_inverse_rms(z, eps))
        h = _normed(z, own["norm_mixer"], eps)
        hidden = F.silu(torch.mv(own["gate"], h)).mul_(torch.mv(own["up"], h))
        z.addmv_(own["down"], hidden)
    return z


def _for_query_heads(values: Tensor, queries: int, dim: int) -> Tensor:
    """Repeats each value head [KV * dim] for its group of query heads [H * dim]."""
    if values.shape[0] == queries:
        return values
    heads = values.view(-1, 1, dim)
    return heads.expand(-1, queries // values.shape[0], -1).reshape(-1)


def _normed(z: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.mul(z, weight).mul_(_inverse_rms(z, eps))


def _inverse_rms(z: Tensor, eps: float) -> float:
    """1 / sqrt(mean(z^2) + eps), a number."""
    total: float = z.dot(z).item()
    return (total / z.shape[0] + eps) ** -0.5
