"""Between live objects and named tensors: weights, optimizer state, random state."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from morex.config import Config
from morex.train.errors import CheckpointError
from morex.train.storage import Piece

RANDOM = "random/"


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


def refuse_other_model(path: Path, shapes: Mapping[str, tuple[int, ...]], own: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError that names the first tensor that is missing, too many, or of another shape."""
    for name in [*own, *shapes]:
        there = f"{list(shapes[name])}" if name in shapes else "absent"
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


def room_for_optimizer(model: nn.Module, saved: Mapping[str, Piece]) -> dict[str, Tensor]:
    """Tensors of the kind that `optimizer_tensors` gives, to be filled, divided as the parameters are.

    Args:
        saved: a piece of each tensor that there is.

    Raises:
        CheckpointError: for a parameter that the model lacks.
    """
    parameters = dict(model.named_parameters())
    room = {}
    for full, piece in saved.items():
        key, _, name = full.partition("/")
        if name not in parameters:
            raise CheckpointError(f"the optimizer state is of another model: parameter {name} is absent here")
        own = parameters[name].detach()
        if tuple(own.shape) == piece.whole and key != "step":
            room[full] = torch.zeros_like(own)
        else:
            room[full] = torch.zeros(piece.whole, dtype=getattr(torch, piece.dtype), device=own.device)
    return room


def set_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave."""
    parameters = dict(model.named_parameters())
    state: dict[Tensor, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        key, _, name = full.partition("/")
        state.setdefault(parameters[name], {})[key] = tensor
    optimizer.state.clear()
    optimizer.state.update(state)


def random_rank(config: Config, rank: int) -> int:
    """Whose random state a rank has. Dropout draws for a rank's own tokens alone; all else that is random, ranks draw
    together (`morex.nn.noise`), as one process does."""
    return rank if config.model.dropout.is_on else 0


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
