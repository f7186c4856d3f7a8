"""Between live objects and named tensors in safetensors files: weights, optimizer state, random state."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from morex.train.errors import FULL, CheckpointError

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
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() == 0 or place not in seen:
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
        state.setdefault(parameters[name], {})[key] = tensor.to(parameters[name].device)
    optimizer.state.clear()
    optimizer.state.update(state)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's generators; the loader keeps its own, and nothing here draws from numpy's or python's."""
    state = {f"{RANDOM}cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state[f"{RANDOM}cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts back what `random_state` gave; a run that moves from a CPU to CUDA starts that generator from its seed."""
    torch.set_rng_state(tensors[f"{RANDOM}cpu"])
    if device.type == "cuda" and f"{RANDOM}cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"{RANDOM}cuda"], device)
