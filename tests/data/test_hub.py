"""Data sets of the hub and saved ones; without a network, since the package datasets reads folders like the hub."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morex.data import prepare as module
from morex.data.corpora import lasting_name, open_corpus
from morex.data.hub import open_hub
from morex.data.prepare import prepare
from morex.sections.data import DataConfig

datasets = pytest.importorskip("datasets", reason="the package datasets of the extra `data` is not installed")

Config = Callable[..., DataConfig]
Refused = Callable[..., str]
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package keeps what it makes in a folder of this test, and believes that there is no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def hub(tmp_path: Path, jsonl: Write, stories: list[str]) -> str:
    """A data set with the splits train and test."""
    (tmp_path / "set").mkdir()
    jsonl(stories[:30], "set/train.jsonl")
    jsonl(stories[30:], "set/test.jsonl")
    return f"hf:{tmp_path / 'set'}"


def texts(corpus: Any) -> list[str]:
    return ["".join(document) for document in corpus.documents()]


def test_a_split_gives_its_rows_in_order(hub: str, stories: list[str]) -> None:
    assert texts(open_corpus(hub)) == stories[:30]
    assert texts(open_corpus(f"{hub}#test")) == stories[30:]
    assert texts(open_corpus(f"{hub}:default#train[:10%]")) == stories[:3]


def test_it_gives_the_tokens_and_the_split_of_json_lines(
    hub: str, jsonl: Write, stories: list[str], byte_config: Config
) -> None:
    reference = prepare(byte_config(jsonl(stories[:30], "reference.jsonl"), val_fraction=0.2), 257, 8)
    assert prepare(byte_config(hub, val_fraction=0.2), 257, 8).folder == reference.folder


def test_splits_train_and_are_held_out(hub: str, stories: list[str], byte_config: Config) -> None:
    prepared = prepare(byte_config(hub, val_corpus=f"{hub}#test"), 257, 8)
    assert (prepared.train.num_documents, prepared.val.num_documents) == (30, 10)
    assert prepared.val.num_bytes == sum(len(text.encode()) for text in stories[30:])


def test_the_fingerprint_stands_for_the_text(
    hub: str, jsonl: Write, stories: list[str], byte_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(byte_config(hub), 257, 8)
    identity = open_corpus(hub).identity()
    assert identity == open_corpus(hub).identity() != open_corpus(f"{hub}#test").identity()
    with monkeypatch.context() as patched:
        patched.setattr(module, "survey", None)
        assert prepare(byte_config(hub), 257, 8).folder == first.folder
    jsonl([*stories[:29], "another end of the matter"], "set/train.jsonl")
    assert open_corpus(hub).identity() != identity
    assert prepare(byte_config(hub), 257, 8).content != first.content


@pytest.mark.parametrize(
    ("suffix", "words"),
    [
        ("#validation", ("Unknown split", "train", "test", "hf:NAME:CONFIG#SPLIT")),
        (":other", ("'other' not found", "default")),
        ("/none", ("not to be found", "check its name")),
    ],
)
def test_what_is_not_there_is_one_sentence(hub: str, refused: Refused, suffix: str, words: tuple[str, ...]) -> None:
    refused(lambda: open_corpus(hub + suffix), f"data.corpus '{hub}{suffix}'", *words)


def test_columns_are_checked_before_anything_is_read(hub: str, tmp_path: Path, refused: Refused) -> None:
    refused(lambda: open_corpus(hub, "body"), f"'{hub}'", "no column 'body'", "data.column", "'text'")
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "train.jsonl").write_text('{"text": 1}\n')
    refused(lambda: open_corpus(f"hf:{tmp_path / 'numbers'}"), "'text' holds values of type int64")


def test_without_a_network_the_sentence_says_what_would_work(refused: Refused) -> None:
    refused(lambda: open_corpus("hf:someone/something"), "hf:someone/something", "hub cannot be reached", "give files")
    refused(lambda: open_corpus("hf:"), "names no data set", "hf:NAME")
    sentence = refused(lambda: open_corpus("hf:someone/else", option="data.val_corpus"))
    assert sentence.startswith("data.val_corpus 'hf:someone/else'")


def test_without_the_package_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(lambda: open_hub("hf:a/b", "text", "data.corpus"), "data.corpus 'hf:a/b'", "datasets", "morex[data]")


def test_names_of_the_hub_stay_as_they_are() -> None:
    assert lasting_name("hf:someone/something#test") == "hf:someone/something#test"


def test_saved_data_sets_are_read_without_the_package(
    tmp_path: Path, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the shards, the package's own files beside them passed over."""
    rows = datasets.Dataset.from_dict({"text": stories}).shuffle(seed=1)
    rows.save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "saved" / "cache-0123.arrow").write_bytes(b"left by a map")
    expected = list(rows["text"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    corpus = open_corpus(str(tmp_path / "saved"))
    assert texts(corpus) == expected != stories


def test_saved_splits_have_to_be_named(tmp_path: Path, stories: list[str], refused: Refused) -> None:
    split = {"train": stories[:30], "test": stories[30:]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": rows}) for name, rows in split.items()})
    saved.save_to_disk(tmp_path / "saved")
    refused(lambda: open_corpus(str(tmp_path / "saved")), "splits test, train", f"'{tmp_path / 'saved' / 'test'}'")
    assert texts(open_corpus(str(tmp_path / "saved" / "test"))) == stories[30:]


def test_damaged_saved_data_sets_are_refused(tmp_path: Path, stories: list[str], refused: Refused) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": stories}).save_to_disk(folder)
    (folder / "data-00000-of-00001.arrow").unlink()
    refused(lambda: open_corpus(str(folder)), "data-00000-of-00001.arrow", "save it again")
    (folder / "state.json").write_text("{}")
    refused(lambda: open_corpus(str(folder)), "state.json", "not that of a saved data set")
