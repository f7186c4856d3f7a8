"""Every test has a cache of its own; nothing here reaches the network or the user's cache."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from morex.data.errors import DataError
from morex.sections.data import DataConfig

SENTENCE = "the quick brown fox jumps over a lazy dog while seven owls watch quietly from old oak trees"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MOREX_CACHE", str(folder))
    return folder


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes texts as JSON lines and gives the path."""

    def write(texts: Iterable[str], name: str = "corpus.jsonl", column: str = "text") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def stories() -> list[str]:
    """Forty different documents of a few hundred characters."""
    words = SENTENCE.split()
    return [
        " ".join(words[(i * 7 + j * (i % 5 + 1)) % len(words)] for j in range(40 + i)) + f" {i}." for i in range(40)
    ]


@pytest.fixture
def byte_config() -> Callable[..., DataConfig]:
    """A config for a corpus with the byte tokenizer."""

    def make(corpus: Path | str, **changes: object) -> DataConfig:
        return DataConfig.model_validate({"corpus": str(corpus), "tokenizer": {"kind": "byte"}} | changes)

    return make


@pytest.fixture
def refused() -> Callable[..., str]:
    """Runs something that must be refused with one sentence that holds all the given words; gives the sentence."""

    def check(action: Callable[[], object], *words: str) -> str:
        with pytest.raises(DataError) as caught:
            action()
        sentence = str(caught.value)
        assert "\n" not in sentence and not sentence.endswith(".")
        for word in words:
            assert word in sentence
        return sentence

    return check
