"""Claims of entries: the kernel and the arrays do the same."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from morex.cache.pages import PagePool
from morex.cache.store import OutOfPages
from morex.cache.tables import FIRST, Claim, PageTables
from morex.nn import fast
from morex.nn.keys import NEVER

SIZE = 4
needs_compiler = pytest.mark.skipif(not fast.is_native(), reason="there is no C++ compiler on this machine")


def new_tables(width: int, pages: int) -> tuple[PageTables, Tensor]:
    """Tables of a pool of so many pages, and the times of all its entries."""
    return PageTables(width, PagePool(pages)), torch.full((pages, SIZE), NEVER)


def claims(tables: PageTables, numbers: list[int], added: list[int], times: Tensor, start: int) -> list[Claim]:
    """A claim by the kernel, and the same by arrays; lists whose last page others may hold get it for their own."""
    time = torch.arange(start, start + sum(added))
    found = []
    for is_fast in (True, False):
        own = tables if not is_fast else copy.deepcopy(tables)
        written = times if not is_fast else times.clone()
        with fast.enabled(is_fast):
            claim = own.claim(numbers, added, time, written)
        own.pool.check(page for number in range(len(own.counts)) for page in own.all_pages(number))
        parts = own.lengths, own.counts, own.pages, own.pool.counts, own.pool.free[: own.pool.num_free], written
        found.append((claim, [part.tolist() for part in parts]))
    (first, state), (second, expected) = found
    assert state == expected
    if isinstance(first, list) or isinstance(second, list):
        assert first == second and isinstance(first, list)
        tables.is_forked[first] = False
        return claims(tables, numbers, added, times, start)
    return [first, second]


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 5))
def test_the_kernel_claims_what_the_arrays_claim(data: st.DataObject, width: int) -> None:
    """Over many passes of any rows, with lists that have no pages yet, and lists that may share their last one."""
    tables, times = new_tables(width, 2000)
    lists = [tables.open() for _ in range(data.draw(st.integers(1, 20)))]
    start = 0
    for _ in range(4):
        numbers = data.draw(st.lists(st.sampled_from(lists), min_size=1, unique=True))
        added = data.draw(st.lists(st.integers(0, 9), min_size=len(numbers), max_size=len(numbers)))
        if not sum(added):
            continue
        tables.is_forked[data.draw(st.sampled_from(lists))] = data.draw(st.booleans())
        before = tables.lengths[numbers].tolist()
        first, second = claims(tables, numbers, added, times, start)
        start += sum(added)
        assert first.is_fresh == second.is_fresh == (not any(before))
        for name in ("where", "numbers", "row", "start", "end"):
            one, other = getattr(first, name), getattr(second, name)
            assert one.dtype == other.dtype and torch.equal(one, other), name
        entries = [
            place for length, count in zip(before, added, strict=True) for place in range(length, length + count)
        ]
        assert first.end.tolist() == [entry + 1 for entry in entries]
        pages = tables.pages[first.numbers.tolist(), :, [entry // SIZE for entry in entries]]
        assert (first.where.T // SIZE).tolist() == pages.tolist()


@pytest.mark.parametrize("is_fast", [pytest.param(True, marks=needs_compiler), False])
def test_what_stands_in_the_way_is_said_and_nothing_done(is_fast: bool) -> None:
    """A page that others may hold, and a pool that has not enough."""
    tables, times = new_tables(2, 8)
    fresh, shared, fine = (tables.open() for _ in range(3))
    for number in (shared, fine):
        tables.extend(number, tables.pool.take(2))
        tables.lengths[number] = 2
    tables.is_forked[shared] = True
    before = [tables.lengths.tolist(), tables.pages.tolist(), list(tables.pool.counts)]
    with fast.enabled(is_fast):
        assert tables.claim([fresh, shared, fine], [5, 1, 2], torch.arange(8), times) == [shared]
        with pytest.raises(OutOfPages, match="6 pages are needed and 4 of 8 are free"):
            tables.claim([fresh, fine], [9, 2], torch.arange(11), times)
        assert before == [tables.lengths.tolist(), tables.pages.tolist(), list(tables.pool.counts)]
        assert bool((times == NEVER).all()) and tables.pool.num_free == 4
        found = tables.claim([fresh, fine], [5, 2], torch.arange(7), times)
    assert isinstance(found, Claim) and tables.pool.num_free == 0
    assert tables.lengths[[fresh, shared, fine]].tolist() == [5, 2, 4]


@pytest.mark.parametrize("is_fast", [pytest.param(True, marks=needs_compiler), False])
def test_a_list_outgrows_the_room_for_its_pages(is_fast: bool) -> None:
    tables, times = new_tables(2, 200)
    number, other = tables.open(), tables.open()
    with fast.enabled(is_fast):
        tables.claim([number], [FIRST * SIZE], torch.arange(FIRST * SIZE), times)
        found = tables.claim([other, number], [3, 2 * FIRST * SIZE], torch.arange(3 + 2 * FIRST * SIZE), times)
    assert isinstance(found, Claim) and tables.pages.shape[2] == 4 * FIRST
    assert tables.counts[[number, other]].tolist() == [3 * FIRST, 1]
    assert len(set(tables.all_pages(number) + tables.all_pages(other))) == 2 * (3 * FIRST + 1)


def test_lists_that_are_written_at_some_places_only_are_found() -> None:
    tables, _ = new_tables(3, 8)
    number = tables.open()
    tables.wrote([number], 1)
    with pytest.raises(AssertionError, match="1 lists differ in length"):
        tables.check([number])
    tables.wrote([number], 0)
    tables.check([number])
