"""The input of a routed group, given again to each of its recursions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morex.nn.costs import Costs


class Injection(nn.Module):
    """How a recursion meets the group's input e again: `add` h + e, or `concat` adapter [h; e].

    The adapter is a linear map 2 D -> D (Geiping et al. 2025, arXiv 2502.05171, section 3.2), one for all recursions.
    Its half for e is the same at each of them and is computed once.
    """

    adapter: nn.Parameter | None

    def __init__(self, d_model: int, kind: str) -> None:
        super().__init__()
        adapter = nn.Parameter(torch.empty(d_model, 2 * d_model)) if kind == "concat" else None
        self.register_parameter("adapter", adapter)

    def prepare(self, e: Tensor) -> Tensor:
        """The group's input [N, D] -> what every recursion of a token adds [N, D]."""
        return e if self.adapter is None else F.linear(e, self.adapter.chunk(2, 1)[1])

    def forward(self, h: Tensor, prepared: Tensor) -> Tensor:
        """States [M, D] and the same tokens' rows of what was prepared [M, D] -> the recursion's input [M, D]."""
        if self.adapter is None:
            return h + prepared
        # Under autocast the product has half the precision, and what the core adds to must not.
        return (F.linear(h, self.adapter.chunk(2, 1)[0]) + prepared).to(h.dtype)


def injection_costs(d_model: int, kind: str, visits: float) -> Costs:
    """Closed-form costs of an injection in a group whose tokens take `visits` recursions on average."""
    if kind != "concat":
        return Costs()
    return Costs(2 * d_model * d_model, 2.0 * d_model * d_model * (1 + visits))
