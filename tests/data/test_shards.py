"""Folders of token shards: the same whoever makes them, kept when making ends, refused when they change."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from morex.data import inspect, shards
from morex.data import prepare as module
from morex.data.characters import ByteTokenizer
from morex.data.encoded import Encoders
from morex.data.loader import Loader
from morex.data.prepare import Written, prepare, prepare_folder
from morex.data.shards import check_shards, open_shards
from morex.data.split import Piece
from morex.data.subword import train_bpe
from morex.sections.data import DataConfig

Refused = Callable[..., str]
Write = Callable[..., Path]
Config = Callable[..., DataConfig]
SHARD = 4000


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of a few documents, so that small corpora have many of them, and several shards."""
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1000)


@pytest.fixture
def config(jsonl: Write, stories: list[str], byte_config: Config) -> DataConfig:
    return byte_config(jsonl([f"{story} {copy}" for copy in range(3) for story in stories]), val_fraction=0.2)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def made(config: DataConfig, folder: Path, workers: int = 0) -> Written:
    return prepare_folder(config, 300, folder, workers, SHARD)


def test_a_folder_holds_what_the_cache_does(config: DataConfig, tmp_path: Path) -> None:
    written = made(config, tmp_path / "shards")
    assert len(written.index.train) > 3 and len(written.index.val) > 1 and written.kept == 0
    of_text = prepare(config, 300, 32)
    of_shards = prepare(config.model_copy(update={"corpus": str(tmp_path / "shards")}), 300, 32)
    for one, other in ((of_text.train, of_shards.train), (of_text.val, of_shards.val)):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.document_starts.tolist() == other.document_starts.tolist()
        assert one.num_bytes == other.num_bytes
    assert of_shards.tokenizer.fingerprint == of_text.tokenizer.fingerprint
    assert (of_shards.split, of_shards.documents) == (of_text.split, of_text.documents)
    loaders = [Loader(one.train, 32, 4) for one in (of_text, of_shards)]
    for _ in range(3):
        batches = [loader.next_batch() for loader in loaders]
        assert batches[0].labels.tolist() == batches[1].labels.tolist()
    assert b"pickle" not in b"".join(content(tmp_path / "shards").values())


def test_the_number_of_processes_changes_nothing(config: DataConfig, tmp_path: Path) -> None:
    folders = {workers: tmp_path / str(workers) for workers in (0, 3)}
    for workers, folder in folders.items():
        made(config, folder, workers)
    assert content(folders[0]) == content(folders[3])


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_long_documents_go_over_the_ends_of_shards(tmp_path: Path, byte_config: Config, kind: str) -> None:
    text = "".join(f"line {number} of a story without an end\n" for number in range(3000))
    path = tmp_path / "story.txt"
    path.write_text(text)
    config = byte_config(path, tokenizer={"kind": kind}, val_fraction=0.1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("morex.data.encoding.Tokenizer.stretch", 500)
        patched.setattr("morex.data.subword.BpeTokenizer.stretch", 500)
        written = made(config, tmp_path / "shards")
        assert len(written.index.train) > 2
        one = prepare(config, 300, 16)
    other = prepare(config.model_copy(update={"corpus": str(tmp_path / "shards")}), 300, 16)
    assert other.tokenizer.decode(np.asarray(other.train.tokens)) == text[: int(0.9 * len(text))]
    assert one.train.tokens.tolist() == other.train.tokens.tolist()
    assert other.train.document_starts.tolist() == other.val.document_starts.tolist() == [0]


@pytest.mark.parametrize("stop_after", [1, 5, 12, 30])
def test_what_is_finished_is_kept(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused, stop_after: int
) -> None:
    whole = made(config, tmp_path / "whole")
    folder, calls = tmp_path / "shards", 0
    encode_batch = ByteTokenizer.encode_batch

    def ending(self: ByteTokenizer, texts: list[str]) -> Any:
        nonlocal calls
        calls += 1
        if calls > stop_after:
            raise KeyboardInterrupt
        return encode_batch(self, texts)

    with monkeypatch.context() as patched:
        patched.setattr(ByteTokenizer, "encode_batch", ending)
        with pytest.raises(KeyboardInterrupt):
            made(config, folder)
    there = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tokens")}
    refused(lambda: open_shards(folder, "folder"), "not finished", "morex data prepare")
    texts: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(ByteTokenizer, "encode_batch", lambda self, new: texts.extend(new) or encode_batch(self, new))
        again = made(config, folder)
    assert again.kept == len(there) and again.index == whole.index
    assert content(folder) == content(tmp_path / "whole")
    assert {name: (folder / name).stat().st_mtime_ns for name in there} == there
    finished = sum(shard.num_bytes for name, shard in whole.index.named().items() if name in there)
    assert sum(map(len, texts)) == sum(shard.num_bytes for shard in whole.index.named().values()) - finished


KILLED = """
import sys
from pathlib import Path
from morex.data import encoded, prepare
from morex.sections.data import DataConfig
import time

prepare.BATCH_CHARACTERS = 1000
encode = encoded.encode
if sys.argv[3] == "slow":
    encoded.encode = lambda *words: time.sleep(0.05) or encode(*words)
if __name__ == "__main__":
    config = DataConfig.model_validate_json(sys.argv[1])
    prepare.prepare_folder(config, 300, Path(sys.argv[2]), 2, int(sys.argv[4]))
"""


UNGUARDED = """
from pathlib import Path
from morex.data.prepare import prepare_folder
from morex.sections.data import DataConfig

tokenizer = dict(kind="bpe", vocab_size=8000)
config = DataConfig(corpus={words!r}, tokenizer=tokenizer, val_fraction=0.1)
prepare_folder(config, 8000, Path({out!r}), 2, 4000)
"""


def children_of(pid: int) -> set[int]:
    tasks = Path(f"/proc/{pid}/task")
    return {int(word) for task in tasks.iterdir() for word in (task / "children").read_text().split()}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which processes another has started")
def test_a_killed_preparation_goes_on(config: DataConfig, tmp_path: Path) -> None:
    """SIGKILL of the command at a time when some shards are there; its processes end with it."""
    whole = made(config, tmp_path / "whole")
    program, folder = tmp_path / "program.py", tmp_path / "shards"
    program.write_text(KILLED)
    words = [sys.executable, str(program), config.model_dump_json(), str(folder)]
    running = subprocess.Popen([*words, "slow", str(SHARD)])
    while not list(folder.glob("train-*.tokens")):
        assert running.poll() is None
        time.sleep(0.01)
    workers = children_of(running.pid)
    running.kill()
    running.wait()
    kept = len(list(folder.glob("*.tokens")))
    assert 0 < kept < len(whole.index.named())
    subprocess.run([*words, "fast", str(SHARD)], check=True)
    left = [path for path in folder.iterdir() if path.name.startswith(".")]
    for path in left:  # what was in the making, which goes a day later
        os.utime(path, (0, 0))
    assert made(config, folder).kept == len(whole.index.named())
    assert content(folder) == content(tmp_path / "whole")
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_a_process_that_is_ended_from_outside_is_one_sentence(refused: Refused) -> None:
    batches = [[Piece("train", f"text {number}", True, True)] for number in range(400)]

    def run() -> None:
        others = set(multiprocessing.active_children())
        with Encoders(ByteTokenizer(), 2) as encoders:
            tokens = encoders.encode(batches)
            next(tokens)
            (set(multiprocessing.active_children()) - others).pop().kill()
            list(tokens)

    refused(run, "one of the 2 processes", "--workers")


def test_a_program_without_a_guard_ends_with_one_sentence(tmp_path: Path) -> None:
    """Its processes begin with the program itself, and die at once; nobody waits for them."""
    words = tmp_path / "words.txt"
    words.write_text("".join(f"{number} " for number in range(40_000)), encoding="utf-8")
    program = tmp_path / "program.py"
    program.write_text(UNGUARDED.format(words=str(words), out=str(tmp_path / "shards")), encoding="utf-8")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    # Behind it Python may warn of what the processes left behind.
    said = [line for line in done.stderr.splitlines() if line.startswith("morex.data.errors.DataError: ")]
    assert len(said) == 1 and "one of the 2 processes that encode was ended" in said[0]


@pytest.mark.parametrize("damaged", [0, 1, -1])
def test_damaged_shards_are_made_again(config: DataConfig, tmp_path: Path, damaged: int) -> None:
    whole, folder = made(config, tmp_path / "whole"), tmp_path / "shards"
    made(config, folder)
    number = damaged % len(whole.index.train)
    path = folder / f"train-{number:05d}.tokens"
    path.write_bytes(path.read_bytes()[:-1])
    again = made(config, folder)
    assert again.kept == number + len(whole.index.val)
    assert content(folder) == content(tmp_path / "whole")


def test_a_folder_of_something_else_is_left_alone(
    config: DataConfig, tmp_path: Path, refused: Refused, jsonl: Write, stories: list[str]
) -> None:
    folder = tmp_path / "shards"
    made(config, folder)
    before = content(folder)
    for change, word in (({"val_fraction": 0.3}, "seed"), ({"seed": 1}, "seed"), ({"corpus": None}, "content")):
        if "corpus" in change:
            change = {"corpus": str(jsonl(stories, "other.jsonl"))}
        other = config.model_copy(update=change)
        refused(lambda other=other: made(other, folder), str(folder), f"its {word} is", "name another folder")
    refused(lambda: prepare_folder(config, 300, folder, 0, 9999), "shard_bytes", "4000")
    assert content(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    refused(lambda: made(config, tmp_path / "mine"), "is not empty", "name another folder")
    assert content(tmp_path / "mine") == {"letter.txt": b"mine"}
    shards_of = config.model_copy(update={"corpus": str(folder)})
    refused(lambda: made(shards_of, tmp_path / "again"), "holds token shards already")
    mixture = DataConfig.model_validate({"mixture": [{"corpus": str(folder)}]})
    refused(lambda: made(mixture, tmp_path / "again"), "data.mixture", "by itself")


def flip(path: Path) -> None:
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "train-00001.tokens").unlink(), ("train-00001.tokens' is missing", "restore")),
        (lambda folder: flip(folder / "val-00000.tokens"), ("val-00000.tokens' has changed", "SHA-256")),
        (lambda folder: (folder / "train-00000.tokens").write_bytes(b""), ("has changed", "0 bytes, not")),
        (lambda folder: (folder / "shards.json").write_text('{"format": 2'), ("shards.json", "none of token shards")),
        (lambda folder: (folder / "shards.json").write_text('{"format": 1}'), ("shards.json", "format")),
        (lambda folder: (folder / "tokenizer" / "settings.json").write_text("{"), ("tokenizer", "damaged")),
        (lambda folder: ByteLess().save(folder / "tokenizer"), ("another tokenizer", "restore")),
    ],
    ids=["missing", "flipped", "emptied", "cut index", "old index", "cut tokenizer", "other tokenizer"],
)
def test_folders_that_have_changed_are_refused(
    config: DataConfig, tmp_path: Path, refused: Refused, damage: Callable[[Path], object], words: tuple[str, ...]
) -> None:
    folder = tmp_path / "shards"
    made(config, folder)
    damage(folder)
    shards_of = config.model_copy(update={"corpus": str(folder)})
    refused(lambda: prepare(shards_of, 300, 16), *words)
    refused(lambda: check_shards(folder, "folder"), *words)


class ByteLess(ByteTokenizer):
    """Another tokenizer than the one of the shards."""

    def settings(self) -> dict[str, Any]:
        return {"kind": "char", "characters": "abc"}


def test_large_folders_are_checked_whole_on_request_alone(
    config: DataConfig, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHECKED_BYTES", 100)
    folder = tmp_path / "shards"
    made(config, folder)
    flip(folder / "train-00002.tokens")
    open_shards(folder, "folder")
    refused(lambda: check_shards(folder, "folder"), "train-00002.tokens", "SHA-256")


def test_shards_have_the_tokenizer_that_is_asked_for_or_are_refused(
    config: DataConfig, tmp_path: Path, refused: Refused, stories: list[str]
) -> None:
    train_bpe(stories, 280).save(tmp_path / "published")
    folder, published = tmp_path / "shards", {"kind": "hf", "path": str(tmp_path / "published")}
    learned = DataConfig.model_validate({**config.model_dump(), "tokenizer": published})
    made(learned, folder)

    def asking(**changes: object) -> DataConfig:
        return DataConfig.model_validate({"corpus": str(folder), **changes})

    for tokenizer in ({}, {"tokenizer": published}):
        assert prepare(asking(**tokenizer), 300, 16).tokenizer.vocab_size == 280
    assert prepare(asking(), 300, 16, train_bpe(stories, 280)).tokenizer.kind == "bpe"
    words = ("another tokenizer", "hf, 280 ids")
    refused(lambda: prepare(asking(tokenizer={"kind": "byte"}), 300, 16), *words, "byte, 257 ids")
    refused(lambda: prepare(asking(tokenizer={"kind": "char"}), 300, 16), *words, "char")
    refused(lambda: prepare(asking(), 300, 16, train_bpe(stories, 270)), *words, "bpe, 270 ids")
    refused(lambda: prepare(asking(), 279, 16), "280 token ids", "model.vocab_size is 279")
    refused(lambda: prepare(asking(val_corpus=config.corpus), 300, 16), "data.val_corpus", "held-out text of their own")
    refused(lambda: prepare(asking(), 300, 10**6), "training side", "prepare more text")
    as_held_out = config.model_copy(update={"val_corpus": str(folder)})
    refused(lambda: prepare(as_held_out, 300, 16), "data.val_corpus", "holds token shards")


def test_other_splits_of_a_text_are_other_data(config: DataConfig, tmp_path: Path) -> None:
    """A run that goes on must see it, although the text is the same."""
    found = []
    for number, fraction in enumerate((0.2, 0.2, 0.4)):
        folder = tmp_path / str(number)
        made(config.model_copy(update={"val_fraction": fraction}), folder)
        found.append(prepare(config.model_copy(update={"corpus": str(folder)}), 300, 16).content)
    assert found[0] == found[1] != found[2]


def test_shards_are_described(config: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    made(config, folder)
    of_text = inspect.describe(config, 300, 16)
    of_shards = inspect.describe(config.model_copy(update={"corpus": str(folder)}), 300, 16)
    assert json.loads(json.dumps(of_shards)) == of_shards
    for key in ("documents", "bytes", "tokens", "train", "val", "tokenizer", "left_out"):
        assert of_shards[key] == of_text[key]
    train = prepare(config, 300, 16).train.tokens[:200]
    assert of_shards["sample"] == ByteTokenizer().decode(train) and of_shards["mixture"] == []


def test_a_folder_of_text_may_have_an_index_of_its_own(jsonl: Write, stories: list[str], byte_config: Config) -> None:
    path = jsonl(stories)
    (path.parent / "index.json").write_text("{}")
    assert prepare(byte_config(path.parent), 300, 16).documents == len(stories)
