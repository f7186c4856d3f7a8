"""Both stores against lists of numbers: what was appended is what is read, whatever is forked, cut off and freed."""

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from morex.cache.contiguous import ContiguousStore
from morex.cache.paged import PagedStore, pages_within
from morex.cache.store import KVStore, OutOfPages
from morex.depth.schedule import Slot, Stream
from morex.nn.keys import NEVER, Keys
from morex.nn.packing import pack_batch

WIDTH, KV, DIM, PAGES, PAGE_SIZE = 2, 2, 3, 60, 4
STREAMS = [Slot(0, 1), Slot(0, 2)]
KINDS = ["contiguous", "paged"]
Entry = tuple[int, float]  # time and mark


def new_store(kind: str, pages: int = PAGES) -> KVStore:
    if kind == "contiguous":
        return ContiguousStore(sequences=2, room=3)
    return PagedStore(pages, PAGE_SIZE, KV, DIM)


class Told:
    """Sequences as dictionaries of lists, beside a store that is told the same."""

    def __init__(self, store: KVStore) -> None:
        self.store, self.mark = store, 0.0
        self.entries: dict[int, dict[Slot, list[Entry]]] = {}
        self.tokens: dict[int, int] = {}

    def open(self) -> int:
        sequence = self.store.open()
        assert sequence not in self.entries
        self.entries[sequence], self.tokens[sequence] = {first: [] for first in STREAMS}, 0
        return sequence

    def step(self, visits: list[tuple[int, int, int]]) -> None:
        """One pass: of each sequence so many tokens come by, and so many of them take the stream at this place.

        Args:
            visits: sequence, stream, tokens.
        """
        rows = [(sequence, STREAMS[stream]) for sequence, stream, _ in visits]
        counts = torch.tensor([count for *_, count in visits])
        start = torch.tensor([self.tokens[sequence] for sequence, _ in rows])
        packing = pack_batch((len(rows), max(1, int(counts.max()))), torch.device("cpu"), counts, start).root()
        if not packing.num_tokens:
            return
        lists = self.store.lists(rows, WIDTH, packing)
        marks = self.mark + torch.arange(1.0, packing.num_tokens + 1)
        self.mark += packing.num_tokens
        k = marks[:, None, None] + torch.arange(KV * DIM).view(KV, DIM) / 100
        empty = all(not self.entries[sequence][first] for sequence, first in rows)
        for place in range(WIDTH):
            assert lists.append(place, k + 1000 * place, -k) == empty
        for row, time, mark in zip(packing.row.tolist(), packing.time.tolist(), marks.tolist(), strict=True):
            sequence, first = rows[row]
            self.entries[sequence][first].append((time, mark))
        for sequence, _, count in visits:
            self.store.advance(sequence, count)
            self.tokens[sequence] += count

    def fork(self, sequence: int) -> None:
        new = self.store.fork(sequence)
        assert new not in self.entries
        self.entries[new] = {first: list(entries) for first, entries in self.entries[sequence].items()}
        self.tokens[new] = self.tokens[sequence]

    def truncate(self, sequence: int, tokens: int) -> None:
        self.store.truncate(sequence, tokens)
        self.tokens[sequence] = tokens
        for entries in self.entries[sequence].values():
            entries[:] = [(time, mark) for time, mark in entries if time < tokens]

    def free(self, sequence: int) -> None:
        self.store.free(sequence)
        del self.entries[sequence], self.tokens[sequence]

    def compare(self) -> None:
        """All lists of all sequences, in one read of both streams."""
        self.store.check()
        rows = [(sequence, first) for sequence in self.entries for first in STREAMS if self.entries[sequence][first]]
        for sequence, count in self.tokens.items():
            assert self.store.tokens(sequence) == count
            for first, entries in self.entries[sequence].items():
                for place in range(WIDTH):
                    assert self.store.num_entries(sequence, Stream(first, place, WIDTH)) == len(entries)
        if not rows:
            assert self.store.bytes() == 0
            return
        lists = self.store.lists(rows, WIDTH, None)
        for place in range(WIDTH):
            found = self.read(lists.gather(place), place)
            assert found == [self.entries[sequence][first] for sequence, first in rows]

    def read(self, keys: Keys, place: int) -> list[list[Entry]]:
        """Times and marks of each row; every channel and every value must tell the same mark."""
        found: list[list[Entry]] = []
        for k, v, time in zip(keys.k, keys.v, keys.time, strict=True):
            there = time != NEVER
            assert not there[int(there.sum()) :].any()
            own = k[there] - torch.arange(KV * DIM).view(KV, DIM) / 100
            assert torch.allclose(own, own[:, :1, :1].expand_as(own), atol=1e-3)
            torch.testing.assert_close(v[there], -(k[there] - 1000 * place), atol=1e-3, rtol=0)
            marks = (own[:, 0, 0] - 1000 * place).round().tolist()
            found.append(list(zip(time[there].tolist(), marks, strict=True)))
        return found


class Machine(RuleBasedStateMachine):
    """Random lives of sequences."""

    kind: str

    def __init__(self) -> None:
        super().__init__()
        self.told = Told(new_store(self.kind))
        self.told.step([(self.told.open(), 0, 3)])

    def one(self, who: int) -> int | None:
        known = sorted(self.told.entries)
        return known[who % len(known)] if known else None

    @rule()
    def open(self) -> None:
        if len(self.told.entries) < 6:
            self.told.open()

    @rule(data=st.data())
    def step(self, data: Any) -> None:
        known = sorted(self.told.entries)
        if not known:
            return
        chosen = data.draw(st.lists(st.sampled_from(known), unique=True, min_size=1))
        visits = [(who, data.draw(st.integers(0, 1)), data.draw(st.integers(0, 5))) for who in chosen]
        before = self.told.store.bytes()
        try:
            self.told.step(visits)
        except OutOfPages:
            assert self.told.store.bytes() == before

    @rule(who=st.integers(0, 99))
    def fork(self, who: int) -> None:
        sequence = self.one(who)
        if sequence is not None and len(self.told.entries) < 6:
            self.told.fork(sequence)

    @rule(who=st.integers(0, 99), share=st.floats(0, 1))
    def truncate(self, who: int, share: float) -> None:
        sequence = self.one(who)
        if sequence is not None:
            self.told.truncate(sequence, int(share * self.told.tokens[sequence]))

    @rule(who=st.integers(0, 99))
    def free(self, who: int) -> None:
        sequence = self.one(who)
        if sequence is not None:
            self.told.free(sequence)

    @invariant()
    def is_what_was_told(self) -> None:
        self.told.compare()


class Contiguous(Machine):
    kind = "contiguous"


class Paged(Machine):
    kind = "paged"


TestContiguous, TestPaged = Contiguous.TestCase, Paged.TestCase
TestContiguous.settings = TestPaged.settings = settings(max_examples=60, stateful_step_count=40)


@pytest.mark.parametrize("kind", KINDS)
def test_recursions_may_differ_within_a_pass(kind: str) -> None:
    """One row at recursion 1 beside one at recursion 2, as tokens of several requests have it."""
    told = Told(new_store(kind))
    a, b = told.open(), told.open()
    told.step([(a, 0, 3), (b, 0, 2)])
    told.step([(a, 1, 1), (b, 0, 1)])
    told.step([(b, 1, 2), (a, 0, 5)])
    told.compare()
    assert [time for time, _ in told.entries[a][STREAMS[1]]] == [3]


def test_forks_share_pages_until_they_write() -> None:
    store = PagedStore(20, PAGE_SIZE, KV, DIM)
    told = Told(store)
    told.step([(told.open(), 0, 6)])
    alone, taken = store.bytes(), store.pool.num_free
    told.fork(0)
    assert store.bytes() == alone and store.pool.num_free == taken
    told.step([(1, 0, 1)])  # the second page of both places is copied, the first stays shared
    assert taken - store.pool.num_free == WIDTH
    assert store.bytes() == alone + (2 + 1) * WIDTH * store.entry_bytes
    told.compare()
    told.free(0)
    told.compare()
    told.free(1)
    assert store.pool.num_free == 20


def test_a_full_store_says_so_and_keeps_what_it_has() -> None:
    store = PagedStore(4, PAGE_SIZE, KV, DIM)
    told = Told(store)
    told.step([(told.open(), 0, 5)])
    free = store.pool.num_free
    with pytest.raises(OutOfPages, match="2 pages are needed and 0 of 4 are free"):
        told.step([(0, 0, 4)])
    assert store.pool.num_free == free
    told.compare()
    told.step([(0, 0, 3)])  # what fits still goes in
    told.compare()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_broke_off_is_undone_by_truncating_to_what_was_there(kind: str) -> None:
    told = Told(new_store(kind))
    told.step([(told.open(), 0, 3)])
    packing = pack_batch((1, 2), torch.device("cpu"), start=torch.tensor([3]))
    lists = told.store.lists([(0, STREAMS[0])], WIDTH, packing)
    lists.append(0, torch.ones(2, KV, DIM), torch.ones(2, KV, DIM))  # and never at place 1
    with pytest.raises(AssertionError, match="length"):
        told.store.check()
    told.truncate(0, 3)
    told.compare()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [-1, 4])
def test_impossible_lengths_are_refused(kind: str, tokens: int) -> None:
    told = Told(new_store(kind))
    told.step([(told.open(), 0, 3)])
    with pytest.raises(ValueError, match=rf"sequence of 3 tokens cannot be truncated to {tokens}"):
        told.store.truncate(0, tokens)


def test_bytes_that_hold_no_page_are_refused() -> None:
    assert pages_within(1000, 4, 50) == 5
    with pytest.raises(ValueError, match=r"cache_bytes 199 holds no page of 4 entries \(200 bytes\)"):
        pages_within(199, 4, 50)


def test_a_lost_page_is_found() -> None:
    store = PagedStore(8, PAGE_SIZE, KV, DIM)
    told = Told(store)
    told.step([(told.open(), 0, 6)])
    tables, number = store._lists[0][STREAMS[0]]
    tables.counts[number] -= 1
    with pytest.raises(AssertionError, match="held by others"):
        store.check()
