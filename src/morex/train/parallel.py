"""What is done to a model from outside to train it: what is computed again, compiled, and divided over the ranks.

The model knows nothing of that. The core, whose forward holds all recursions, is one unit, so that shared weights are
gathered once a pass however often they recur; of a large one each block is a unit. So is every block of prelude and
coda. Embedding, last norm and head are gathered once for both ends of the pass, which a tied head needs.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from morex.loading import ConfigError
from morex.model.heads import mean_cross_entropy
from morex.model.lm import LanguageModel
from morex.model.stack import Stack
from morex.nn.compiled import CompiledBlock, compiled_rows, missing_compiler
from morex.sections.train import TrainConfig
from morex.train.ranks import Ranks

LARGE_CORE = 3_000_000_000
"""Parameters of a core from which on its weights and gradients would fill a third of a GPU of 80 GB."""
LINEAR = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
"""Operators that `train.recompute: selective` keeps the results of."""


def parallelise(model: LanguageModel, config: TrainConfig, ranks: Ranks, device: str) -> None:
    """Prepares a model for training, in place: what is computed again, then what is compiled, then what ranks divide.

    Gradients are averaged over all ranks.

    Args:
        config: of it `recompute`, `compile`, `shards` and `core_units`.
        device: type of the device that computes.

    Raises:
        ConfigError: the number of ranks is not a multiple of `train.shards`, or there is no compiler here.
    """
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
        config: of it `shards` and `core_units`.

    Raises:
        ConfigError: the number of ranks is not a multiple of `train.shards`.
    """
    shards = ranks.size if config.shards is None else config.shards
    if ranks.size % shards:
        raise ConfigError(f"train.shards {shards} does not divide the {ranks.size} ranks of this training")
    mesh = init_device_mesh(device, (ranks.size // shards, shards), mesh_dim_names=("copies", "shards"))
    stack = model.stack
    parameters = sum(parameter.numel() for parameter in stack.core.parameters())
    core: list[nn.Module] = [*stack.core.blocks] if has_block_units(config.core_units, parameters) else []
    for unit in (*stack.prelude, *core, stack.core, *stack.coda, model):
        fully_shard(unit, mesh=mesh)


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
    return float(whole(nn.utils.clip_grad_norm_(model.parameters(), limit)))
