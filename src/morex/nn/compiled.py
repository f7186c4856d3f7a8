"""A block as compiled graphs: all of it but for the pass of queries over keys, and what experts do.

What is compiled are functions of the tokens' flat rows [N, D], one before attention's pass over its rows and one behind
it. How long packed rows are, which tokens they hold and what a cache has is none of their business, and N is a symbol
to them. So there is one graph of each, whatever routers decide and for all blocks alike; it is made anew only for
another kind of step: one without a gradient, in another number format, with parts of its own.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from morex.nn.attention import Local, Projection
from morex.nn.block import WHOLE, Block, StepParts, StepViews
from morex.nn.mixers import FeedForward, GatedFeedForward
from morex.nn.packing import Packing
from morex.nn.signals import Reports

BACKEND = "inductor"
MOST_GRAPHS = 256
"""Graphs of one function in a process, of all its models together; torch's own limit of 8 is for one model."""


class CompiledBlock:
    """`Block.forward` of one block, compiled where it can be; parameters are inputs of the graphs."""

    def __init__(self, block: Block) -> None:
        self.block = block

    def __call__(
        self,
        x: Tensor,
        packing: Packing,
        views: StepViews | None = None,
        local: Local | None = None,
        parts: StepParts = WHOLE,
    ) -> tuple[Tensor, Reports]:
        """As `Block.forward`."""
        block, attention = self.block, self.block.attention
        if x.shape[0] < 2:  # which a symbol does not stand for
            return Block.forward(block, x, packing, views, local, parts)
        view = None if views is None else views.attention
        projection = attention.projection(x, packing, view, local, parts.changes)
        for table in projection.turns or ():
            of_any_length(table)
        projected = _graph(_before)(block, of_any_length(x), projection, parts)
        heads = of_any_length(attention.mix(projected, projection, packing, view, local))
        if isinstance(block.mixer, FeedForward | GatedFeedForward):
            return _graph(_behind)(block, x, heads, parts), {}
        x, normed = _graph(_between)(block, x, heads, parts)
        branch, reports = block.mix(normed, packing, views, parts)
        return block.join(x, branch, "norm2_after", parts), reports


def compiled_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors [N, ...], compiled for any N from 2 on."""

    def call(*rows: Tensor) -> Any:
        if rows[0].shape[0] < 2:
            return function(*rows)
        return _graph(function)(*map(of_any_length, rows))

    return call


def missing_compiler(device: str) -> str | None:
    """What compiling for this type of device needs and is not here, in words; None where nothing is missing."""
    if device == "cpu":
        compiler = os.environ.get("CXX", "g++")
        return None if shutil.which(compiler) else f"a C++ compiler, and there is no {compiler} here"
    return None if find_spec("triton") else "the package triton, which is not installed"


def of_any_length(x: Tensor) -> Tensor:
    """Marks rows [N, ...], N from 2 on: their number is a symbol to what is compiled."""
    torch._dynamo.mark_dynamic(x, 0)
    return x


def _before(block: Block, x: Tensor, projection: Projection, parts: StepParts) -> list[Tensor]:
    return block.attention.project(block.norm("norm1", parts, x), projection, parts.changes)


def _behind(block: Block, x: Tensor, heads: Tensor, parts: StepParts) -> Tensor:
    """Of a block with a feed-forward net, which needs nothing but its rows."""
    x, normed = _between(block, x, heads, parts)
    changes = (parts.changes,) if parts.changes else ()
    branch, _ = block.mixer(normed, None, None, *changes)
    return block.join(x, branch, "norm2_after", parts)


def _between(block: Block, x: Tensor, heads: Tensor, parts: StepParts) -> tuple[Tensor, Tensor]:
    x = block.join(x, block.attention.output(heads, parts.changes), "norm1_after", parts)
    return x, block.norm("norm2", parts, x)


def _graph(function: Callable[..., Any]) -> Callable[..., Any]:
    return _compiled(function, BACKEND)


@cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MOST_GRAPHS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, MOST_GRAPHS)
    return torch.compile(function, backend=backend, fullgraph=True)
