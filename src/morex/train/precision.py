"""Where a training computes and in which number format: decided once at the start of a run, then written down."""

import torch

from morex.loading import ConfigError

BF16_MIN_WIDTH = 256
"""Below this width, casting costs a CPU more than bf16 matrix products save."""


def resolve_device(name: str) -> torch.device:
    """The device of `auto`, `cpu`, `cuda` or `cuda:N`. Raises ConfigError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device '{name}' is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        present = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= present:
            raise ConfigError(f"device '{name}' is not there: this machine has {present} CUDA devices; use auto")
    elif device.type != "cpu":
        raise ConfigError(f"device '{name}' is not supported; use auto, cpu, cuda or cuda:N")
    return device


def resolve_precision(name: str, device: torch.device, d_model: int) -> str:
    """`fp32`, `bf16`, `fp16` or `fp64`; `auto` is bf16 where the hardware gains from it, else fp32.

    On CUDA that is every device with bf16 units; on a CPU one with AMX or AVX-512 bf16, from width 256 on.
    """
    if name != "auto":
        if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigError(f"train.precision 'bf16' is not supported by {device}; use fp32 or fp16")
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if d_model >= BF16_MIN_WIDTH and cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def weight_dtype(precision: str) -> torch.dtype:
    """Format of the weights: bf16 and fp16 are autocast over fp32 weights."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Format that autocast computes in, or None for none."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
