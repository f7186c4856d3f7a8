"""The linear map."""

import torch.nn.functional as F
from torch import Tensor, nn

from morex.nn import fast


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [N, D] and a weight [O, D] -> x W^T, plus a bias [O] where there is one."""
    if fast.takes_rows(x, weight):
        y = fast.few_rows(x, weight)
        return y if bias is None else y.add_(bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """A linear map that decodes fast: `linear` with weights of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
