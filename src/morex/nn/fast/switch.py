"""When the fast paths run, and the switch that turns them off."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_is_enabled = True


@contextmanager
def enabled(on: bool) -> Iterator[None]:
    """Inside, fast paths run where they can (`on`), or every function takes its plain path.

    The plain paths are for derivatives of derivatives and torch.func, which the fast ones do not know.
    """
    global _is_enabled
    before, _is_enabled = _is_enabled, on
    try:
        yield
    finally:
        _is_enabled = before


def usable(*tensors: Tensor) -> bool:
    """Whether a fast path may take these: on a CPU, all fp32 or all fp64, without autocast.

    Not under torch.compile, which fuses the plain path itself, nor under a dispatch mode such as a FLOP counter, which
    would not see into products that are written in place.
    """
    dtype = tensors[0].dtype
    return (
        _is_enabled
        and dtype in (torch.float32, torch.float64)
        and all(tensor.device.type == "cpu" and tensor.dtype == dtype for tensor in tensors)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not is_in_torch_dispatch_mode()
    )
