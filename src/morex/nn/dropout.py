"""Dropout (Srivastava et al. 2014)."""

import torch.nn.functional as F
from torch import Tensor


def dropped(x: Tensor, share: float, training: bool) -> Tensor:
    """x with this share of its values at zero and the others divided by 1 - share; x itself outside of training.

    Draws from torch's generator, in the order of the calls, and not at all where nothing is dropped.
    """
    return F.dropout(x, share) if training and share else x
