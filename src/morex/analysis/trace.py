"""Decisions of the routers, token by token, as numpy arrays; and the file that other tools read them from.

A trace file is an `.npz` of plain arrays, read without unpickling. B windows, T tokens, R recursions, S expert
steps, K chosen of E experts, C choices of an expert layer; GROUP and LAYER are module paths.

| array | shape, type | meaning |
|---|---|---|
| `format` | [], int | version of this format, 1 |
| `config` | [], text | the model's config as JSON |
| `policy` | [], text | who decided the depth: `router`, `oracle`, or the policy that the caller gave |
| `tokens` | [B, T], int | token ids |
| `lengths` | [B], int | true lengths of the rows; what follows is padding |
| `depth` | [B, T], int | recursions taken, summed over groups; 0 for padding |
| `difficulty` | [B], int | optional: of the examples of a task |
| `token_class` | [B, T], int | optional: place in `token_class_names` |
| `token_rarity` | [B, T], int | optional: place in `token_rarity_names` |
| `active/GROUP` | [R, B, T], bool | tokens that took recursion r |
| `scores/GROUP` | [R, B, T], float | scores of the candidates, NaN elsewhere; absent for routers that score nothing |
| `start/GROUP` | [R, B, T], float | norm of the state before recursion r |
| `moved/GROUP` | [R, B, T], float | norm of the difference that recursion r made to the state |
| `cosine/GROUP` | [R, B, T], float | cosine between the states before and after; NaN where one of them is zero |
| `experts/LAYER` | [C, B, T, K], int | experts chosen; -1 where a token did not come by |
| `expert_logits/LAYER` | [C, B, T, E], float | logits of the choice; NaN where a token did not come by |
| `expert_steps/LAYER` | [C, B, T, K], int | optional: steps taken in each chosen expert, where a router decides; -1 where a token did not come by |
| `expert_calls/LAYER` | [C, 2], int | recursion and expert step of each choice, from 1 |
| `expert_entropy/LAYER` | [C, B, T], float | optional: entropy of the router in nats before `entropy_floor` raised it; NaN where a token did not come by |
| `expert_start`, `expert_moved`, `expert_cosine` `/LAYER` | [R S, B, T], float | optional: as for groups, for layers with a state that recurs, at place (r - 1) S + s - 1 step s of recursion r; the states of a token in its K experts count as one vector; NaN where a token did not come by |
"""  # noqa: E501

import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from morex.analysis.vocabulary import CLASSES, RARITIES
from morex.config import ModelConfig
from morex.data.errors import DataError
from morex.files import write_whole
from morex.loading import ConfigError, decides_steps, validate
from morex.model.trace import GroupTrace, Trace
from morex.nn.moves import move
from morex.nn.signals import Choice
from morex.sections.mixers import FeedForwardConfig

Array = NDArray[Any]
FORMAT = 1
WHOLE = ("tokens", "lengths", "depth")


@dataclass(frozen=True)
class Moves:
    """How far each of so many steps moved the state of each token; all [steps, B, T]."""

    start: Array
    """Norm of the state before the step."""
    moved: Array
    """Norm of the difference that the step made."""
    cosine: Array
    """Cosine between the states before and after; NaN where one of them is zero."""

    @property
    def change(self) -> Array:
        """Difference over the state before; NaN where that is zero."""
        return np.divide(self.moved, self.start, out=np.full_like(self.moved, np.nan), where=self.start > 0)


@dataclass(frozen=True)
class GroupDecisions:
    """One routed group; entry r - 1 is recursion r."""

    active: Array
    """[R, B, T], bool."""
    scores: Array | None
    """[R, B, T]; NaN for tokens that were no candidates."""
    moves: Moves


@dataclass(frozen=True)
class LayerDecisions:
    """One expert layer; entry c is its c-th choice."""

    calls: Array
    """Recursion and expert step of each choice [C, 2], from 1."""
    experts: Array
    """[C, B, T, K]; -1 where a token did not come by."""
    logits: Array
    """[C, B, T, E]; NaN likewise."""
    moves: Moves | None
    """Of each step of layers with a state that recurs, recursion by recursion [R S, B, T]; NaN where a token did not
    come by. The states of a token in its K experts count as one vector."""
    steps: Array | None = None
    """Steps taken in each chosen expert [C, B, T, K], where a router decides; -1 where a token did not come by."""
    entropy: Array | None = None
    """Entropy of the router in nats [C, B, T] before a floor raised it, where there may be one; NaN likewise."""


@dataclass(frozen=True)
class Decisions:
    """What the routers of a model did with a batch of tokens."""

    config: ModelConfig
    policy: str
    """`router`, `oracle`, or the depth policy that the caller gave."""
    tokens: Array
    """[B, T]."""
    lengths: Array
    """[B]."""
    depth: Array
    """[B, T]."""
    groups: dict[str, GroupDecisions] = field(default_factory=dict)
    layers: dict[str, LayerDecisions] = field(default_factory=dict)
    token_class: Array | None = None
    """[B, T], place in `vocabulary.CLASSES`."""
    token_rarity: Array | None = None
    """[B, T], place in `vocabulary.RARITIES`."""
    difficulty: Array | None = None
    """Of the examples of a task [B]."""

    @property
    def real(self) -> Array:
        """Tokens that are no padding [B, T], bool."""
        mask: Array = np.arange(self.tokens.shape[1])[None] < self.lengths[:, None]
        return mask


def decisions(
    trace: Trace,
    tokens: Tensor,
    lengths: Tensor | None,
    config: ModelConfig,
    policy: str = "router",
    token_class: Array | None = None,
    token_rarity: Array | None = None,
    difficulty: Tensor | None = None,
    recursions: int = 0,
) -> Decisions:
    """A trace as arrays of one size whatever the tokens did.

    Args:
        trace: `Output.trace`.
        tokens: ids that the model saw [B, T].
        lengths: true lengths of the rows [B]; None where all are full.
        config: of the model.
        policy: who decided the depth.
        token_class: class of each token id of the vocabulary [V], from `vocabulary.token_classes`.
        token_rarity: likewise, from `vocabulary.token_rarities`.
        difficulty: of the examples of a task [B].
        recursions: how many a group lists at least, where other batches may take more than this one.
    """
    ids = tokens.cpu().numpy()
    groups = {name: _group(group, recursions) for name, group in trace.groups.items()}
    return Decisions(
        config=config,
        policy=policy,
        tokens=ids,
        lengths=np.full(ids.shape[0], ids.shape[1]) if lengths is None else lengths.cpu().numpy(),
        depth=trace.depth.cpu().numpy(),
        groups=groups,
        layers={name: _layer(name, trace, config, groups) for name in expert_layers(config)},
        token_class=None if token_class is None else token_class[ids],
        token_rarity=None if token_rarity is None else token_rarity[ids],
        difficulty=None if difficulty is None else difficulty.cpu().numpy(),
    )


def expert_layers(config: ModelConfig) -> list[str]:
    """Module paths of a model's expert routers, in the order of the schedule; empty without expert layers."""
    if isinstance(config.mixer, FeedForwardConfig):
        return []
    schedule = config.schedule.resolved
    counts = {"prelude": schedule.prelude, "core.blocks": schedule.core, "coda": schedule.coda}
    return [f"stack.{part}.{i}.mixer.router" for part, count in counts.items() for i in range(count)]


def _group(group: GroupTrace, recursions: int) -> GroupDecisions:
    """Recursions that are not there are recursions that nobody took."""
    active, scores, states = list(group.active), list(group.scores), [group.start, *group.states]
    missing = max(0, recursions - len(active))
    active += [torch.zeros_like(active[0])] * missing
    states += [states[-1]] * missing
    if scores:
        scores += [torch.full_like(scores[0], torch.nan)] * missing
    return GroupDecisions(
        active=np.stack([_array(mask) for mask in active]),
        scores=np.stack([_array(score) for score in scores]) if scores else None,
        moves=_moves(states),
    )


def _moves(states: Sequence[Tensor]) -> Moves:
    """Between neighbours of so many states [B, T, D]."""
    return Moves(
        *np.stack([_array(move(before, after)) for before, after in pairwise(states)], -2).transpose(3, 2, 0, 1)
    )


def _layer(name: str, trace: Trace, config: ModelConfig, groups: dict[str, GroupDecisions]) -> LayerDecisions:
    """All choices that a layer can make, those of recursions that nobody took included."""
    mixer = config.mixer
    assert not isinstance(mixer, FeedForwardConfig)
    steps = mixer.num_steps if mixer.routes_every_step else 1
    visited = [True]
    if ".core." in name:
        block = name.split(".")[3] if config.schedule.resolved.order == "sequence" else "0"
        active = groups[f"stack.core.groups.{block}"].active
        visited = [bool(mask.any()) for mask in active]
    made = iter(trace.choices.get(name, []))
    rows, time = trace.depth.shape
    experts = np.full((len(visited) * steps, rows, time, mixer.router.top_k), -1, np.int16)
    logits = np.full((len(visited) * steps, rows, time, mixer.router.experts), np.nan, np.float32)
    entropy = np.full(logits.shape[:3], np.nan, np.float32) if mixer.routes_every_step else None
    moved = np.full((len(visited), mixer.num_steps, rows, time, 3), np.nan, np.float32) if mixer.has_states else None
    taken = np.full_like(experts, -1) if decides_steps(config) else None
    for r, is_visited in enumerate(visited):
        choices: list[Choice] = [next(made) for _ in range(steps)] if is_visited else []
        for c, choice in enumerate(choices, start=r * steps):
            experts[c], logits[c] = _array(choice.experts), _array(choice.logits)
            if taken is not None and choice.steps is not None:
                taken[c] = _array(choice.steps)
            if entropy is not None and choice.entropy is not None:
                entropy[c] = _array(choice.entropy)
        moves = [_array(choice.moves) for choice in choices if choice.moves is not None]
        if moved is not None and moves:
            moved[r] = np.concatenate(moves, 2).transpose(2, 0, 1, 3)
    calls = [(r, s) for r in range(1, len(visited) + 1) for s in range(1, steps + 1)]
    of_steps = None if moved is None else Moves(*np.moveaxis(moved.reshape(-1, rows, time, 3), -1, 0))
    return LayerDecisions(np.array(calls), experts, logits, of_steps, taken, entropy)


def join(parts: Sequence[Decisions]) -> Decisions:
    """Batches of one model, one after another; rows of a shorter batch are padded to the longest."""
    time = max(part.tokens.shape[1] for part in parts)
    first = parts[0]

    def put(arrays: Sequence[Array], axis: int, empty: Any) -> Array:
        """Arrays [..., B, T, ...] with B at `axis`, along B."""
        padded = []
        for array in arrays:
            room = [(0, 0)] * array.ndim
            room[axis + 1] = (0, time - array.shape[axis + 1])
            padded.append(np.pad(array, room, constant_values=empty))
        return np.concatenate(padded, axis)

    def moves(of: Sequence[Moves]) -> Moves:
        names = ("start", "moved", "cosine")
        return Moves(*(put([getattr(one, name) for one in of], 1, np.nan) for name in names))

    groups = {}
    for name, group in first.groups.items():
        own = [part.groups[name] for part in parts]
        scores = None if group.scores is None else put([g.scores for g in own if g.scores is not None], 1, np.nan)
        groups[name] = GroupDecisions(put([g.active for g in own], 1, False), scores, moves([g.moves for g in own]))
    layers = {}
    for name, layer in first.layers.items():
        of = [part.layers[name] for part in parts]
        moved = None if layer.moves is None else moves([part.moves for part in of if part.moves is not None])
        experts, logits = put([p.experts for p in of], 1, -1), put([p.logits for p in of], 1, np.nan)
        steps = None if layer.steps is None else put([p.steps for p in of if p.steps is not None], 1, -1)
        entropy = None if layer.entropy is None else put([p.entropy for p in of if p.entropy is not None], 1, np.nan)
        layers[name] = LayerDecisions(layer.calls, experts, logits, moved, steps, entropy)
    optional = {
        name: put([getattr(part, name) for part in parts], 0, 0)
        for name in ("token_class", "token_rarity")
        if getattr(first, name) is not None
    }
    whole = {name: put([getattr(part, name) for part in parts], 0, 0) for name in ("tokens", "depth")}
    whole["lengths"] = np.concatenate([part.lengths for part in parts])
    if first.difficulty is not None:
        optional["difficulty"] = np.concatenate([part.difficulty for part in parts if part.difficulty is not None])
    return Decisions(first.config, first.policy, groups=groups, layers=layers, **whole, **optional)


def save_trace(
    path: str | Path, trace: Trace, tokens: Tensor, lengths: Tensor | None, config: ModelConfig, policy: str = "router"
) -> None:
    """Writes the trace of one forward pass as a trace file, whole or not at all; arguments as of `decisions`."""
    write_trace(path, decisions(trace, tokens, lengths, config, policy))


def write_trace(path: str | Path, found: Decisions) -> None:
    """Writes a trace file, whole or not at all. Raises OSError where the disk is full or not writable."""
    arrays: dict[str, Array] = {
        "format": np.array(FORMAT),
        "config": np.array(json.dumps(found.config.model_dump(mode="json"))),
        "policy": np.array(found.policy),
        **{name: getattr(found, name) for name in WHOLE},
    }
    for name, known in (("token_class", CLASSES), ("token_rarity", RARITIES)):
        if getattr(found, name) is not None:
            arrays |= {name: getattr(found, name), f"{name}_names": np.array(known)}
    if found.difficulty is not None:
        arrays["difficulty"] = found.difficulty
    for name, group in found.groups.items():
        arrays[f"active/{name}"] = group.active
        if group.scores is not None:
            arrays[f"scores/{name}"] = group.scores
        arrays |= {f"{key}/{name}": value for key, value in vars(group.moves).items()}
    for name, layer in found.layers.items():
        arrays |= {f"experts/{name}": layer.experts, f"expert_logits/{name}": layer.logits}
        arrays[f"expert_calls/{name}"] = layer.calls
        if layer.steps is not None:
            arrays[f"expert_steps/{name}"] = layer.steps
        if layer.entropy is not None:
            arrays[f"expert_entropy/{name}"] = layer.entropy
        if layer.moves is not None:
            arrays |= {f"expert_{key}/{name}": value for key, value in vars(layer.moves).items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_whole(Path(path), buffer.getvalue())


DAMAGE = (ValueError, TypeError, IndexError)
"""What arrays that do not fit together end in, wherever they meet."""


def damaged(path: str | Path, error: Exception) -> DataError:
    """What is said about a trace file that ended in this error."""
    return DataError(f"'{path}' is no trace file of morex or is damaged ({' '.join(str(error).split())})")


def load_trace(path: str | Path) -> Decisions:
    """Reads a trace file; nothing is unpickled.

    Raises:
        DataError: it is no trace file, of another format, or a part of it is missing or does not fit.
        OSError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        version = int(arrays.get("format", -1))
        if version == FORMAT:
            return _read(arrays)
    except (*DAMAGE, KeyError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error, ConfigError) as error:
        raise damaged(path, error) from None
    raise DataError(f"trace file '{path}' has format {version}; this version reads {FORMAT}")


def _read(arrays: dict[str, Array]) -> Decisions:
    def named(kind: str) -> list[str]:
        return [name.partition("/")[2] for name in arrays if name.startswith(f"{kind}/")]

    def moves(prefix: str, name: str) -> Moves:
        return Moves(*(arrays[f"{prefix}{key}/{name}"] for key in ("start", "moved", "cosine")))

    groups = {
        name: GroupDecisions(arrays[f"active/{name}"], arrays.get(f"scores/{name}"), moves("", name))
        for name in named("active")
    }
    layers = {
        name: LayerDecisions(
            arrays[f"expert_calls/{name}"],
            arrays[f"experts/{name}"],
            arrays[f"expert_logits/{name}"],
            moves("expert_", name) if f"expert_moved/{name}" in arrays else None,
            arrays.get(f"expert_steps/{name}"),
            arrays.get(f"expert_entropy/{name}"),
        )
        for name in named("experts")
    }
    for name, known in (("token_class", CLASSES), ("token_rarity", RARITIES)):
        if name in arrays and tuple(arrays[f"{name}_names"].tolist()) != known:
            raise ValueError(f"{name}_names are not {', '.join(known)}")
        if name in arrays and arrays[name].max(initial=0) >= len(known):
            raise ValueError(f"{name} has a number beyond those of {name}_names")
    found = Decisions(
        config=validate(ModelConfig, json.loads(str(arrays["config"]))),
        policy=str(arrays["policy"]),
        groups=groups,
        layers=layers,
        token_class=arrays.get("token_class"),
        token_rarity=arrays.get("token_rarity"),
        difficulty=arrays.get("difficulty"),
        **{name: arrays[name] for name in WHOLE},
    )
    frame = found.tokens.shape
    if not ((found.lengths >= 0) & (found.lengths <= frame[1])).all():
        raise ValueError(f"lengths are not from 0 to {frame[1]}")
    if found.tokens.size and not 0 <= found.tokens.min() <= found.tokens.max() < found.config.vocab_size:
        raise ValueError(f"tokens are not from 0 to {found.config.vocab_size - 1}")
    for what, array in (
        ("depth", found.depth),
        *((f"active/{name}", group.active[0]) for name, group in groups.items()),
        *((f"experts/{name}", layer.experts[0, ..., 0]) for name, layer in layers.items()),
    ):
        if array.shape != frame:
            raise ValueError(f"{what} has the frame {list(array.shape)} and tokens {list(frame)}")
    for name, group in groups.items():
        if group.active.shape != group.moves.moved.shape:
            raise ValueError(f"active/{name} and moved/{name} have different recursions")
    return found


def _wide(x: Tensor) -> Tensor:
    """In float32 or better: norms of half-precision states are rounded too much."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _array(x: Tensor) -> Array:
    return (x if x.dtype == torch.bool or not x.is_floating_point() else _wide(x)).cpu().numpy()
