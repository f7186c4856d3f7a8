"""The loop over depth: prelude, the core under its routers, coda. The only loop over the schedule's steps.

The core is one module whose forward holds all recursions, so that sharding gathers shared weights once a pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from morex.cache.batch import KVCache
from morex.cache.fixed import FixedCache
from morex.cache.latest import LatestVisits
from morex.cache.slots import CallStore, KVRule, SlotStore, views_of
from morex.depth.policy import DepthPolicy
from morex.depth.router import DepthRouter, Routing, Visit
from morex.depth.schedule import Group, Schedule, Step
from morex.model.trace import GroupTrace
from morex.nn.attention import Local
from morex.nn.block import WHOLE, Block, StepParts
from morex.nn.injection import Injection
from morex.nn.packing import Packing
from morex.nn.signals import Choice, Exits, Reports, RouterStats, Signals, loss_name


class Record:
    """What routers report in one forward pass, collected by module path.

    No dataclass: what shards a model copies those that it hands on with tensors in them.
    """

    def __init__(self, traces: bool = False, with_stats: bool = True) -> None:
        """Args:
        with_stats: whether anybody asks for statistics.
        """
        self.traces, self.with_stats = traces, with_stats
        self.losses: dict[str, list[Tensor]] = {}
        self.found: list[tuple[str, dict[str, Tensor]]] = []
        """Statistics in the order in which they came."""
        self.groups: dict[str, GroupTrace] = {}
        self.choices: dict[str, list[Choice]] = {}
        """Choices of experts in the frame of the batch [B, T, ...]; -1 and NaN where a token did not come by."""
        self.exits: Exits | None = None
        """Where the loss is over all exits, what it needs."""

    @property
    def stats(self) -> RouterStats:
        """Statistics by router, joined."""
        joined = RouterStats()
        for name, fields in self.found:
            joined.include(name, fields)
        return joined

    @property
    def tensors(self) -> list[Tensor]:
        """What losses are computed from."""
        exits = [] if self.exits is None else [*self.exits.states, self.exits.log_probabilities]
        return [value for values in self.losses.values() for value in values] + exits

    def add(self, name: str, signals: Signals) -> None:
        """Adds one router's report."""
        for loss, value in signals.losses.items():
            self.losses.setdefault(loss_name(name, loss), []).append(value)
        if signals.stats:
            self.found.append((name, signals.stats))
        self.exits = signals.exits or self.exits


@dataclass(frozen=True)
class Windows:
    """Which steps are local."""

    local: Local
    global_every: int | None
    """With n, steps n, 2n, 3n ... of the schedule see everything; None: no step does."""

    def at(self, place: int) -> Local | None:
        """What the attention of the step at this place of the schedule does otherwise."""
        is_global = self.global_every is not None and (place + 1) % self.global_every == 0
        return None if is_global else self.local


@dataclass(frozen=True)
class Pass:
    """What one forward pass needs at every step."""

    schedule: Schedule
    """With the recursions of this pass."""
    windows: Windows | None
    rule: KVRule
    cache: KVCache | FixedCache | None
    call: SlotStore
    record: Record
    batch: Packing
    """All tokens of the batch."""
    peek: Callable[[Tensor, Packing], Tensor] | None = None
    """What exit rules look at."""

    def run(
        self,
        block: nn.Module,
        step: Step,
        x: Tensor,
        packing: Packing,
        name: str,
        parts: StepParts | None = None,
        counts: bool = True,
    ) -> Tensor:
        """One step, its reports recorded: a block, with what the step brings, on the packed tokens x [M, D]."""
        x, reports = self.step(block, step, x, packing, parts, counts)
        if counts:
            self.report(name, packing, reports)
        return x

    def step(
        self,
        block: nn.Module,
        step: Step,
        x: Tensor,
        packing: Packing,
        parts: StepParts | None = None,
        counts: bool = True,
    ) -> tuple[Tensor, Reports]:
        """One step, [M, D] -> [M, D] and what its mixer's routers report."""
        local = None if self.windows is None else self.windows.at(self.schedule.place(step))
        # What does not count leaves no key behind.
        views = views_of(step, self.rule, self.cache, self.call) if counts else None
        parts = WHOLE if parts is None else parts
        found: tuple[Tensor, Reports] = block(
            x, packing, views, local, replace(parts, traces=True) if self.record.traces else parts
        )
        return found

    def report(self, name: str, packing: Packing, reports: Reports) -> None:
        """Records what a step of the packing's tokens reported."""
        for part, signals in reports.items():
            path = f"{name}.mixer.{part}"
            self.record.add(path, signals)
            if self.record.traces and signals.choices:
                frames = partial(self._spread, packing)
                self.record.choices.setdefault(path, []).extend(choice.each(frames) for choice in signals.choices)

    def _spread(self, packing: Packing, values: Tensor, missing: float) -> Tensor:
        """Values of packed tokens [M, ...] -> the frame of the batch [B, T, ...]."""
        if packing.index is not None:
            everyone = values.new_full((self.batch.num_tokens, *values.shape[1:]), missing)
            values = everyone.index_copy(0, packing.index, values)
        return self.batch.pad(values.detach(), missing)


ByStep = Sequence[Sequence[Mapping[str, nn.Module]]]
"""Modules by recursion, from 0, block of the group, and name."""


class RoutedGroup(nn.Module):
    """Core blocks that recur together under one router; owns what belongs to a recursion, not to a block."""

    router: DepthRouter
    step_embedding: nn.Parameter | None

    def __init__(
        self,
        router: DepthRouter,
        step_embedding: nn.Parameter | None = None,
        injection: Injection | None = None,
        residual_scale: float = 1.0,
        norms: ByStep | None = None,
        lora: ByStep | None = None,
    ) -> None:
        """Args:
        step_embedding: a vector for each recursion [R, D].
        injection: how a recursion meets the group's input again.
        residual_scale: factor on what attention and mixer add in every step.
        norms: the blocks' norms, `[r - 1][i]` those of the group's block i at recursion r, by name.
        lora: low-rank changes of the blocks' linear maps, likewise.
        """
        super().__init__()
        self.router, self.injection, self.residual_scale = router, injection, residual_scale
        self.register_parameter("step_embedding", step_embedding)
        self.norms, self.lora = _modules(norms), _modules(lora)

    def prepare(self, h: Tensor) -> Tensor | None:
        """From the group's input [N, D], what is injected into each recursion [N, D]."""
        return None if self.injection is None else self.injection.prepare(h)

    def enter(self, h: Tensor, injected: Tensor | None, packing: Packing, r: int) -> Tensor:
        """The input of the core at recursion r for the packing's tokens [M, D], from the states of all [N, D]."""
        y = packing.gather(h)
        if self.injection is not None and injected is not None:
            y = self.injection(y, packing.gather(injected))
        return y if self.step_embedding is None else y + self.step_embedding[r - 1]

    def parts(self, r: int, i: int) -> StepParts:
        """What the step of the group's block i, from 0, at recursion r brings."""
        norms, lora = ({} if owned is None else dict(owned[r - 1][i].items()) for owned in (self.norms, self.lora))
        return StepParts(self.residual_scale, norms, lora)


class Core(nn.Module):
    """The shared blocks and their recursions."""

    def __init__(self, blocks: list[Block], groups: list[RoutedGroup], schedule: Schedule) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.groups = nn.ModuleList(groups)
        self.schedule = schedule

    def forward(self, h: Tensor, packing: Packing, policy: DepthPolicy, run: Pass) -> tuple[Tensor, list[Tensor]]:
        """h [N, D] -> [N, D], each token through as many recursions as its router or the policy says.

        Beside it what the record has besides: whoever shards the core has to see every tensor that gradients come by.
        """
        for g, (group, own) in enumerate(zip(run.schedule.groups, self.groups, strict=True)):
            assert isinstance(own, RoutedGroup)
            h = self._recur(h, packing, policy, run, group, own, f"stack.core.groups.{g}")
        return h, run.record.tensors

    def _recur(
        self, h: Tensor, packing: Packing, policy: DepthPolicy, run: Pass, group: Group, own: RoutedGroup, name: str
    ) -> Tensor:
        if run.rule == "refresh" and run.cache is None and own.router.takes_all(policy):
            run = replace(run, rule="per_recursion")  # the latest visit is the one in hand, and that is faster
        injected = own.prepare(h)
        h, routing = own.router.begin(h, packing, policy)
        routing.peek, routing.with_stats = run.peek, run.record.with_stats
        start, states = h.detach(), []
        for r, steps in enumerate(group.recursions, start=1):
            with own.router.gradient(policy, r):
                visit = own.router.visit(h, routing, r)
                if visit is not None:
                    y, reports = self.recursion(own.enter(h, injected, visit.packing, r), visit, steps, own, run)
                    for step, of_step in zip(steps, reports, strict=True):
                        run.report(f"stack.core.blocks.{self._index(step)}", visit.packing, of_step)
                    h = own.router.bring_back(h, y, routing, visit)
            if run.record.traces:
                states.append(packing.pad(h.detach()))
        h, signals = own.router.finish(h, routing)
        run.record.add(f"{name}.router", signals)
        if run.record.traces:
            run.record.groups[name] = _trace(routing, states, packing.pad(start))
        return h

    def recursion(
        self, y: Tensor, visit: Visit, steps: Sequence[Step], own: RoutedGroup, run: Pass
    ) -> tuple[Tensor, list[Reports]]:
        """The steps of one recursion on its visiting tokens y [M, D] -> [M, D], and what each step reports.

        It records nothing, so that it may be computed again.
        """
        found = []
        for i, step in enumerate(steps):
            block, parts = self.blocks[self._index(step)], own.parts(visit.recursion, i)
            y, reports = run.step(block, step, y, visit.packing, parts, not visit.is_dummy)
            found.append(reports)
        return y, found

    def _index(self, step: Step) -> int:
        """Which of the core's blocks a step runs."""
        return step.block - self.schedule.prelude


class Stack(nn.Module):
    """Prelude, core, coda."""

    def __init__(
        self, prelude: list[Block], core: Core, coda: list[Block], rule: KVRule, windows: Windows | None = None
    ) -> None:
        super().__init__()
        self.prelude = nn.ModuleList(prelude)
        self.core = core
        self.coda = nn.ModuleList(coda)
        self.rule, self.windows = rule, windows

    @property
    def blocks(self) -> list[Block]:
        """All blocks, each once."""
        found: list[Any] = [*self.prelude, *self.core.blocks, *self.coda]
        return found

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        policy: DepthPolicy,
        cache: KVCache | FixedCache | None,
        traces: bool,
        read: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Record]:
        """x [N, D], the batch's real tokens -> [N, D] and what the routers report.

        Args:
            read: norm and head, from states [N, D] to logits [N, V]; for the peeks of exit rules.
        """
        schedule, batch = self.core.schedule.recurring(policy.recursions), packing.root()
        call: SlotStore = CallStore()
        if self.rule == "refresh":
            call = LatestVisits(call if cache is None else cache, batch)
        record = Record(traces=traces, with_stats=cache is None)
        run = Pass(schedule, self.windows, self.rule, cache, call, record, batch)
        # Prelude and coda run once: no later recursion reads their keys.
        once = run if self.rule == "per_recursion" else replace(run, rule="per_recursion")
        for i, step in enumerate(schedule.prelude_steps):
            x = once.run(self.prelude[i], step, x, batch, f"stack.prelude.{i}")
        if read is not None:
            run = replace(run, peek=partial(self.peek, once, read))
        x, _ = self.core(x, batch, policy, run)
        for i, step in enumerate(schedule.coda_steps):
            x = once.run(self.coda[i], step, x, batch, f"stack.coda.{i}")
        return x, run.record

    def peek(self, once: Pass, read: Callable[[Tensor], Tensor], y: Tensor, packing: Packing) -> Tensor:
        """Logits [M, V] of the states y [M, D] after the coda, in which each token sees itself alone."""
        alone = packing.alone()
        for i, step in enumerate(once.schedule.coda_steps):
            y = once.run(self.coda[i], step, y, alone, f"stack.coda.{i}", counts=False)
        return read(y)


def _modules(owned: ByStep | None) -> Any:
    if owned is None:
        return None
    return nn.ModuleList(nn.ModuleList(nn.ModuleDict(named) for named in blocks) for blocks in owned)


def _trace(routing: Routing, states: list[Tensor], start: Tensor) -> GroupTrace:
    pad = routing.packing.pad
    active = [pad(mask, False) for mask in routing.masks]
    scores = [pad(score, torch.nan) for score in routing.scores]
    return GroupTrace(active, scores, states, start)
