"""Tasks in words: bAbI and GSM8K, made up in small and, where they are there, the real ones."""

import gzip
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.tasks.helpers import SUMS, write_sets
from morex.data.characters import ByteTokenizer
from morex.data.tasks.babi import Babi
from morex.data.tasks.example import Example
from morex.data.tasks.loader import TaskLoader
from morex.data.tasks.prepared import PreparedTask, prepare_task
from morex.data.tasks.text import Shuffled, TextExample, encoded, find
from morex.sections.data import DataConfig

REAL = os.environ.get("MOREX_DATA")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like $MOREX_DATA."""
    write_sets(tmp_path)
    monkeypatch.setenv("MOREX_DATA", str(tmp_path))
    return tmp_path


def prepared(task: dict[str, Any], seq_len: int = 200, tokenizer: str = "byte", vocab_size: int = 300) -> PreparedTask:
    data = DataConfig.model_validate({"task": task, "tokenizer": {"kind": tokenizer}})
    return prepare_task(data, vocab_size, seq_len)


def shown(task: PreparedTask) -> list[tuple[str, str, int]]:
    decode = task.tokenizer.decode
    return [(decode(one.prompt), decode(one.answer), one.difficulty) for one in task.val.examples]


def test_babi_questions_have_their_story_and_no_earlier_question(folder: Path) -> None:
    task = prepared({"kind": "babi", "size": "en", "tasks": [11]})
    first = "Mary11 moved to the bathroom.\nJohn went to the hallway.\n"
    assert shown(task) == [
        (first + "Where is Mary11?\n", "bathroom", 1),
        (first + "Mary11 took the milk.\nWhere is the milk?\n", "bathroom", 2),
        ("Ann is a frog.\nWhat is Ann?\n", "frog,green", 1),
    ]
    assert task.num_train == 3 and task.shortened == 0
    assert all(example.answer[-1] == task.tokenizer.eos_id for example in task.val.examples)


def test_several_babi_tasks_follow_each_other(folder: Path) -> None:
    task = prepared({"kind": "babi", "size": "en", "tasks": [1, 11]})
    assert ["Mary11" in prompt for prompt, _, _ in shown(task)] == [False] * 3 + [True, True, False]


def test_gsm8k_answers_with_the_number_or_all_steps(folder: Path) -> None:
    assert shown(prepared({"kind": "gsm8k"})) == [
        ("One and one?\n", "2", 1),
        ("Two and two, twice?\n", "1,008", 2),
    ]
    assert shown(prepared({"kind": "gsm8k", "answer": "steps"}))[1][1] == SUMS[1]["answer"]


@pytest.mark.parametrize("kind", ["char", "bpe", "byte"])
def test_every_tokenizer_makes_the_text_again(folder: Path, kind: str) -> None:
    task = prepared({"kind": "babi", "size": "en"}, tokenizer=kind)
    assert task.tokenizer.kind == kind
    end = "\n" if kind == "char" else ""
    assert [answer for _, answer, _ in shown(task)] == [
        f"{word}{end}" for word in ("bathroom", "bathroom", "frog,green")
    ]
    assert prepared({"kind": "babi", "size": "en"}, tokenizer=kind).tokenizer.fingerprint == task.tokenizer.fingerprint


def test_long_prompts_lose_their_beginning(folder: Path, refused: Callable[..., str]) -> None:
    texts = [TextExample("0123456789", "ab", 1), TextExample("89", "abc", 1)]
    side = encoded(texts, ByteTokenizer(), seq_len=6)
    assert side.shortened == 1
    assert [bytes(np.asarray(one.prompt, np.uint8)) for one in side.examples] == [b"6789", b"89"]
    assert all(len(one.prompt) + len(one.answer) - 1 <= 6 for one in side.examples)
    assert encoded(texts, ByteTokenizer(), seq_len=12).shortened == 0
    refused(lambda: encoded(texts, ByteTokenizer(), seq_len=3), "4 tokens", "'abc'", "train.seq_len 3")


def test_each_epoch_has_every_example_once_in_another_order() -> None:
    examples = [Example([number], [0], number) for number in range(13)]
    source = Shuffled(examples, seed=4)
    epochs = [[one.difficulty for one in source.take(13 * epoch, 13)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(13))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    across = source.take(10, 6)
    assert [one.difficulty for one in across] == [*epochs[0][10:], *epochs[1][:3]]
    assert Shuffled(examples, seed=5).take(0, 13) != source.take(0, 13)


def test_training_may_predict_the_prompt_and_evaluation_never_does(folder: Path) -> None:
    both = [prepared({"kind": "gsm8k", "loss": loss}) for loss in ("answer", "all")]
    answer, everything = (TaskLoader(task, 2).next_batch() for task in both)
    assert everything.num_predicted == sum(len(SUMS[i]["question"]) + 1 for i in (0, 1)) - 2 + answer.num_predicted
    assert [next(task.val.batches(2)).num_predicted for task in both] == [answer.num_predicted] * 2


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"kind": "babi"}, ("babi/en-10k.tar.gz", "MOREX_DATA")),
        ({"kind": "babi", "size": "en", "tasks": [3]}, ("no train file of bAbI task 3", "data.task.tasks")),
    ],
)
def test_what_is_missing_is_named(
    folder: Path, task: dict[str, Any], words: tuple[str, ...], refused: Callable[..., str]
) -> None:
    refused(lambda: prepared(task), *words)


def test_without_a_folder_one_sentence_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.delenv("MOREX_DATA", raising=False)
    refused(lambda: prepared({"kind": "gsm8k"}), "gsm8k/train.jsonl", "set MOREX_DATA")


def test_damaged_files_are_refused(folder: Path, refused: Callable[..., str]) -> None:
    (folder / "gsm8k" / "test.jsonl").write_text('{"question": 3}\n')
    refused(lambda: prepared({"kind": "gsm8k"}), "test.jsonl", "cannot be read as GSM8K")
    (folder / "gsm8k" / "test.jsonl").write_text("")
    refused(lambda: prepared({"kind": "gsm8k"}), "no test examples")
    (folder / "gsm8k" / "test.jsonl").write_text('{"question": null, "answer": "#### 5"}\n')
    refused(lambda: prepared({"kind": "gsm8k"}), "test.jsonl", "cannot be read as GSM8K")


def test_damaged_archives_are_refused(folder: Path, refused: Callable[..., str]) -> None:
    """Cut, a byte changed behind the header, or a question without its facts: never examples that are not the set's."""
    path = folder / "babi" / "en.tar.gz"
    whole = path.read_bytes()
    changed = [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in range(24, len(whole), len(whole) // 12)]
    plain = gzip.decompress(whole)
    without_facts = gzip.compress(plain.replace(b"\tbathroom\t1\n", b"\tbathroom 1\n"))
    for content in [whole[: len(whole) // 2], without_facts, *changed]:
        path.write_bytes(content)
        refused(lambda: prepared({"kind": "babi", "size": "en"}), "en.tar.gz", "cannot be read as a bAbI archive")


def test_a_vocabulary_that_is_too_small_is_refused(folder: Path, refused: Callable[..., str]) -> None:
    refused(lambda: prepared({"kind": "gsm8k"}, vocab_size=200), "byte tokenizer", "model.vocab_size is 200")


def needs(kind: str) -> Any:
    there = REAL is not None and (Path(REAL) / kind).is_dir()
    return pytest.mark.skipif(not there, reason=f"the data set {kind} is not in $MOREX_DATA")


FACTS = {
    **dict.fromkeys((1, 4, 5, 6, 9, 10, 12, 20), 1),
    **dict.fromkeys((2, 11, 13, 14, 15, 17, 18, 19), 2),
    **dict.fromkeys((3, 16), 3),
}
"""Supporting facts of a bAbI task's questions; those of tasks 7 and 8 differ in number."""


@needs("babi")
def test_the_real_babi() -> None:
    task = prepared({"kind": "babi", "size": "en", "tasks": list(range(1, 21))}, seq_len=8000)
    assert task.num_train == len(task.val.examples) == 20_000 and task.shortened == 0
    for number in range(1, 21):
        facts = Counter(one.difficulty for one in task.val.examples[1000 * (number - 1) : 1000 * number])
        assert facts == {FACTS[number]: 1000} if number in FACTS else set(facts) >= {1, 2, 3, 4, 5, 6}


@needs("babi")
def test_the_real_babi_of_ten_thousand() -> None:
    """The training questions of the tasks that the archive has; its test questions are those of `en`."""
    with tarfile.open(find("babi", "en-10k.tar.gz")) as archive:
        parts = [re.search(r"/qa(\d+)_.*_train", name) for name in archive.getnames()]
    # In the order of the archive, which is then unpacked once.
    there = [int(found[1]) for found in parts if found]
    train = list(Babi(there, "en-10k").read("train"))
    assert there and len(train) == 10_000 * len(there)
    assert all(one.prompt.endswith("?\n") and one.answer for one in train)
    for place, number in enumerate(there):
        facts = {one.difficulty for one in train[10_000 * place : 10_000 * (place + 1)]}
        assert facts == {FACTS[number]} if number in FACTS else facts >= {1, 2, 3, 4, 5, 6}


@needs("gsm8k")
def test_the_real_gsm8k() -> None:
    task = prepared({"kind": "gsm8k"}, seq_len=2000)
    assert task.num_train == 7473 and len(task.val.examples) == 1319
    assert all(1 <= one.difficulty <= 12 for one in task.val.examples)
    assert shown(task)[0][1:] == ("18", 2)
