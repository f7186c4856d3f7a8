"""A contender of a training benchmark: a model with its optimizer, which takes steps on random text.

What a layer of experts costs depends on how evenly it is used, and a router that has not been trained uses it unevenly
by chance. So the loads are given: each token's experts are drawn at random, every expert alike unless the caller says
otherwise. Shapes: B batch, T tokens, N tokens of a batch, E experts, K of them for each token, V vocabulary.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count as count_from
from itertools import zip_longest

import torch
from torch import Tensor

from morex.config import Config
from morex.experts.router import ExpertRouter
from morex.loading import is_depth_routed
from morex.model.count import count
from morex.model.lm import build_model
from morex.nn.signals import RouterStats
from morex.train.memory import keep_freed_memory
from morex.train.optim import build_optimizer
from morex.train.precision import autocast_dtype, weight_dtype

WARM_UP = 3
"""Steps before the clock runs; their draws of experts come again and again."""


@dataclass(frozen=True)
class Shape:
    """What a step computes."""

    batch_size: int
    seq_len: int
    precision: str
    device: torch.device


class Contender:
    """A model with its optimizer, which can take training steps on random text."""

    def __init__(self, config: Config, shape: Shape, loads: Sequence[float] | None = None) -> None:
        keep_freed_memory()
        self.config, self.shape = config, shape
        self.model = build_model(config.model, device=shape.device, dtype=weight_dtype(shape.precision)).train()
        for module in self.model.modules():
            if isinstance(module, ExpertRouter):
                even = [1 / module.experts] * module.experts
                # The router's own choice is made too, so that it costs what it costs.
                module.choose = drawn_experts(loads or even, module.top_k, module.choose)  # type: ignore[method-assign, assignment]
        self.optimizer = build_optimizer(self.model, config.train, config.model.width_ratio)
        self.autocast = autocast_dtype(shape.precision)
        self.steps = 0
        self.active: list[tuple[float, ...]] = []
        self.steps_taken: list[tuple[float, ...]] = []

    def step(self, batch: Tensor) -> RouterStats:
        """One optimizer step on [B, T+1] tokens, as the trainer takes it."""
        with torch.autocast(self.shape.device.type, self.autocast, enabled=self.autocast is not None):
            out = self.model(batch[:, :-1], labels=self._labels(batch))
        assert out.loss is not None
        out.loss.backward()
        if self.config.train.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.model.update_routers(out.stats, self.steps)
        return out.stats

    def _labels(self, batch: Tensor) -> Tensor:
        """The tokens themselves, or for a classifier classes [B] made from them."""
        head = self.config.model.head
        return batch if head.kind == "lm" else batch[:, -1] % head.classes

    def timed(self, batches: Sequence[Tensor]) -> float:
        """Seconds of one step on each batch; remembers how many tokens were active."""
        stats = []
        wait(self.shape.device)
        start = time.perf_counter()
        for batch in batches:
            stats.append(self.step(batch))
        wait(self.shape.device)
        seconds = time.perf_counter() - start
        self.active += [one.active_shares for one in stats if one.active_shares is not None]
        self.steps_taken += [one.step_shares for one in stats if one.step_shares is not None]
        return seconds

    def shares(self) -> tuple[float, ...] | None:
        """Measured share of the tokens at recursion r = 1..R, or None where no router decides depth."""
        return _means(self.active) if is_depth_routed(self.config.model) else None

    @property
    def draws(self) -> bool:
        """Whether every step draws how often the model recurs."""
        return self.config.model.depth.kind == "sampled"

    def flops_per_token(self) -> float:
        """Training FLOPs per token, closed form on the measured shares; the mean over steps that differ in depth."""
        steps_taken, deepest = _means(self.steps_taken), {len(shares) for shares in self.active}

        def flops(shares: tuple[float, ...] | None) -> float:
            found = count(self.config.model, seq_len=self.shape.seq_len, shares=shares, step_shares=steps_taken)
            return found.train_flops_per_token

        if len(deepest) <= 1:
            return flops(self.shares())
        return statistics.fmean(map(flops, self.active))

    def typical(self, seconds: Sequence[float]) -> float:
        """Seconds of a round: the median, or the mean where rounds differ in depth, as FLOPs are then a mean."""
        return statistics.fmean(seconds) if self.draws else statistics.median(seconds)


def _means(shares: Sequence[tuple[float, ...]]) -> tuple[float, ...] | None:
    """The mean of each place, or None of nothing; a place that one does not have counts as 0."""
    return tuple(map(statistics.fmean, zip_longest(*shares, fillvalue=0.0))) if shares else None


def drawn_experts(
    loads: Sequence[float], top_k: int, own_choice: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """A choice of K different experts for each token at random, in which expert e has the share `loads[e]` of the work.

    Systematic sampling: points u, u + 1, ... u + K - 1 with u in [0, 1) fall into intervals of lengths K * load. The
    draws of the warm-up come again and again, so that a measured step does not pay for them.
    """
    edges = (top_k * torch.tensor(loads, dtype=torch.double)).cumsum(0)[:-1]
    generator = torch.Generator().manual_seed(0)
    draws: dict[tuple[int, int], Tensor] = {}
    calls = count_from(0)

    def draw(tokens: int) -> Tensor:
        points = torch.rand(tokens, 1, dtype=torch.double, generator=generator) + torch.arange(top_k)
        return torch.searchsorted(edges, points, right=True)

    def choose(probabilities: Tensor) -> Tensor:
        own_choice(probabilities)
        key = (probabilities.shape[0], next(calls) % WARM_UP)
        if key not in draws:
            draws[key] = draw(key[0]).to(probabilities.device)
        return draws[key]

    return choose


def random_batches(vocab_size: int, shape: Shape, number: int) -> list[Tensor]:
    """Tokens [B, T+1] drawn by Zipf's law, as words come, so that routers meet the same tokens again and again."""
    weights = 1.0 / torch.arange(1, vocab_size + 1, dtype=torch.double)
    generator = torch.Generator().manual_seed(0)
    size = shape.batch_size * (shape.seq_len + 1)
    return [
        torch.multinomial(weights, size, replacement=True, generator=generator)
        .view(shape.batch_size, shape.seq_len + 1)
        .to(shape.device)
        for _ in range(number)
    ]


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
