"""What each parameter is to the width: what initial weights, learning rates, decay and the choice of optimizer go by.

- `hidden`, from the width to the width: matrices of attention, feed-forward nets, experts and the injection, and the
  hidden layer of a router with `mlp`
- `output`, from the width to few: the scores of routers, `a` of low-rank changes
- `input`, from few to the width: embeddings, `b` of low-rank changes, all that is a vector, and the head

They are those of Tensor Programs V (Yang et al. 2022, arXiv 2203.03466), table 8. By it a head, which may be the
embedding, is initialised and moved like an input weight, and its logits have a multiplier.
"""

from typing import Literal

from torch import nn

from morex.depth.router import DepthRouter, ScoreNet
from morex.experts.router import ExpertRouter
from morex.nn.low_rank import LowRank

Role = Literal["hidden", "output", "input"]

VECTOR_WORDS = ("norm", "embedding")
"""A parameter whose path has one of these words in any part is vectors, however many are stacked."""
VECTOR_MODULES = (nn.LayerNorm, nn.RMSNorm, nn.Embedding)


def roles(model: nn.Module) -> dict[str, Role]:
    """The role of each parameter by name; a shared parameter counts once, under its first name."""
    modules = dict(model.named_modules())
    return {name: _role(name, modules) for name, _ in model.named_parameters()}


def is_vector(name: str, owner: nn.Module) -> bool:
    """Whether a parameter of `owner` is norms, biases or embeddings.

    Its role decides, not its number of dimensions: norms of E experts are stacked to [E, D].
    """
    leaf = name.rpartition(".")[2]
    if leaf == "bias" or leaf.endswith("_bias") or isinstance(owner, VECTOR_MODULES):
        return True
    return any(word in part for part in name.split(".") for word in VECTOR_WORDS)


def _role(name: str, modules: dict[str, nn.Module]) -> Role:
    path, _, leaf = name.rpartition(".")
    owner, parts = modules[path], path.split(".")
    if parts[0] != "stack" or is_vector(name, owner):
        return "input"
    if isinstance(owner, LowRank):
        return "output" if leaf == "a" else "input"
    if isinstance(owner, ScoreNet) and leaf == "hidden":
        return "hidden"
    above = [modules[".".join(parts[:end])] for end in range(1, len(parts) + 1)]
    return "output" if any(isinstance(module, DepthRouter | ExpertRouter) for module in above) else "hidden"
