"""A decoding step as one compiled graph: the model's own stack on one new token a row, with a cache of fixed size.

What the graph is made for is the shape of its cache. Room is a power of two, so that texts of many lengths share few
graphs; weights are inputs, so that changed ones count at once.
"""

import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from morex.cache.fixed import FixedCache
from morex.depth.fixed import FixedRouter
from morex.depth.policy import Depth
from morex.nn.attention import Attention
from morex.nn.packing import Packing
from morex.sections.mixers import FeedForwardConfig

if TYPE_CHECKING:
    from morex.model.lm import LanguageModel

LEAST_ROOM = 64
BACKEND = "inductor"

Step = Callable[[FixedCache, Tensor, Tensor], Tensor]
"""With what came before, new tokens [B] at their times [B] -> logits of the next ones [B, V]."""
_steps: "WeakKeyDictionary[LanguageModel, dict[Depth, Step]]" = WeakKeyDictionary()


def fixed_cache(model: "LanguageModel", depth: Depth, batch: int, tokens: int) -> FixedCache:
    """An empty cache with room for `tokens` tokens of each of `batch` rows, at this depth."""
    schedule = model.config.schedule.resolved.recurring(model.policy(depth, None).recursions)
    room = max(LEAST_ROOM, 1 << (tokens - 1).bit_length())
    shape = next(module.shape for module in model.modules() if isinstance(module, Attention))
    size = (batch, room, shape.kv_heads, shape.head_dim)
    return FixedCache(schedule, size, model.embedding.weight)


def compiled_step(model: "LanguageModel", depth: Depth) -> Step:
    """The step of a model at a depth, compiled at its first call for each shape of tokens and cache."""
    steps = _steps.setdefault(model, {})
    if depth not in steps:
        policy, embed, stack, read = model.policy(depth, None), model.embed, model.stack, model.read

        def step(cache: FixedCache, tokens: Tensor, time: Tensor) -> Tensor:
            rows = torch.arange(tokens.shape[0], device=tokens.device)
            packing = Packing(tokens.shape[0], 1, 1, rows, time, time)
            x, _ = stack(embed(tokens[:, None], packing), packing, policy, cache, False)
            return read(x)

        steps[depth] = torch.compile(step, backend=BACKEND, dynamic=False, fullgraph=True)
    return steps[depth]


def check_compiles(model: "LanguageModel", depth: Depth, use_cache: bool) -> None:
    """Refuses to compile what is not one graph of tensors. Raises ValueError."""
    config, mixer = model.config, model.config.mixer
    if not use_cache:
        raise ValueError("compile goes with a cache; leave use_cache out, or compile")
    is_router_fixed = all(isinstance(group.router, FixedRouter) for group in model.stack.core.groups)
    if not is_router_fixed or model.policy(depth, None).kind not in ("router", "uniform"):
        raise ValueError(
            f"compile needs a depth that no token decides, and this model's router is {config.depth.kind!r} at depth "
            f"{depth!r}; leave compile out"
        )
    if config.kv == "refresh":
        raise ValueError("compile does not know model.kv 'refresh'; leave compile out")
    if not isinstance(mixer, FeedForwardConfig) and not (
        mixer.kind == "recursive" and mixer.attention_scope == "token" and mixer.steps_router.kind == "fixed"
    ):
        raise ValueError(
            "compile knows feed-forward nets and recursive experts of a fixed number of steps whose attention_scope is "
            f"'token', not this model's experts of the kind {mixer.kind!r}; leave compile out"
        )
    compiler = os.environ.get("CXX", "g++")
    if model.embedding.weight.device.type == "cpu" and not shutil.which(compiler):
        raise ValueError(f"compile needs a C++ compiler, and there is no {compiler} here; install one or leave it out")
