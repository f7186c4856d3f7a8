"""What `morex data` prints."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from morex.data.inspect import describe
from morex.sections.data import DataConfig

Config = Callable[..., DataConfig]


def test_description_adds_up(jsonl: Callable[..., Path], stories: list[str], byte_config: Config) -> None:
    described = describe(byte_config(path := jsonl(stories), val_fraction=0.2), 300, 16)
    assert json.loads(json.dumps(described)) == described
    assert described["corpus"] == str(path) and described["split"] == "document"
    assert described["documents"] == 40 and described["bytes"] == sum(map(len, stories))
    assert described["tokens"] == described["bytes"] + 40
    assert described["tokenizer"] == {"kind": "byte", "vocab_size": 257, "eos_id": 256}
    assert described["sample"] == stories[0][:200]
    assert Path(described["folder"]).is_dir()
    train, val = described["train"], described["val"]
    for name in ("documents", "bytes", "tokens"):
        assert train[name] + val[name] == described[name]
    assert train["share"] + val["share"] == pytest.approx(1)
    for side in (train, val):
        assert side["bytes_per_token"] == side["bytes"] / side["tokens"]
        assert side["windows"] == (side["tokens"] - 1) // 16


def test_a_corpus_cut_by_position_is_one_document(tmp_path: Path, byte_config: Config) -> None:
    path = tmp_path / "story.txt"
    path.write_text("once upon a time " * 100)
    described = describe(byte_config(path, val_fraction=0.1, tokenizer={"kind": "char"}), 30, 16)
    assert described["split"] == "position" and described["documents"] == 1
    assert described["val"]["bytes"] == 170 and described["bytes_per_token"] == 1.0
    assert described["sample"] == ("once upon a time " * 100)[:200]


def test_documents_that_are_held_out_too_are_counted(
    jsonl: Callable[..., Path], stories: list[str], byte_config: Config
) -> None:
    train, val = jsonl(stories, "train.jsonl"), jsonl(stories[30:], "val.jsonl")
    described = describe(byte_config(train, val_corpus=str(val)), 300, 16)
    assert described["split"] == "corpus" and described["documents"] == 50 and described["left_out"] == 10
    assert (described["train"]["documents"], described["val"]["documents"]) == (30, 10)
    assert described["sample"] == stories[0][:200]
