"""Windows: each token once an epoch, exact resume, true document numbers; the held-out side once and whole."""

import json
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morex.data.loader import Batch, Loader, held_out_windows
from morex.data.order import mixed, permuted
from morex.data.stream import TokenStream

Refused = Callable[..., str]
Windows = Literal["packed", "random"]
KINDS: tuple[Windows, Windows] = ("packed", "random")


def numbered(count: int, starts: tuple[int, ...] = (0,)) -> TokenStream:
    """A stream whose tokens are their own places."""
    return TokenStream(np.arange(count, dtype=np.uint32), np.array(starts, np.int64), count)


def equal(one: Batch, other: Batch) -> bool:
    same_lengths = (one.lengths is None) == (other.lengths is None)
    names = ("tokens", "labels", "document_ids")
    return same_lengths and all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_the_order_is_a_permutation(count: int, key: int) -> None:
    found = permuted(np.arange(count, dtype=np.uint64), count, np.full(count, key, np.uint64))
    assert sorted(found.tolist()) == list(range(count))


def test_the_order_looks_random() -> None:
    count = 5000
    values = np.arange(count, dtype=np.uint64)
    order = permuted(values, count, np.full(count, 7, np.uint64)).astype(float)
    assert abs(np.corrcoef(order, values.astype(float))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    quarters = np.histogram(order[: count // 4], 4, (0, count))[0]
    assert np.abs(quarters - count / 16).max() < 4 * (count / 16) ** 0.5
    other = permuted(values, count, np.full(count, 8, np.uint64))
    assert (order == other).mean() < 0.01


def test_mixing_is_that_of_splitmix64() -> None:
    # The first outputs of the generator of that name for seed 0, as its authors publish them.
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        states = np.array([0, golden, golden * np.uint64(2)], np.uint64)
    assert [hex(value) for value in mixed(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


@given(st.integers(2, 200), st.integers(1, 12), st.integers(1, 9), st.integers(-3, 3))
def test_an_epoch_has_every_token_once(count: int, seq_len: int, batch_size: int, seed: int) -> None:
    if count < seq_len + 1:
        return
    loader = Loader(numbered(count), seq_len, batch_size, "packed", seed)
    windows = loader.windows_per_epoch
    drawn = torch.cat([loader.next_batch().tokens for _ in range(-(-3 * windows // batch_size))])
    offsets = set()
    for epoch in range(3):
        tokens = drawn[epoch * windows : (epoch + 1) * windows].flatten().tolist()
        assert len(set(tokens)) == len(tokens) == windows * seq_len
        assert max(tokens) - min(tokens) == len(tokens) - 1
        assert max(tokens) <= count - 2, "the last token is only ever predicted"
        offsets.add(min(tokens))
    assert all(offset <= count - 1 - windows * seq_len for offset in offsets)


def test_epochs_differ_in_order_and_in_what_is_left_over() -> None:
    loader = Loader(numbered(1000 * 8 + 6), 8, 1000, "packed", 0)
    epochs = [loader.next_batch().tokens for _ in range(8)]
    assert len({tuple(epoch[:, 0].tolist()) for epoch in epochs}) == 8
    assert len({int(epoch.min()) for epoch in epochs}) > 1
    assert loader.epoch == 8.0


@pytest.mark.parametrize("windows", KINDS)
def test_labels_are_the_window_with_the_token_after_it(windows: Windows) -> None:
    batch = Loader(numbered(500), 16, 4, windows).next_batch()
    assert batch.tokens.shape == (4, 16) and batch.labels.shape == (4, 17)
    assert batch.tokens.dtype == batch.labels.dtype == batch.document_ids.dtype == torch.int64
    assert torch.equal(batch.labels[:, :-1], batch.tokens)
    assert torch.equal(batch.labels, batch.tokens[:, :1] + torch.arange(17))
    assert batch.lengths is None
    assert batch.tokens.is_contiguous()


def test_random_windows_start_anywhere_equally_often() -> None:
    loader = Loader(numbered(24), 4, 20_000, "random", 5)
    counts = torch.bincount(loader.next_batch().tokens[:, 0])
    assert len(counts) == 20, "the last start leaves one token to predict after the window"
    assert (counts - 1000).abs().max() < 5 * 1000**0.5


@pytest.mark.parametrize("windows", KINDS)
def test_seeds_differ(windows: Windows) -> None:
    stream = numbered(5000)
    batches = [Loader(stream, 8, 32, windows, seed).next_batch().tokens for seed in (0, 0, 1, -1, 2**70)]
    assert torch.equal(batches[0], batches[1])
    assert len({tuple(tokens[:, 0].tolist()) for tokens in batches}) == 4


@pytest.mark.parametrize(
    ("windows", "expected"),
    [("packed", [60, 76, 28, 44, 4, 68, 84, 36]), ("random", [78, 69, 70, 19, 83, 60, 63, 49])],
)
def test_the_order_never_changes(windows: Windows, expected: list[int]) -> None:
    # Checkpoints of older versions must go on as they would have.
    assert Loader(numbered(95), 8, 8, windows, 3).next_batch().tokens[:, 0].tolist() == expected


@given(
    st.sampled_from(KINDS),
    st.integers(9, 300),
    st.integers(1, 8),
    st.integers(1, 7),
    st.integers(0, 12),
    st.integers(1, 5),
    st.integers(0, 3),
)
@settings(max_examples=200)
def test_a_resumed_loader_goes_on_to_the_bit(
    windows: Windows, count: int, seq_len: int, batch_size: int, before: int, after: int, seed: int
) -> None:
    stream = numbered(count, (0, 3, count // 2 + 2))
    loader = Loader(stream, seq_len, batch_size, windows, seed)
    for _ in range(before):
        loader.next_batch()
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = Loader(stream, seq_len, batch_size, windows, seed)
    resumed.next_batch()
    resumed.load_state_dict(state)
    for _ in range(after):
        assert equal(loader.next_batch(), resumed.next_batch())
    assert loader.state_dict() == resumed.state_dict() != state


@pytest.mark.parametrize("windows", KINDS)
def test_microbatches_draw_what_one_batch_draws(windows: Windows) -> None:
    stream = numbered(333, (0, 100, 222))
    whole, parts = Loader(stream, 8, 12, windows), Loader(stream, 8, 4, windows)
    for _ in range(5):
        one, three = whole.next_batch(), [parts.next_batch() for _ in range(3)]
        assert torch.equal(one.labels, torch.cat([part.labels for part in three]))
        assert torch.equal(one.document_ids, torch.cat([part.document_ids for part in three]))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seq_len": 9}, "seq_len 8"),
        ({"seed": 1}, "seed 0"),
        ({"windows": "random"}, "windows 'packed'"),
        ({"stream": numbered(100)}, "num_tokens 101"),
    ],
)
def test_the_place_in_other_data_is_refused(refused: Refused, change: dict[str, object], word: str) -> None:
    common = {"stream": numbered(101), "seq_len": 8, "batch_size": 2}
    state = Loader(**common).state_dict()  # type: ignore[arg-type]
    refused(lambda: Loader(**(common | change)).load_state_dict(state), word)  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.sampled_from(KINDS), st.integers(1, 7))
def test_document_numbers_are_those_of_the_tokens(sizes: list[int], windows: Windows, seq_len: int) -> None:
    owner = [index for index, size in enumerate(sizes) for _ in range(size)]
    if len(owner) < seq_len + 1:
        return
    starts = tuple(int(start) for start in np.cumsum([0, *sizes[:-1]]))
    stream = numbered(len(owner), starts)
    batch = Loader(stream, seq_len, 5, windows).next_batch()
    assert batch.document_ids.tolist() == [[owner[place] for place in row] for row in batch.tokens.tolist()]
    for held_out in held_out_windows(stream, seq_len, 3):
        rows, lengths = held_out.document_ids.tolist(), held_out.lengths
        for row, (tokens, numbers) in enumerate(zip(held_out.tokens.tolist(), rows, strict=True)):
            length = seq_len if lengths is None else int(lengths[row])
            assert numbers[:length] == [owner[place] for place in tokens[:length]]


@given(st.integers(2, 120), st.integers(1, 17), st.integers(1, 6))
def test_held_out_windows_predict_every_token_but_the_first_once(count: int, seq_len: int, batch_size: int) -> None:
    predicted: list[int] = []
    batches = list(held_out_windows(numbered(count), seq_len, batch_size))
    for number, batch in enumerate(batches):
        assert batch.tokens.shape[1] == seq_len and batch.labels.shape[1] == seq_len + 1
        assert len(batch.tokens) == batch_size or number == len(batches) - 1
        if batch.lengths is not None:
            assert number == len(batches) - 1
            assert batch.lengths[:-1].tolist() == [seq_len] * (len(batch.tokens) - 1)
            last = int(batch.lengths[-1])
            assert 0 < last < seq_len
            assert (batch.labels[-1, last + 1 :] == -100).all() and (batch.tokens[-1, last:] == 0).all()
        targets = batch.labels[:, 1:]
        predicted += targets[targets != -100].tolist()
        known = targets != -100
        assert torch.equal(batch.tokens[known], targets[known] - 1)
    assert predicted == list(range(1, count))
    assert (batches[-1].lengths is None) == ((count - 1) % seq_len == 0)


def test_streams_smaller_than_a_window_are_refused(refused: Refused) -> None:
    refused(lambda: Loader(numbered(8), 8, 1), "8 tokens", "the 9 of one window", "train.seq_len 8")
    refused(lambda: next(held_out_windows(numbered(1), 8, 1)), "1 tokens")
    assert Loader(numbered(9), 8, 1).next_batch().tokens.tolist() == [list(range(8))]


def test_settings_that_mean_nothing_are_refused(refused: Refused) -> None:
    refused(lambda: Loader(numbered(99), 8, 1, "shuffled"), "data.windows 'shuffled'", "packed")  # type: ignore[arg-type]
    refused(lambda: Loader(numbered(99), 8, 0), "train.batch_size")


def test_batches_move_to_a_device() -> None:
    full = Loader(numbered(99), 8, 2).next_batch().to("meta")
    assert {full.tokens.device.type, full.labels.device.type, full.document_ids.device.type} == {"meta"}
    assert full.lengths is None
    *_, short = held_out_windows(numbered(99), 8, 2)
    moved = short.to("meta")
    assert moved.lengths is not None and moved.lengths.device.type == "meta"
