"""The table of initial weights.

| parameter | `scaled` | `plain` |
|---|---|---|
| norm weights | 1, or 0 where 1 + weight is what multiplies | the same |
| biases, but those of depth routers, which know their own | 0 | 0 |
| `b` of low-rank changes, which therefore begin as no change | 0 | 0 |
| residual projections (`o`, `down`) | N(0, std / sqrt(2 L)) | N(0, std) |
| every other matrix, embeddings, routers | N(0, std) | N(0, std) |

L is the unrolled depth: each token adds 2 L branches to the residual stream (Radford et al. 2019, section 2.3).
"""

import math

import torch
from torch import nn

from morex.depth.router import DepthRouter
from morex.nn.norm import RMSNormPlusOne

RESIDUAL = ("o", "down")


@torch.no_grad()
def initialise(model: nn.Module, std: float, kind: str, unrolled_depth: int, seed: int) -> None:
    """Draws all parameters on the CPU from one generator, in the order of their names' first appearance."""
    generator, owners = torch.Generator().manual_seed(seed), dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner, role = ["", *name.split(".")][-2:]
        role = owner if role == "weight" and owner != "router" and not owner.isdigit() else role
        if role.startswith("norm"):
            parameter.fill_(0.0 if isinstance(owners[name.rpartition(".")[0]], RMSNormPlusOne) else 1.0)
            continue
        if role == "b":
            parameter.zero_()
            continue
        if role == "bias":
            if not isinstance(owners[name.rpartition(".")[0]], DepthRouter):
                parameter.zero_()
            continue
        scale = std / math.sqrt(2 * unrolled_depth) if kind == "scaled" and role in RESIDUAL else std
        drawn = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, scale, generator=generator)
        parameter.copy_(drawn)
