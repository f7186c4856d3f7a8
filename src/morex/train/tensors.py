"""Between live objects and named tensors in safetensors files: weights, optimizer state, random state."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from morex.train.errors import FULL, CheckpointError
from morex.train.parallel import divided_like

RANDOM = "random/"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file and forces it to disk. Raises OSError where the disk is full."""
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        for number in FULL:
            if f"os error {number}" in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU. Raises CheckpointError where the file is not safetensors."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"'{path}' is damaged: it is not a safetensors file ({error})") from None


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights and persistent buffers by name, a tensor with two names once, under the first."""
    unique: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        place = (local.data_ptr(), local.shape, local.stride(), local.dtype)
        if local.numel() == 0 or place not in seen:
            unique[name] = tensor
            seen.add(place)
    return unique


def refuse_other_model(path: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError that names the first tensor that is missing, too many, or of another shape."""
    for name in [*own, *tensors]:
        there = f"{list(tensors[name].shape)}" if name in tensors else "absent"
        here = f"{list(own[name].shape)}" if name in own else "absent"
        if there != here:
            raise CheckpointError(f"checkpoint '{path}' is of another model: {name} is {there} there and {here} here")


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `KEY/PARAMETER`; parameters that never had a gradient have none."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def set_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave. Raises CheckpointError for a parameter that the model lacks."""
    parameters = dict(model.named_parameters())
    state: dict[Tensor, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        key, _, name = full.partition("/")
        if full.startswith(RANDOM):
            continue
        if name not in parameters:
            raise CheckpointError(f"the optimizer state is of another model: parameter {name} is absent here")
        own = parameters[name]
        kept = tensor.to(own.device) if tensor.dim() == 0 else divided_like(own, tensor)
        state.setdefault(own, {})[key] = kept
    optimizer.state.clear()
    optimizer.state.update(state)


def random_state(device: torch.device, rank: int = 0) -> dict[str, Tensor]:
    """State of torch's generators on a rank; the loader keeps its own, and nothing draws from numpy's or python's."""
    ending = f"/{rank}" if rank else ""
    state = {f"{RANDOM}cpu{ending}": torch.get_rng_state()}
    if device.type == "cuda":
        state[f"{RANDOM}cuda{ending}"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(tensors: Mapping[str, Tensor], device: torch.device, rank: int = 0) -> None:
    """Puts back what `random_state` gave on a rank.

    Where there is nothing for it, as in a run that moves from a CPU to CUDA or goes on with more ranks, a generator
    goes on from its seed.
    """
    ending = f"/{rank}" if rank else ""
    if (state := tensors.get(f"{RANDOM}cpu{ending}")) is not None:
        torch.set_rng_state(state)
    if device.type == "cuda" and (state := tensors.get(f"{RANDOM}cuda{ending}")) is not None:
        torch.cuda.set_rng_state(state, device)
