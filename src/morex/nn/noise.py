"""Random numbers of tokens, the same wherever a row of the batch is computed."""

import torch
from torch import Tensor

from morex.nn.packing import Packing

KEYS = 2**31


def noise_like(x: Tensor, packing: Packing) -> Tensor:
    """Standard normal numbers for the packing's tokens, shaped as x [N, D].

    A call takes one number from torch's generator, and what a row gets is a function of this number and of the row's
    own among the rows of all ranks. So ranks whose generators agree draw together what one process draws, and a
    forward pass that is computed again meets the same noise. Within a row they come in the order of the tokens.
    """
    key = int(torch.randint(KEYS, ()))
    generator, noise = torch.Generator(x.device), torch.empty_like(x)
    for row, part in enumerate(noise.split(packing.counts), start=packing.first_row):
        part.normal_(generator=generator.manual_seed((key + row) % KEYS))
    return noise
