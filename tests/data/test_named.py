"""Sets of $MOREX_DATA by name: found with their checksums, with their own text held out."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from morex.data import named as module
from morex.data.corpora import open_corpus, open_data
from morex.data.corpus import FileCorpus, SeparateCorpora
from morex.data.named import NAMED
from morex.data.prepare import prepare
from morex.sections.data import DataConfig

Config = Callable[..., DataConfig]
Refused = Callable[..., str]
IN_FOLDER = ["wikitext2", "tinystories_sample", "classic_books"]


def needs(name: str) -> None:
    folder = os.environ.get("MOREX_DATA")
    if not folder or not Path(folder, name).is_dir():
        pytest.skip(f"MOREX_DATA names no folder with {name} in it")


@pytest.mark.parametrize(
    ("name", "train", "val"),
    [
        ("wikitext2", ["valid.txt"], ["test.txt"]),
        ("tinystories_sample", ["train.txt"], ["valid.txt"]),
        ("classic_books", [f"train-0{shard}.jsonl.gz" for shard in range(4)], ["val.jsonl.gz"]),
    ],
)
def test_sets_come_with_text_that_is_held_out(name: str, train: list[str], val: list[str]) -> None:
    needs(name)
    corpora = open_data(DataConfig(corpus=name))
    held_out = open_corpus(name, option="data.val_corpus")
    assert isinstance(corpora, SeparateCorpora) and isinstance(held_out, FileCorpus)
    assert isinstance(corpora.train, FileCorpus) and isinstance(corpora.val, FileCorpus)
    assert [path.name for path in corpora.train.files] == train
    assert [path.name for path in corpora.val.files] == val
    assert held_out.files == corpora.val.files


@pytest.mark.slow
def test_classic_books_are_311_and_13() -> None:
    needs("classic_books")
    corpora = open_data(DataConfig(corpus="classic_books"))
    assert isinstance(corpora, SeparateCorpora)
    assert [sum(1 for _ in corpus.documents()) for corpus in (corpora.train, corpora.val)] == [311, 13]


def test_the_sample_of_stories_trains_and_holds_its_own_out(byte_config: Config) -> None:
    needs("tinystories_sample")
    prepared = prepare(byte_config("tinystories_sample"), 257, 64)
    assert prepared.split == "corpus"
    assert (prepared.train.num_bytes, prepared.val.num_bytes) == (197_290, 30_346)


def test_a_corpus_of_ones_own_takes_the_place_of_what_is_held_out(byte_config: Config, tmp_path: Path) -> None:
    needs("tinystories_sample")
    (tmp_path / "other.txt").write_text("Once upon a time. " * 10)
    prepared = prepare(byte_config("tinystories_sample", val_corpus=str(tmp_path / "other.txt")), 257, 64)
    assert (prepared.train.num_bytes, prepared.val.num_bytes) == (197_290, 180)


@pytest.mark.parametrize("name", IN_FOLDER)
def test_without_the_folder_the_sentence_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused, name: str
) -> None:
    monkeypatch.delenv("MOREX_DATA", raising=False)
    refused(lambda: open_corpus(name), f"corpus '{name}'", "not set", "set MOREX_DATA to a folder", f"{name}/")
    monkeypatch.setenv("MOREX_DATA", str(tmp_path))
    refused(lambda: open_corpus(name), f"corpus '{name}'", str(tmp_path / name), "does not exist", "MOREX_DATA")


def test_other_files_under_the_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "valid.txt").write_text("another text")
    monkeypatch.setenv("MOREX_DATA", str(tmp_path))
    refused(lambda: open_corpus("wikitext2"), "valid.txt", "not that of the corpus 'wikitext2'", "SHA-256")


def test_another_set_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fables").mkdir()
    sums = []
    for name, text in (("train.txt", "The fox and the grapes."), ("held-out.txt", "The ant and the grasshopper.")):
        (tmp_path / "fables" / name).write_text(text)
        sums.append({name: hashlib.sha256(text.encode()).hexdigest()})
    monkeypatch.setenv("MOREX_DATA", str(tmp_path))
    monkeypatch.setitem(NAMED, "fables", module._of_data_folder("fables", *sums))
    corpora = open_data(DataConfig(corpus="fables"))
    assert ["".join(document) for document in corpora.documents()] == [
        "The ant and the grasshopper.",
        "The fox and the grapes.",
    ]
