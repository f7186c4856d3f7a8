"""Rotary position embedding, rotate-half convention as in Hugging Face's Llama: pairs are channels (i, i + dim / 2)."""

import torch
from torch import Tensor


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair of channels by its angle (Su et al. 2021, eq. 34).

    Args:
        x: queries or keys [N, H, dim].
        table: cosines and sines [N, dim / 2] of the tokens' positions.

    Returns:
        [N, H, dim] in the dtype of x.
    """
    cos, sin = table[0].unsqueeze(1), table[1].unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
