"""What is done to a model from outside to train it: what is computed again, compiled, and divided over the ranks.

The model knows nothing of that. The core, whose forward holds all recursions, is one unit, so that shared weights are
gathered once a pass however often they recur; of a large one each block is a unit. So is every block of prelude and
coda. Embedding, last norm and head are gathered once for both ends of the pass, which a tied head needs.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from morex.experts.divided import ExpertLayer
from morex.loading import ConfigError
from morex.model.heads import mean_cross_entropy
from morex.model.lm import LanguageModel
from morex.model.stack import Stack
from morex.nn.compiled import CompiledBlock, compiled_rows, missing_compiler
from morex.sections.train import TrainConfig
from morex.train.ranks import Ranks

LARGE_CORE = 3_000_000_000
"""Parameters of a core from which on its weights and gradients would fill a third of a GPU of 80 GB."""
COPIES = "copies"
"""Dimension of a mesh over whose ranks every weight is the same."""
LINEAR = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
"""Operators that `train.recompute: selective` keeps the results of."""


def parallelise(model: LanguageModel, config: TrainConfig, ranks: Ranks, device: str) -> None:
    """Prepares a model for training, in place: what is computed again, then what is compiled, then what ranks divide.

    Gradients are averaged over all ranks.

    Args:
        config: of it `recompute`, `compile`, `shards`, `expert_shards` and `core_units`.
        device: type of the device that computes.

    Raises:
        ConfigError: the number of ranks is not a multiple of `train.shards` or `train.expert_shards`, or there is no
            compiler here.
    """
    if ranks.size % config.expert_shards:
        raise ConfigError(
            f"train.expert_shards {config.expert_shards} does not divide the number of ranks, {ranks.size}; "
            f"train on a multiple of {config.expert_shards}, or use train.expert_shards=1"
        )
    recompute(model.stack, config.recompute)
    if config.compile:
        with ranks.agreed():
            compile_blocks(model, device)
    if ranks.size > 1:
        divide(model, config, ranks, device)


def recompute(stack: Stack, what: str) -> None:
    """Has the stack compute some of its forward pass again in the backward pass.

    Args:
        what: `train.recompute`.
    """
    if what == "nothing":
        return
    options = {"context_fn": selective_contexts} if what == "selective" else {}
    blocks: list[nn.Module] = [*stack.prelude, *stack.coda]
    if what == "recursions":
        stack.core.recursion = partial(  # type: ignore[method-assign]
            torch.utils.checkpoint.checkpoint, stack.core.recursion, use_reentrant=False
        )
    else:
        blocks += stack.core.blocks
    for block in blocks:
        checkpoint(block, **options)


def selective_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a block's forward pass, in which results of linear maps are kept, and of its repetition."""
    first, again = create_selective_checkpoint_contexts(LINEAR)
    return _casting_anew(first), _casting_anew(again)


@contextmanager
def _casting_anew(inner: AbstractContextManager[Any]) -> Iterator[None]:
    """`inner`, in which autocast casts weights whenever they are used, so that a repetition does what was done before.

    A shared weight then gets the sum of its gradients in its own number format.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with inner:
            yield
    finally:
        torch.set_autocast_cache_enabled(before)


def compile_blocks(model: LanguageModel, device: str) -> None:
    """Has torch compile blocks and the loss when they first run. Raises ConfigError where there is no compiler."""
    missing = missing_compiler(device)
    if missing is not None:
        raise ConfigError(f"train.compile needs {missing}; install it, or set train.compile to false")
    for block in model.stack.blocks:
        block.forward = CompiledBlock(block)  # type: ignore[method-assign]
    model.head.loss = compiled_rows(mean_cross_entropy)  # type: ignore[method-assign]


def divide(model: LanguageModel, config: TrainConfig, ranks: Ranks, device: str) -> None:
    """Divides weights, gradients and optimizer state over the ranks.

    Args:
        config: of it `shards`, `expert_shards` and `core_units`.

    Raises:
        ConfigError: the number of ranks is not a multiple of `train.shards`.
    """
    shards = ranks.size if config.shards is None else config.shards
    if ranks.size % shards:
        raise ConfigError(f"train.shards {shards} does not divide the {ranks.size} ranks of this training")
    mesh = init_device_mesh(device, (ranks.size // shards, shards), mesh_dim_names=(COPIES, "shards"))
    stack = model.stack
    experts = divide_experts(model, config.expert_shards, ranks, device) if config.expert_shards > 1 else set()
    parameters = sum(parameter.numel() for parameter in stack.core.parameters() if parameter not in experts)
    core: list[nn.Module] = [*stack.core.blocks] if has_block_units(config.core_units, parameters) else []
    for unit in (*stack.prelude, *core, stack.core, *stack.coda, model):
        fully_shard(unit, mesh=mesh, ignored_params=experts)


def divide_experts(model: nn.Module, shards: int, ranks: Ranks, device: str) -> set[nn.Parameter]:
    """Divides the experts of every expert layer over neighbouring ranks, by expert; further ranks have copies.

    Args:
        shards: ranks that the experts are divided over, a divisor of their number and of all ranks.

    Returns:
        Their weights, DTensors on a mesh of their own.
    """
    mesh = init_device_mesh(device, (ranks.size // shards, shards), mesh_dim_names=(COPIES, "experts"))
    found = set()
    for layer in model.modules():
        if not isinstance(layer, ExpertLayer):
            continue
        layer.peers = mesh.get_group("experts")
        for name, weight in list(layer.named_parameters(recurse=False)):
            # All ranks have drawn the same weights.
            part = distribute_tensor(weight.detach(), mesh, (Replicate(), Shard(0)), src_data_rank=None)
            layer.register_parameter(name, nn.Parameter(part))
            found.add(getattr(layer, name))
    return found


def average_expert_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Makes the gradients of divided experts, to which the tokens of all their peers have added, those of a step.

    Other gradients are averaged over the ranks in the backward pass. All ranks have to call it after the last one.
    """
    if ranks.size == 1:
        return
    for layer in model.modules():
        if not isinstance(layer, ExpertLayer) or layer.peers is None:
            continue
        for weight in layer.parameters(recurse=False):
            assert isinstance(weight, DTensor)
            if weight.grad is None:  # on all ranks: nothing is computed with it
                continue
            own = weight.grad.to_local()  # type: ignore[attr-defined]
            copies = weight.device_mesh.get_group(COPIES)
            if copies.size() > 1:
                dist.all_reduce(own, group=copies)
            own.div_(ranks.size)


def has_block_units(core_units: str, parameters: int) -> bool:
    """Whether each block of the core is a unit of its own.

    Args:
        core_units: `train.core_units`.
        parameters: of the core.
    """
    return core_units == "blocks" or (core_units == "auto" and parameters >= LARGE_CORE)


def exchange_gradients(model: nn.Module, now: bool) -> None:
    """Whether the coming backward pass adds up the gradients of the ranks: only the last of a step has to."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def reshard(model: nn.Module) -> None:
    """Gives back what a pass without a gradient has gathered: parameters are those that the optimizer knows again."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be divided over the ranks, as a whole; all ranks have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradient_norm(model: nn.Module, limit: float) -> float:
    """Scales the gradients of all ranks down to a norm, and returns their norm before."""
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        by_mesh.setdefault(mesh_of(parameter), []).append(parameter)
    if len(by_mesh) == 1:
        return float(whole(nn.utils.clip_grad_norm_(model.parameters(), limit)))
    gradients = [[each.grad for each in own if each.grad is not None] for own in by_mesh.values()]
    norm = torch.stack([whole(nn.utils.get_total_norm(own)) for own in gradients]).norm()
    for own in by_mesh.values():
        nn.utils.clip_grads_with_norm_(own, limit, norm)
    return float(norm)


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The ranks that a tensor is divided over: operators take together what is divided over the same."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None
