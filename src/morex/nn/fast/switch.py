"""When the fast paths run, and the switch that turns them off."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_in_torch_dispatch_mode
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

_is_enabled = True

# The bodies of fast functions pick their dtypes themselves: autocast stays out of them, both ways.
full_precision = torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)


def full_precision_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of a function whose forward is `full_precision`."""
    return torch.amp.custom_bwd(once_differentiable(backward), device_type="cpu")


class _Nothing:
    """Stands for autograd's context where no gradient is wanted: keeps nothing."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def run(function: type[Function], *inputs: Any) -> Any:
    """`function.apply(*inputs)`, without autograd's own work where no gradient is wanted."""
    if torch.is_grad_enabled():
        return function.apply(*inputs)
    return function.forward(_Nothing(), *inputs)


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


def available(*tensors: Tensor) -> bool:
    """Whether fast paths may run on these: on a CPU.

    Not under torch.compile, which fuses the plain path itself, nor under a dispatch mode such as a FLOP counter, which
    would not see into products that are written in place. Selective recomputation, which is one, has no need to.
    """
    if not _is_enabled or torch.compiler.is_compiling() or (is_in_torch_dispatch_mode() and _is_watched()):
        return False
    for tensor in tensors:  # noqa: SIM110 - a generator takes three times as long
        if not tensor.is_cpu:
            return False
    return True


def _is_watched() -> bool:
    """Whether a dispatch mode wants to see every operator."""
    recomputes = _CachingTorchDispatchMode, _CachedTorchDispatchMode
    return not all(isinstance(mode, recomputes) for mode in _get_current_dispatch_mode_stack())


def usable(*tensors: Tensor, under_autocast: bool = False) -> bool:
    """Whether a fast path that keeps to one dtype may take these: all fp32 or all fp64, and no autocast."""
    dtype = tensors[0].dtype
    return (
        dtype in (torch.float32, torch.float64)
        and all(tensor.dtype == dtype for tensor in tensors)
        and (under_autocast or not torch.is_autocast_enabled("cpu"))
        and available(*tensors)
    )
