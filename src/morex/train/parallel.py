"""What is done to a model from outside to train it: what is computed again, and which ranks hold which part of it.

The model knows nothing of that. The core, whose forward holds all recursions, is one unit, so that shared weights are
gathered once a pass however often they recur; so is every block of prelude and coda. Embedding, last norm and head are
gathered once for both ends of the pass, which a tied head needs.
"""

from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from morex.loading import ConfigError
from morex.model.lm import LanguageModel
from morex.sections.train import TrainConfig
from morex.train.ranks import Ranks


def parallelise(model: LanguageModel, config: TrainConfig, ranks: Ranks, device: str) -> None:
    """Prepares a model for training, in place: first what is computed again, then what is divided over the ranks.

    Gradients are averaged over all ranks.

    Args:
        config: of it `recompute` and `shards`.
        device: type of the device that computes.

    Raises:
        ConfigError: the number of ranks is not a multiple of `train.shards`.
    """
    stack = model.stack
    if config.recompute == "steps":
        for block in (*stack.prelude, *stack.core.blocks, *stack.coda):
            checkpoint(block)
    if ranks.size == 1:
        return
    shards = ranks.size if config.shards is None else config.shards
    if ranks.size % shards:
        raise ConfigError(f"train.shards {shards} does not divide the {ranks.size} ranks of this training")
    mesh = init_device_mesh(device, (ranks.size // shards, shards), mesh_dim_names=("copies", "shards"))
    for unit in (*stack.prelude, stack.core, *stack.coda, model):
        fully_shard(unit, mesh=mesh)


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
