"""Streams of several shards read as one, and parts of them as what they are parts of."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morex.data.loader import Loader, held_out_windows
from morex.data.stream import Joined, ShardWriter, TokenStream, chained, map_shard, shard_size

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0)


def stream(first: int, size: int, starts: Sequence[int]) -> TokenStream:
    """Tokens first, first + 1, ..., with documents that start at these of its places."""
    own = np.array([start for start in starts if start < size], np.int64)
    return TokenStream(np.arange(first, first + size, dtype=np.uint16), own, size)


def pair(sizes: list[int], starts: list[int]) -> tuple[TokenStream, TokenStream]:
    """Streams chained, and the one stream that they stand for."""
    firsts = np.cumsum([0, *sizes]).tolist()
    places = sorted({0, *(start % sum(sizes) for start in starts)})
    parts = [
        stream(first, size, [place - first for place in places if place >= first])
        for first, size in zip(firsts[:-1], sizes, strict=True)
    ]
    return chained(parts), stream(0, sum(sizes), places)


@given(SIZES, st.lists(st.integers(0, 99), max_size=8), st.integers(0, 70), st.integers(0, 70))
def test_chained_streams_are_one(sizes: list[int], starts: list[int], begin: int, end: int) -> None:
    many, one = pair(sizes, starts)
    assert (many.num_tokens, many.num_documents, many.num_bytes) == (one.num_tokens, one.num_documents, one.num_bytes)
    assert np.asarray(many.tokens).tolist() == one.tokens.tolist()
    assert np.asarray(many.document_starts).tolist() == one.document_starts.tolist()
    assert np.asarray(many.tokens[begin:end]).tolist() == np.asarray(one.tokens[begin:end]).tolist()
    values = np.arange(-1, sum(sizes) + 2)
    for side in ("left", "right"):
        found = many.document_starts.searchsorted(values, side=side)
        assert found.tolist() == one.document_starts.searchsorted(values, side=side).tolist()


@given(SIZES, st.lists(st.integers(0, 99), max_size=8), st.data())
def test_a_part_has_the_tokens_and_documents_of_its_place(
    sizes: list[int], starts: list[int], data: st.DataObject
) -> None:
    many, one = pair(sizes, starts)
    begin = data.draw(st.integers(0, sum(sizes) - 1))
    end = data.draw(st.integers(begin + 1, sum(sizes)))
    for whole in (many, one):
        part = whole.part(begin, end)
        assert np.asarray(part.tokens).tolist() == list(range(begin, end))
        inside = [start - begin for start in one.document_starts.tolist() if begin < start < end]
        assert np.asarray(part.document_starts).tolist() == [0, *inside]
    assert many.head(end).num_tokens == end and many.head(10**6).num_tokens == sum(sizes)


@given(SIZES, st.lists(st.integers(0, 99), max_size=8), st.integers(1, 9), st.sampled_from(["packed", "random"]))
@settings(max_examples=60)
def test_windows_do_not_depend_on_where_shards_end(
    sizes: list[int], starts: list[int], seq_len: int, windows: str
) -> None:
    many, one = pair(sizes, starts)
    if one.num_tokens < seq_len + 1:
        return
    batches = [Loader(whole, seq_len, 7, windows, 3).next_batch() for whole in (many, one)]  # type: ignore[arg-type]
    assert batches[0].labels.tolist() == batches[1].labels.tolist()
    assert batches[0].document_ids.tolist() == batches[1].document_ids.tolist()  # type: ignore[union-attr]
    for mine, other in zip(held_out_windows(many, seq_len, 2), held_out_windows(one, seq_len, 2), strict=True):
        assert mine.tokens.tolist() == other.tokens.tolist() and mine.labels.tolist() == other.labels.tolist()


def test_slices_of_joined_arrays_copy_nothing() -> None:
    parts = [np.arange(10), np.arange(10, 20)]
    both = Joined(parts, [0, 0])
    inside = both[12:15]
    assert isinstance(inside, np.ndarray) and np.shares_memory(inside, parts[1])
    across = both[8:13]
    assert isinstance(across, Joined) and np.asarray(across).tolist() == [8, 9, 10, 11, 12]
    assert len(both[20:30]) == len(both[5:5]) == 0


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_shard_is_what_was_written(tmp_path: Path, dtype: str, count: int) -> None:
    item, path = np.dtype(dtype), tmp_path / "shard"
    writer = ShardWriter(path, item)
    writer.add(np.arange(count, dtype=item), np.array([0]), 7)
    assert not path.exists()
    writer.add(np.arange(9, dtype=item), np.array([2, 5]), 8)
    size = writer.size
    writer.finish()
    assert [entry.name for entry in tmp_path.iterdir()] == ["shard"]
    assert path.stat().st_size == size == shard_size(count + 9, 3, item)
    tokens, starts = map_shard(path, count + 9, 3, item)
    assert tokens.tolist() == [*range(count), *range(9)] and tokens.dtype == item
    assert starts.tolist() == [0, count + 2, count + 5]


def test_a_shard_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "shard", np.dtype("<u2"))
    writer.add(np.arange(9, dtype=np.uint16), np.array([0]), 9)
    writer.close()
    assert list(tmp_path.iterdir()) == []
