"""One token through its recursive experts without a backward pass: vectors, and weights where they stand.

With a single row no time goes into arithmetic, all of it into the number of calls.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from morex.nn.fast.plan import Weights


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
