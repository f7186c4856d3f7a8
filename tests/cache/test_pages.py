"""The page pool against a dictionary of holders, in thousands of random steps."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from morex.cache.pages import PagePool
from morex.cache.store import OutOfPages

SIZE = 7


class Holders(RuleBasedStateMachine):
    """Holders take pages, share each other's and let go; what is free is what nobody holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(SIZE)
        self.holders: list[list[int]] = []

    @rule(count=st.integers(0, SIZE + 1))
    def take(self, count: int) -> None:
        free = self.pool.num_free
        if count > free:
            with pytest.raises(OutOfPages, match=rf"{count} pages are needed and {free} of {SIZE} are free"):
                self.pool.take(count)
            return
        pages = self.pool.take(count)
        assert len(set(pages)) == count
        assert not set(pages) & {page for holder in self.holders for page in holder}
        self.holders.append(pages)

    @rule(who=st.integers(0, 99))
    def share(self, who: int) -> None:
        if self.holders:
            pages = self.holders[who % len(self.holders)]
            self.pool.share(pages)
            self.holders.append(list(pages))

    @rule(who=st.integers(0, 99), kept=st.integers(0, SIZE))
    def drop(self, who: int, kept: int) -> None:
        if self.holders:
            pages = self.holders[who % len(self.holders)]
            self.pool.drop(pages[kept:])
            del pages[kept:]

    @invariant()
    def is_what_the_holders_say(self) -> None:
        held = [page for holder in self.holders for page in holder]
        self.pool.check(held)
        assert self.pool.num_free == SIZE - len(set(held))
        assert all(self.pool.is_shared(page) == (held.count(page) > 1) for page in range(SIZE))


TestHolders = Holders.TestCase
TestHolders.settings = settings(max_examples=100, stateful_step_count=40)


def test_faults_are_found() -> None:
    pool = PagePool(3)
    pages = pool.take(2)
    with pytest.raises(AssertionError, match="held by others"):
        pool.check(pages[:1])
    with pytest.raises(AssertionError, match="held by others"):
        pool.check([*pages, pages[0]])
    pool.drop(pages)
    with pytest.raises(AssertionError, match="free already"):
        pool.drop(pages[:1])
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.share(pages)
    pool.free[0] = pages[0]
    with pytest.raises(AssertionError, match="free pages"):
        pool.check([])
