"""Claims of entries: the kernel and the arrays do the same."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from morex.cache.tables import Claim, PageTables
from morex.nn import fast
from morex.nn.keys import NEVER

SIZE = 4
needs_compiler = pytest.mark.skipif(not fast.is_native(), reason="there is no C++ compiler on this machine")


def claims(tables: PageTables, numbers: list[int], added: list[int], times: Tensor, start: int) -> list[Claim]:
    """A claim by the kernel, and the same by arrays; lists that lack pages get them first, in ascending order."""
    pages = iter(range(int(tables.counts.sum()) * tables.width, times.shape[0]))
    time = torch.arange(start, start + sum(added))
    found = []
    for is_fast in (True, False):
        own = tables if not is_fast else copy.deepcopy(tables)
        written = times if not is_fast else times.clone()
        with fast.enabled(is_fast):
            claim = own.claim(numbers, added, time, written)
        found.append((claim, own.lengths.tolist(), written))
    (first, lengths, written), (second, expected, wanted) = found
    assert lengths == expected and torch.equal(written, wanted)
    if isinstance(first, list) or isinstance(second, list):
        assert first == second and isinstance(first, list)
        for row, lack, _ in first:
            tables.is_forked[numbers[row]] = False
            tables.extend(numbers[row], [next(pages) for _ in range(lack * tables.width)])
        return claims(tables, numbers, added, times, start)
    return [first, second]


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 5))
def test_the_kernel_claims_what_the_arrays_claim(data: st.DataObject, width: int) -> None:
    """Over many passes of any rows, with lists that have no pages yet, and lists that may share their last one."""
    tables, times = PageTables(width), torch.full((20000, SIZE), NEVER)
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


def test_what_lacks_is_said_and_nothing_done() -> None:
    tables, times = PageTables(2), torch.full((8, SIZE), NEVER)
    full, shared, fine = (tables.open() for _ in range(3))
    for number, pages in ((shared, [0, 1]), (fine, [2, 3])):
        tables.extend(number, pages)
        tables.lengths[number] = 2
    tables.is_forked[shared] = True
    found = tables.claim([full, shared, fine], [5, 1, 2], torch.arange(8), times)
    assert found == [(0, 2, False), (1, 0, True)]
    assert tables.lengths[[full, shared, fine]].tolist() == [0, 2, 2] and bool((times == NEVER).all())


def test_lists_that_are_written_at_some_places_only_are_found() -> None:
    tables = PageTables(3)
    number = tables.open()
    tables.wrote([number], 1)
    with pytest.raises(AssertionError, match="1 lists differ in length"):
        tables.check([number])
    tables.wrote([number], 0)
    tables.check([number])


@needs_compiler
def test_a_claim_after_one_that_lacked_is_a_claim_of_its_own() -> None:
    """The first leaves its room to the next, which nobody after that gets."""
    tables, times = PageTables(2), torch.full((8, SIZE), NEVER)
    one, other = tables.open(), tables.open()
    assert tables.claim([one], [3], torch.arange(3), times) == [(0, 1, False)]
    tables.extend(one, [0, 1])
    tables.extend(other, [2, 3])
    claims = [tables.claim([number], [3], torch.arange(3), times) for number in (one, other)]
    for claim, page, number in zip(claims, (0, 2), (one, other), strict=True):
        assert isinstance(claim, Claim)
        assert claim.where.tolist() == [
            [4 * page, 4 * page + 1, 4 * page + 2],
            [4 * page + 4, 4 * page + 5, 4 * page + 6],
        ]
        assert claim.numbers.tolist() == [number] * 3 and claim.end.tolist() == [1, 2, 3]
    assert tables.claim([one, other], [2, 2], torch.arange(4), times) == [(0, 1, False), (1, 1, False)]
    tables.extend(one, [4, 5])
    found = tables.claim([one], [2], torch.arange(3, 5), times)
    assert isinstance(found, Claim) and found.where.tolist() == [[3, 16], [7, 20]]
