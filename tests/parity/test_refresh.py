"""The KV rule `refresh` by itself: latest visits against a dictionary, and what it is where nobody stops early."""

from typing import Any

import pytest
import torch

import morex
from morex.cache.batch import KVCache
from morex.cache.contiguous import ContiguousStore
from morex.cache.latest import LatestVisits
from morex.cache.slots import CallStore, SlotStore
from morex.depth.schedule import Schedule, Slot
from morex.nn.keys import NEVER
from morex.nn.packing import Packing, pack_batch
from parity.helpers import build, config_of, eval_model, largest_change, load, pad, ragged_rows, random_tokens

# Who takes recursion 1, 2, 3 and 4: nested, not nested, nobody at one of them, and nobody at first.
VISITS: dict[str, list[float]] = {
    "nested": [1.0, 0.6, 0.3, 0.1],
    "not nested": [0.4, 0.7, 0.2, 0.9],
    "nobody in between": [1.0, 0.0, 0.5, 0.0],
    "nobody at first": [0.0, 0.5, 0.5, 1.0],
}
Latest = dict[tuple[int, int], tuple[int, float]]  # (row, time) -> (recursion, mark) of the latest visit


def visit(
    store: LatestVisits, batch: Packing, share: float, r: int, latest: Latest, draws: torch.Generator
) -> Packing | None:
    """Some tokens of the batch come by recursion r, each with a mark of its own, which is also written down."""
    index = (torch.rand(batch.num_tokens, generator=draws) < share).nonzero().squeeze(1)
    if not len(index):
        return None
    packing = batch.root().select(index)
    marks = torch.rand(len(index), 1, 1, generator=draws, dtype=torch.float64)
    store.append(Slot(0, r), marks, -marks, packing)
    for row, time, mark in zip(packing.row.tolist(), packing.time.tolist(), marks.flatten().tolist(), strict=True):
        latest[row, time] = (r, mark)
    return packing


@pytest.mark.parametrize("kept", [True, False], ids=["cache", "one call"])
@pytest.mark.parametrize("name", VISITS)
def test_latest_visits_are_those_of_a_dictionary(name: str, kept: bool) -> None:
    """Chunks of different lengths; each query of recursion r finds the latest visit up to r of every earlier token."""
    draws, rows = torch.Generator().manual_seed(4), 3
    contiguous = ContiguousStore(rows, room=2)
    cache = KVCache(contiguous, [contiguous.open() for _ in range(rows)], Schedule(0, 1, 0, len(VISITS)))
    history: list[Latest] = [{} for _ in VISITS[name]]  # latest visits up to recursion r = 1..4
    for lengths in ([5, 2, 3], [1, 0, 4], [1, 1, 1]) if kept else ([7, 1, 4],):
        batch = pack_batch((rows, max(lengths)), torch.device("cpu"), torch.tensor(lengths), cache.seen)
        batch = batch.root()
        store: SlotStore = cache if kept else CallStore()
        latest_visits, now = LatestVisits(store, batch), Latest()
        for r, share in enumerate(VISITS[name], start=1):
            packing = visit(latest_visits, batch, share, r, now, draws)
            history[r - 1].update(now)
            if packing is None:
                continue
            keys = latest_visits.read(Slot(0, r))
            there = (keys.time != NEVER).nonzero().tolist()
            asked = {row for row, length in enumerate(lengths) if length}
            found = {(b, int(keys.time[b, s])): keys.k[b, s].item() for b, s in there if b in asked}
            assert found == {place: mark for place, (_, mark) in history[r - 1].items() if place[0] in asked}
            assert torch.equal(keys.v, -keys.k)
        if kept:
            cache.advance(batch)


@pytest.mark.parametrize("depth", [None, "uniform:2", 1])
def test_where_nobody_stops_it_is_per_recursion(depth: int | str | None) -> None:
    tokens = random_tokens("recursive")
    own: Any = build(load("recursive", "model.kv=refresh").model).eval()
    plain: Any = build(load("recursive", "model.kv=per_recursion").model).eval()
    assert torch.equal(own(tokens, depth=depth).logits, plain(tokens, depth=depth).logits)


@pytest.mark.parametrize("case", ["expert+refresh", "act+refresh", "token+refresh"])
def test_early_tokens_stay_in_sight(case: str) -> None:
    """The rules differ where tokens stop early."""
    model, tokens = eval_model(case), random_tokens(case)
    other: Any = morex.build_model(config_of(case).model_copy(update={"kv": "shared_first"}), dtype=torch.float64)
    other.load_state_dict(model.state_dict())
    assert largest_change(model(tokens).logits, other.eval()(tokens).logits) > 1e-4


def test_a_recursion_that_nobody_takes() -> None:
    """Nobody is active at recursion 2, some are at 3, which read what recursion 1 left: with and without a cache."""
    change = "model.depth={kind: expert_choice, hierarchical: false, capacities: [1.0, 0.5, 0.5]}"
    model: Any = build(load("expert+refresh", change).model).eval()
    router = model.stack.core.groups[0].router
    with torch.no_grad():
        router.score["1"].weight.zero_()
        router.score["1"].register_forward_hook(lambda module, inputs, output: output - 1.0)
    rows = ragged_rows("expert+refresh", [9, 4])
    tokens, lengths = pad(rows)
    out = model(tokens, lengths=lengths, return_trace=True)
    first, second, third = next(iter(out.trace.active.values()))
    assert not second.any()
    assert 0 < third.sum() < first.sum()
    with torch.no_grad():
        cache = model.new_cache(2)
        model(tokens[:, :3], cache=cache)
        rest = model(tokens[:, 3:], lengths=lengths - 3, cache=cache).logits
    for row, length in enumerate(lengths.tolist()):
        assert largest_change(rest[row, : length - 3], out.logits[row, 3:length]) <= 1e-9


def test_it_keeps_every_visit() -> None:
    """Its cache is that of `per_recursion`, at the same routes."""
    for depth in ("uniform:2", "adaptive:8"):
        sizes = set()
        for case in ("expert+refresh", "mor-expert"):
            model: Any = eval_model(case)
            cache = model.new_cache(2)
            model(random_tokens(case), cache=cache, depth=depth)
            sizes.add(cache.bytes())
        assert len(sizes) == 1
