"""Corpora elsewhere: copied once, compared with their checksums, and one sentence where that fails."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from morex.data import prepare as module
from morex.data.prepare import prepare, prepare_folder
from morex.sections.data import DataConfig

fsspec = pytest.importorskip("fsspec", reason="the package fsspec of the extra `data` is not installed")
Refused = Callable[..., str]
Write = Callable[..., Path]
Config = Callable[..., DataConfig]


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def folder(
    jsonl: Write, stories: list[str], byte_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Token shards, several on each side."""
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1000)
    prepare_folder(byte_config(jsonl(stories), val_fraction=0.2), 257, tmp_path / "shards", shard_bytes=3000)
    return tmp_path / "shards"


def put(memory: Any, folder: Path) -> None:
    """Copies the shards to memory://bucket/shards."""
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe(f"/bucket/shards/{path.relative_to(folder)}", path.read_bytes())


def copies(cache: Path) -> set[str]:
    return {path.name for path in (cache / "remote").rglob("*") if path.is_file()}


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_shards_are_read_from_elsewhere(
    memory: Any, folder: Path, byte_config: Config, cache: Path, protocol: str
) -> None:
    address = f"memory://bucket/{folder.name}" if protocol == "memory" else f"file://{folder}"
    if protocol == "memory":
        put(memory, folder)
    here, there = prepare(byte_config(folder), 257, 32), prepare(byte_config(address), 257, 32)
    assert there.train.tokens.tolist() == here.train.tokens.tolist()
    assert there.val.tokens.tolist() == here.val.tokens.tolist()
    assert there.content == here.content and there.tokenizer.kind == "byte"
    assert {"shards.json", "settings.json", "train-00000.tokens", "val-00000.tokens"} <= copies(cache)


def test_what_was_copied_is_not_copied_again(
    memory: Any, folder: Path, byte_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(memory, folder)
    first = prepare(byte_config("memory://bucket/shards"), 257, 32)
    monkeypatch.setattr(type(memory), "open", None)
    again = prepare(byte_config("memory://bucket/shards"), 257, 32)
    assert again.folder == first.folder and again.train.tokens.tolist() == first.train.tokens.tolist()


def test_copying_goes_on_where_it_was_ended(
    memory: Any, folder: Path, byte_config: Config, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(memory, folder)
    opened: list[str] = []
    plain = type(memory).open

    def counting(self: Any, path: str, *words: Any, **more: Any) -> Any:
        if len(opened) == 3:
            raise KeyboardInterrupt
        opened.append(Path(path).name)
        return plain(self, path, *words, **more)

    with monkeypatch.context() as patched:
        patched.setattr(type(memory), "open", counting)
        with pytest.raises(KeyboardInterrupt):
            prepare(byte_config("memory://bucket/shards"), 257, 32)
    there = set(opened)
    assert "train-00000.tokens" in there and "shards.json" not in copies(cache)
    opened.clear()
    with monkeypatch.context() as patched:
        patched.setattr(
            type(memory),
            "open",
            lambda self, path, *words, **more: (opened.append(Path(path).name), plain(self, path, *words, **more))[1],
        )
        prepare(byte_config("memory://bucket/shards"), 257, 32)
    assert opened and not set(opened) & {name for name in there if name.startswith(("train", "val"))}


def test_text_is_read_from_elsewhere(
    memory: Any, jsonl: Write, stories: list[str], byte_config: Config, cache: Path
) -> None:
    path = jsonl(stories)
    memory.pipe("/bucket/one.jsonl", path.read_bytes())
    memory.pipe("/texts/a.jsonl", path.read_bytes())
    memory.pipe("/texts/deep/b.jsonl", json.dumps({"text": "one more story"}).encode())
    memory.pipe("/texts/.hidden.jsonl", b"no text")
    memory.pipe("/texts/settings.json", b"{}")
    here = prepare(byte_config(path), 257, 32)
    assert prepare(byte_config("memory://bucket/one.jsonl"), 257, 32).folder == here.folder
    assert prepare(byte_config("memory://texts"), 257, 32).documents == len(stories) + 1
    assert copies(cache) == {"one.jsonl", "a.jsonl", "b.jsonl"}
    memory.pipe("/bucket/one.jsonl", path.read_bytes() + json.dumps({"text": "one more story"}).encode())
    assert prepare(byte_config("memory://bucket/one.jsonl"), 257, 32).documents == len(stories) + 1


def test_shards_that_have_changed_are_refused(
    memory: Any, folder: Path, byte_config: Config, cache: Path, refused: Refused
) -> None:
    put(memory, folder)
    changed = bytearray(memory.cat_file("/bucket/shards/val-00000.tokens"))
    changed[7] ^= 1
    memory.pipe("/bucket/shards/val-00000.tokens", bytes(changed))
    words = ("memory://bucket/shards", "val-00000.tokens", "has changed since it was indexed", "SHA-256")
    refused(lambda: prepare(byte_config("memory://bucket/shards"), 257, 32), *words)
    assert "val-00000.tokens" not in copies(cache) and "shards.json" not in copies(cache)
    memory.pipe("/bucket/shards/val-00000.tokens", (folder / "val-00000.tokens").read_bytes())
    prepare(byte_config("memory://bucket/shards"), 257, 32)


def test_places_that_do_not_serve_are_refused(
    memory: Any, folder: Path, byte_config: Config, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reading(address: str) -> Callable[[], object]:
        return lambda: prepare(byte_config(address), 257, 32)

    refused(reading("memory://nowhere/at-all"), "data.corpus 'memory://nowhere/at-all'", "is not there")
    refused(reading("nonsense://bucket/shards"), "nonsense", "cannot be reached")
    memory.pipe("/empty/notes.xml", b"<a/>")
    refused(reading("memory://empty"), "folder without text")
    put(memory, folder)
    memory.rm("/bucket/shards/train-00001.tokens")
    refused(reading("memory://bucket/shards"), "is not there", "train-00001.tokens")
    memory.pipe("/bucket/shards/shards.json", b"{}")
    refused(reading("memory://bucket/shards"), "shards.json that is none of token shards")

    def unreachable(*words: object, **more: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(type(memory), "isfile", unreachable)
    refused(reading("memory://bucket/shards"), "cannot be reached (no route to host)", "check the address")
