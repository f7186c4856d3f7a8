"""Decoding from either store is the same, for every model; and sequences that fork or are cut off go on rightly."""

from typing import Any

import pytest
import torch
from torch import Tensor

from morex.cache.batch import KVCache
from parity.helpers import LM_CASES, config_of, eval_model, largest_change, pad, ragged_rows

CUTS = [[5, 3, 4], [1, 4, 1], [1, 1, 1], [4, 2, 3]]
"""Lengths of three rows, call by call."""
PAGE_SIZE = 3


def decode(model: Any, rows: list[Tensor], cache: KVCache) -> list[Tensor]:
    """Logits [T, V] of each row, fed by `CUTS`."""
    pieces: list[list[Tensor]] = [[] for _ in rows]
    done = [0] * len(rows)
    for sizes in CUTS:
        tokens, lengths = pad([row[i : i + size] for row, i, size in zip(rows, done, sizes, strict=True)])
        logits = model(tokens, lengths=lengths, cache=cache).logits
        for index, size in enumerate(sizes):
            pieces[index].append(logits[index, :size])
            done[index] += size
    return [torch.cat(piece) for piece in pieces]


@torch.no_grad()
@pytest.mark.parametrize("case", LM_CASES)
def test_a_paged_store_is_as_good_as_a_contiguous_one(case: str) -> None:
    """The same logits and the same bytes, in pages that end in the middle of every chunk."""
    model: Any = eval_model(case)
    rows = ragged_rows(case, [sum(sizes) for sizes in zip(*CUTS, strict=True)])
    plain, paged = model.new_cache(3), model.new_cache(3, store=model.new_store(2**22, PAGE_SIZE))
    for ours, theirs in zip(decode(model, rows, paged), decode(model, rows, plain), strict=True):
        assert largest_change(ours, theirs) <= 1e-12
    assert paged.bytes() == plain.bytes()
    assert paged.seen.tolist() == plain.seen.tolist() == [len(row) for row in rows]
    for cache in (plain, paged):
        cache.store.check()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("case", LM_CASES)
def test_forks_and_cuts_go_on_as_if_nothing_had_been(case: str, kind: str) -> None:
    """A prefix that two texts share is read once; a text that is cut off and goes on elsewhere is that other text."""
    model: Any = eval_model(case)
    store = model.new_store(2**22, PAGE_SIZE) if kind == "paged" else None
    first, second = ragged_rows(case, [12, 12])
    second = torch.cat([first[:5], second[5:]])
    cache = model.new_cache(1, store=store)
    model(first[None, :5], cache=cache)
    schedule = config_of(case).schedule.resolved
    both = KVCache(cache.store, [*cache.sequences, cache.store.fork(cache.sequences[0])], schedule)
    logits = model(torch.stack([first[5:], second[5:]]), cache=both).logits
    for row, text in enumerate((first, second)):
        assert largest_change(logits[row], model(text[None]).logits[0, 5:]) <= 1e-9
    cache.store.truncate(both.sequences[1], 7)
    third = torch.cat([second[:7], first[7:]])
    again = KVCache(cache.store, both.sequences[1:], schedule)
    assert largest_change(model(third[None, 7:], cache=again).logits, model(third[None]).logits[:, 7:]) <= 1e-9
    cache.store.check()
    for sequence in both.sequences:
        cache.store.free(sequence)
    cache.store.check()
    assert cache.store.bytes() == 0
