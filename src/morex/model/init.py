"""The table of initial weights.

| parameter | `scaled` | `plain` |
|---|---|---|
| norm weights | 1, or 0 where 1 + weight is what multiplies | the same |
| biases, but those of depth routers, which know their own | 0 | 0 |
| `b` of low-rank changes, which therefore begin as no change | 0 | 0 |
| residual projections (`o`, `down`) | N(0, std / sqrt(2 L)) | N(0, std) |
| every other matrix, embeddings, routers | N(0, std) | N(0, std) |

L is the unrolled depth: each token adds 2 L branches to the residual stream (Radford et al. 2019, section 2.3).

Where the width is `ratio` times the one that std is meant for, std is divided by sqrt(ratio) for `hidden` parameters
and by ratio for `output` ones (`morex.model.roles`): variances 1 / fan-in and 1 / fan-in^2 (Yang et al. 2022, arXiv
2203.03466, table 3).
"""

import math

import torch
from torch import nn

from morex.depth.router import DepthRouter
from morex.model.roles import roles
from morex.nn.norm import RMSNormPlusOne

RESIDUAL = ("o", "down")


@torch.no_grad()
def initialise(model: nn.Module, std: float, kind: str, unrolled_depth: int, seed: int, ratio: float = 1.0) -> None:
    """Draws all parameters on the CPU from one generator, in the order of their names' first appearance."""
    generator, owners = torch.Generator().manual_seed(seed), dict(model.named_modules())
    known, divisors = roles(model), {"hidden": math.sqrt(ratio), "output": ratio, "input": 1.0}
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
        scale /= divisors[known[name]]
        drawn = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, scale, generator=generator)
        parameter.copy_(drawn)
