"""Texts that are kept: which is found, which goes first, and that each is kept once."""

import random

from morex.cache.paged import PagedStore
from morex.cache.prefixes import Prefixes, common


def kept(store: PagedStore, prefixes: Prefixes, text: list[int], kind: str = "a") -> int:
    sequence = store.open()
    prefixes.keep(sequence, text, kind)
    return sequence


def test_the_longest_beginning_is_found() -> None:
    store = PagedStore(4, 2, 1, 1)
    prefixes = Prefixes(store, 8)
    assert prefixes.find([1, 2], "a") is None
    one, two = kept(store, prefixes, [1, 2, 3]), kept(store, prefixes, [1, 2, 4, 5])
    other = kept(store, prefixes, [1, 2, 4, 6, 7], "b")
    assert prefixes.find([1, 2, 4, 6], "a") == (two, 3)
    assert prefixes.find([1, 2, 3, 9], "a") == (one, 3)
    assert prefixes.find([1, 2, 4, 6], "b") == (other, 4)
    assert prefixes.find([2, 1], "a") is None


def test_a_text_is_kept_once() -> None:
    store = PagedStore(4, 2, 1, 1)
    prefixes = Prefixes(store, 8)
    kept(store, prefixes, [1, 2])
    longer = kept(store, prefixes, [1, 2, 3])
    kept(store, prefixes, [1, 2])
    kept(store, prefixes, [1, 2, 3])
    assert len(prefixes) == len(store._lists) == 1
    assert prefixes.find([1, 2], "a") == (longer, 2)


def test_who_was_of_no_use_for_longest_goes_first() -> None:
    store = PagedStore(4, 2, 1, 1)
    prefixes = Prefixes(store, 2)
    first = kept(store, prefixes, [1])
    kept(store, prefixes, [2])
    assert prefixes.find([1, 5], "a") == (first, 1)
    kept(store, prefixes, [3])
    assert prefixes.find([2], "a") is None and prefixes.find([1], "a") is not None
    assert prefixes.drop_oldest() and prefixes.drop_oldest() and not prefixes.drop_oldest()
    assert not store._lists


def test_common() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.randint(0, 1) for _ in range(rng.randint(0, 6))] for _ in range(2))
        assert common(a, b) == max(n for n in range(min(len(a), len(b)) + 1) if a[:n] == b[:n])
