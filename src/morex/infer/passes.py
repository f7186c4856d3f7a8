"""The model's forward in pieces, for tokens of many sequences at once, whatever their recursion.

The engine calls three of them: `enter` takes tokens through the prelude, `core` takes all that are under way in a
routed group through its blocks once, `leave` takes those whose router let them go through coda and head. In between
tokens travel in flights. What a token computes is what the model's own forward computes for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from morex.cache.slots import CallStore
from morex.cache.store import KVStore
from morex.depth.policy import DepthPolicy
from morex.depth.router import DepthRouter, Routing, Visit
from morex.depth.schedule import Step
from morex.infer.clock import Clock
from morex.infer.lists import PassLists
from morex.infer.trace import RequestTrace
from morex.infer.walk import Walked, Walks
from morex.model.lm import LanguageModel
from morex.model.stack import Pass, Record, RoutedGroup
from morex.nn.attention import Local
from morex.nn.block import WHOLE
from morex.nn.packing import Packing, pack_rows


@dataclass(eq=False)
class Segment:
    """Tokens of one sequence that travel together: a piece of a prompt, or one new token."""

    sequence: int
    start: int
    """Tokens of the sequence before these."""
    tokens: Sequence[int]
    policy: DepthPolicy
    owner: Any = None
    """Whose they are; nobody here looks at it."""
    reads: int = 1
    """After how many of the last tokens the next one's logits are asked for."""
    trace: RequestTrace | None = None
    """Where to write down what the tokens do, if anybody asks."""


@dataclass(eq=False)
class Flight:
    """Segments that wait for recursion r of a routed group. Rows of the packing are segments.

    All are under the same policy, and all or none are traced.
    """

    segments: list[Segment]
    packing: Packing
    h: Tensor
    injected: Tensor | None
    routing: Routing
    group: int
    recursion: int

    @property
    def policy(self) -> DepthPolicy:
        return self.routing.policy

    @property
    def is_traced(self) -> bool:
        return self.segments[0].trace is not None

    @property
    def key(self) -> tuple[int, bool, int, int]:
        """Flights with the same key can be joined."""
        return id(self.policy), self.is_traced, self.group, self.recursion

    def select(self, chosen: Sequence[int]) -> "Flight":
        """Some of the segments."""
        index, packing = self.packing.of_rows(chosen)
        injected = None if self.injected is None else self.injected[index]
        segments = [self.segments[i] for i in chosen]
        routing = self.routing.select(index, packing)
        return Flight(segments, packing, self.h.index_select(0, index), injected, routing, self.group, self.recursion)


@dataclass(eq=False)
class Arrived:
    """Segments that have been through the core: their states [N, D], rows of the packing."""

    segments: list[Segment]
    packing: Packing
    x: Tensor

    def select(self, chosen: Sequence[int]) -> "Arrived":
        """Some of the segments."""
        index, packing = self.packing.of_rows(chosen)
        return Arrived([self.segments[i] for i in chosen], packing, self.x.index_select(0, index))


def join_packings(packings: Sequence[Packing]) -> Packing:
    """The rows of several packings, one after another."""
    if len(packings) == 1:
        return packings[0].root()
    return _packed_together(packings, [count for packing in packings for count in packing.counts])


def join(flights: Sequence[Flight]) -> Flight:
    """One flight of all segments of several, which have the same key."""
    if len(flights) == 1:
        return flights[0]
    first, packing = flights[0], join_packings([flight.packing for flight in flights])
    routing = type(first.routing).join([flight.routing for flight in flights], packing)
    injected = None
    if first.injected is not None:
        injected = torch.cat([flight.injected for flight in flights if flight.injected is not None])
    h = torch.cat([flight.h for flight in flights])
    segments = [segment for flight in flights for segment in flight.segments]
    return Flight(segments, packing, h, injected, routing, first.group, first.recursion)


class Passes:
    """A model in eval mode and the store that its sequences are in."""

    def __init__(self, model: LanguageModel, store: KVStore) -> None:
        self.model, self.store, self.stack = model, store, model.stack
        self.schedule = model.config.schedule.resolved
        self.steps = {"prelude": self.schedule.prelude_steps, "coda": self.schedule.coda_steps}
        self.first_steps = [group.recursions[0] for group in self.schedule.groups]
        """Of each routed group."""
        self.device = model.embedding.weight.device
        self.clock = Clock()
        config = model.config
        self.mixes = not config.recursion_norms and config.lora is None and config.attention.global_every is None
        """Whether a block does the same at every recursion, so that tokens at different ones can share a pass."""
        self.parts_by_depth = config.windows_move
        self.walks = Walks()
        self.end = 0
        """All tokens that have entered stand before this place of their texts."""
        self.look_again()

    def look_again(self) -> None:
        """Somebody may have given the model other weights or modules, or have come to look inside."""
        groups: Any = self.stack.core.groups
        self.groups: list[RoutedGroup] = list(groups)
        self.walks.look_again()

    def enter(self, segments: Sequence[Segment]) -> tuple[list[Flight], list[Arrived]]:
        """Tokens through the prelude and up to the first recursion that somebody takes."""
        counts = [len(segment.tokens) for segment in segments]
        for segment in segments:
            if segment.trace is not None:
                segment.trace.begin(segment.start, len(segment.tokens))
        self.clock.entering += sum(counts)
        times = [time for segment in segments for time in range(segment.start, segment.start + len(segment.tokens))]
        self.end = max(self.end, max(times) + 1)
        time = torch.tensor(times, device=self.device)
        packing = pack_rows(counts, time, time, max(counts))
        tokens = torch.tensor([token for segment in segments for token in segment.tokens], device=self.device)
        x = self.model.embed(tokens, packing)
        x = self._once("prelude", x, packing, list(segments))
        return self._begin(0, Arrived(list(segments), packing, x))

    def core(self, group: int, flights: Sequence[Flight]) -> tuple[list[Flight], list[Arrived]]:
        """One pass through the blocks of a group, for all who wait for one of its recursions."""
        own = self.groups[group]
        router = own.router
        visits: list[tuple[Flight, Visit]] = []
        for flight in flights:
            visit = router.packed(flight.h, flight.routing, flight.recursion)
            if visit is not None:
                visits.append((flight, visit))
        for together in [visits] if self.mixes else [[visit] for visit in visits]:
            self._visit(group, own, together)
        going: list[Flight] = []
        done: list[Arrived] = []
        for flight in flights:
            flight.recursion += 1
            self._ask(flight, router, going, done)
        return self._onwards(group, going, done)

    def together(self, parts: Sequence[Arrived]) -> list[Arrived]:
        """What can leave in one pass: everybody, unless the depth of a policy says which steps see everything."""
        found: dict[int, list[Arrived]] = {}
        for part in parts:
            for rows in _alike(part.segments):
                own = part if len(rows) == len(part.segments) else part.select(rows)
                found.setdefault(own.segments[0].policy.recursions if self.parts_by_depth else 0, []).append(own)
        return [_joined(own) for own in found.values()]

    def leave(self, arrived: Arrived) -> Tensor:
        """Through coda and head -> the logits that segments ask for, one after another [n, V]."""
        x, packing = arrived.x, arrived.packing
        self.clock.leaving += packing.num_tokens
        x = self._once("coda", x, packing, arrived.segments)
        for segment in arrived.segments:
            self.store.advance(segment.sequence, len(segment.tokens))
        if sum(segment.reads for segment in arrived.segments) == packing.num_tokens:
            return self.model.read(x)
        asked: list[int] = []
        end = 0
        for segment, count in zip(arrived.segments, packing.counts, strict=True):
            end += count
            asked += range(end - segment.reads, end)
        return self.model.read(x[torch.tensor(asked, dtype=torch.int64, device=self.device)])

    def _visit(self, group: int, own: RoutedGroup, visits: Sequence[tuple[Flight, Visit]]) -> None:
        """The blocks of a group for the visiting tokens of some flights, brought back into these."""
        if not visits:
            return
        states, rows, recursions, counts = [], [], [], []
        for flight, visit in visits:
            self.clock.visits[flight.recursion] += visit.packing.num_tokens
            states.append(own.enter(flight.h, flight.injected, visit.packing, flight.recursion))
            here, there = flight.segments, visit.packing.counts
            if not visit.packing.is_full:
                here = [segment for segment, count in zip(here, there, strict=True) if count]
                there = [count for count in there if count]
            rows += here
            counts += there
            recursions += [flight.recursion] * len(here)
        packing = _packed_together([visit.packing for _, visit in visits], counts)
        steps, r = self.first_steps[group], recursions[0]
        lists = PassLists(self.store, self.stack.rule, steps[0].block, len(steps), rows, recursions, packing, self.end)
        key, walked = ("core", group, 0 if self.mixes else r), partial(self._core_steps, group, r)
        x = states[0] if len(states) == 1 else torch.cat(states)
        y = self.walks(key, walked, x, lists, self._windows(rows[0].policy))
        parts = [y] if len(states) == 1 else y.split([len(s) for s in states])
        for (flight, visit), part in zip(visits, parts, strict=True):
            flight.h = own.router.bring_back(flight.h, part, flight.routing, visit)

    def _once(self, name: str, x: Tensor, packing: Packing, segments: list[Segment]) -> Tensor:
        """The blocks of `prelude` or `coda`."""
        steps = self.steps[name]
        if not steps:
            return x
        lists = PassLists(
            self.store, "per_recursion", steps[0].block, len(steps), segments, [1] * len(segments), packing, self.end
        )
        key, walked = (name, 0, 0), partial(self._once_steps, name)
        return self.walks(key, walked, x, lists, self._windows(segments[0].policy))

    def _core_steps(self, group: int, r: int) -> list[Walked]:
        """What a group's tokens walk through at recursion r."""
        own = self.groups[group]
        found: list[Walked] = []
        for place, step in enumerate(self.first_steps[group]):
            i = step.block - self.schedule.prelude
            block: Any = self.stack.core.blocks[i]
            found.append((f"core.blocks.{i}", block, step._replace(recursion=r), own.parts(r, place)))
        return found

    def _once_steps(self, name: str) -> list[Walked]:
        """What `prelude` or `coda` is made of."""
        blocks, steps = getattr(self.stack, name), self.steps[name]
        return [(f"{name}.{i}", block, step, WHOLE) for i, (block, step) in enumerate(zip(blocks, steps, strict=True))]

    def _windows(self, policy: DepthPolicy) -> Callable[[Step], Local | None] | None:
        """What the attention of a step does otherwise, in a pass under this policy; None where every step sees all."""
        windows = self.stack.windows
        if windows is None:
            return None
        schedule = replace(self.schedule, recursions=policy.recursions)
        return lambda step: windows.at(schedule.place(step))

    def _begin(self, group: int, arrived: Arrived) -> tuple[list[Flight], list[Arrived]]:
        """Segments at the door of a group; past the last group they have arrived."""
        if group == len(self.groups):
            return [], [arrived]
        own = self.groups[group]
        router = own.router
        going: list[Flight] = []
        done: list[Arrived] = []
        for rows in _alike(arrived.segments):
            part = arrived if len(rows) == len(arrived.segments) else arrived.select(rows)
            policy = part.segments[0].policy
            injected = own.prepare(part.x)
            h, routing = router.begin(part.x, part.packing, policy)
            routing.with_stats = False
            if policy.kind == "exit":
                schedule = replace(self.schedule, recursions=policy.recursions)
                once = Pass(schedule, self.stack.windows, "per_recursion", None, CallStore(), Record(), part.packing)
                routing.peek = partial(self.stack.peek, once, self.model.read)
            self._ask(Flight(part.segments, part.packing, h, injected, routing, group, 1), router, going, done)
        return self._onwards(group, going, done)

    def _ask(self, flight: Flight, router: DepthRouter, going: list[Flight], done: list[Arrived]) -> None:
        """Asks who takes the next recursion; segments of which nobody does are asked for the one after, if need be."""
        # Who leaves does not come back, and no trace needs to hear so again and again.
        is_over = router.is_nested and not flight.is_traced
        while flight.recursion <= flight.policy.recursions:
            if not flight.is_traced:
                flight.routing.forget()
            router.ask(flight.h, flight.routing, flight.recursion)
            if not flight.is_traced:
                flight.routing.masks.clear()
            rows = _active_rows(flight)
            if len(rows) == len(flight.segments):
                going.append(flight)
                return
            if rows:
                part = flight.select(rows)
                part.routing.is_full = part.packing.width == 1
                going.append(part)
                left = sorted(set(range(len(flight.segments))) - set(rows))
                if is_over:
                    done.append(self._arrive(flight, router).select(left))
                    return
                flight = flight.select(left)
            elif is_over:
                break
            flight.recursion += 1
        done.append(self._arrive(flight, router))

    def _arrive(self, flight: Flight, router: DepthRouter) -> Arrived:
        """Segments as they leave their group."""
        h, _ = router.finish(flight.h, flight.routing)
        if flight.is_traced:
            self._note_depths(flight)
        return Arrived(flight.segments, flight.packing, h)

    def _note_depths(self, flight: Flight) -> None:
        name, end = f"stack.core.groups.{flight.group}.router", 0
        for segment, count in zip(flight.segments, flight.packing.counts, strict=True):
            start, end = end, end + count
            masks = [mask[start:end] for mask in flight.routing.masks]
            scores = [score[start:end] for score in flight.routing.scores]
            assert segment.trace is not None
            segment.trace.note_depths(name, range(segment.start, segment.start + count), masks, scores)

    def _onwards(self, group: int, going: list[Flight], done: list[Arrived]) -> tuple[list[Flight], list[Arrived]]:
        """Those who are done with a group, at the door of the next."""
        if not done or group + 1 == len(self.groups):
            return going, done
        more, arrived = self._begin(group + 1, _joined(done))
        return going + more, arrived


def _packed_together(packings: Sequence[Packing], counts: list[int]) -> Packing:
    """The tokens of several packings, one after another, without rows that have none; counts: of those that have."""
    if len(packings) == 1 and len(counts) == packings[0].rows:
        return packings[0].root()
    time = torch.cat([packing.time for packing in packings])
    positions = time
    if any(packing.positions is not packing.time for packing in packings):
        positions = torch.cat([packing.positions for packing in packings])
    return pack_rows(counts, time, positions, max(packing.span for packing in packings))


def _active_rows(flight: Flight) -> Sequence[int]:
    """The rows with an active token, ascending; where these are all tokens there are, the routing knows it after."""
    packing, routing = flight.packing, flight.routing
    if routing.is_full:
        return range(len(flight.segments))
    if packing.width > 1:
        return sorted(set(packing.row[routing.active].tolist()))
    rows = [row for row, is_active in enumerate(routing.active.tolist()) if is_active]
    routing.is_full = len(rows) == len(flight.segments)
    return rows


def _joined(parts: Sequence[Arrived]) -> Arrived:
    if len(parts) == 1:
        return parts[0]
    segments = [segment for part in parts for segment in part.segments]
    return Arrived(segments, join_packings([part.packing for part in parts]), torch.cat([part.x for part in parts]))


def _alike(segments: Sequence[Segment]) -> list[list[int]]:
    """Segments that can fly together."""
    found: dict[tuple[int, bool], list[int]] = {}
    for row, segment in enumerate(segments):
        found.setdefault((id(segment.policy), segment.trace is not None), []).append(row)
    return list(found.values())
