"""When the fast paths run: on a CPU, in fp32 or fp64, outside torch.compile, and while nobody has turned them off."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float64)
_is_enabled = True


@contextmanager
def enabled(on: bool) -> Iterator[None]:
    """Inside, fast paths run (`on`) or every function takes its plain path.

    Plain paths serve where the fast ones do not go: derivatives of derivatives, torch.func, FLOP counters.
    """
    global _is_enabled
    before, _is_enabled = _is_enabled, on
    try:
        yield
    finally:
        _is_enabled = before


def usable(*tensors: Tensor) -> bool:
    """Whether a fast path may run on these: on a CPU, one dtype of fp32 and fp64 (or what autocast makes of it)."""
    if not _is_enabled or torch.compiler.is_compiling():
        return False
    dtype = tensors[0].dtype
    return dtype in _DTYPES and all(t.device.type == "cpu" and t.dtype == dtype for t in tensors)
