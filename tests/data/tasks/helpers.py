"""Every kind of task in a small form, and an answer to each question that is found in another way."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from morex.data.symbols import SymbolTokenizer
from morex.data.tasks.example import Example
from morex.data.tasks.prepared import PreparedTask, prepare_task
from morex.sections.data import DataConfig


def prepared(options: dict[str, Any], classifies: bool = False, **changes: Any) -> PreparedTask:
    """A generated task of these options."""
    data = DataConfig.model_validate({"task": options | changes})
    return prepare_task(data, 10**6, 10**6, classifies=classifies)


def words(task: PreparedTask, example: Example) -> tuple[list[str], list[str]]:
    """Symbols of a question, without the cue, and of its answer, without the end."""
    assert isinstance(task.tokenizer, SymbolTokenizer)
    assert example.answer[-1] == task.tokenizer.eos_id
    symbols = [task.tokenizer.symbols[index] for index in example.prompt]
    assert symbols[-1] == "="
    return symbols[:-1], [task.tokenizer.symbols[index] for index in example.answer[:-1]]


def copied(question: list[str]) -> set[str]:
    """Sums modulo 4 of every run of ten numbers below 50 that the question could hide."""
    numbers = list(map(int, question))
    runs = [numbers[start : start + 10] for start in range(len(numbers) - 10)]
    return {str(sum(run) % 4) for run in runs if max(run) < 50}


def counted(question: list[str], target: str = "42") -> set[str]:
    return {str(min(3, sum(number == target for number in question)))}


def hidden_pattern(question: list[str]) -> set[str]:
    """Which runs are there, as text."""
    text = " ".join(["", *question, ""])
    ascending = [str(number) for number in range(1, 11)]
    runs = [ascending, ascending[::-1], ["1", "2"] * 5, ["5"] * 10]
    return {str(label) for label, run in enumerate(runs) if f" {' '.join(run)} " in text}


def odd(question: list[str]) -> set[str]:
    """By the automaton of two states."""
    state = "0"
    for bit in question:
        state = {"00": "0", "01": "1", "10": "1", "11": "0"}[state + bit]
    return {state}


def added(question: list[str], order: str = "plain") -> set[str]:
    """By hand, digit after digit with a carry."""
    first, second = "".join(question).split("+")
    if order != "reversed":
        first, second = first[::-1], second[::-1]
    assert len(first) == len(second) and (len(first) == 1 or "0" not in (first[-1], second[-1]))
    carry, digits = 0, ""
    for a, b in zip(first, second, strict=True):
        carry, digit = divmod(int(a) + int(b) + carry, 10)
        digits += str(digit)
    digits += "1" if carry else ""
    return {digits[::-1] if order == "plain" else digits}


def hopped(question: list[str], unary: bool = False) -> set[str]:
    """By the definition: the greatest j <= i with X_{j-1} = X_i, places counted from 1."""
    hops, sequence = "".join(question).split(":")
    letters = " " + sequence
    assert all(left != right for left, right in pairwise(sequence))
    place = len(sequence)
    for _ in range(len(hops) if unary else int(hops)):
        found = max([j for j in range(2, place + 1) if letters[j - 1] == letters[place]], default=0)
        assert 0 < found < place
        place = found
    return {letters[place]}


def followed(question: list[str]) -> set[str]:
    """By a table of pointers; every letter has one way in and one way out at most."""
    text, asked = "".join(question).split(":")
    links = [tuple(pair) for pair in text.split(",")]
    table = dict(links)
    assert len(table) == len({end for _, end in links}) == len(links)
    ends = ""
    for letter in asked:
        assert letter in table
        while letter in table:
            letter = table[letter]
        ends += letter
    return {ends}


def evaluated(question: list[str], modulus: int = 5) -> set[str]:
    """By Python itself."""
    return {str(eval("".join(question)) % modulus)}


def digits(question: list[str]) -> int:
    """Of the first number."""
    return len("".join(question).partition("+")[0])


def hops(question: list[str], unary: bool = False) -> int:
    number = "".join(question).partition(":")[0]
    return len(number) if unary else int(number)


def pointers(question: list[str]) -> int:
    """How many are followed from the first letter that is farthest from its end."""
    text, _, asked = "".join(question).partition(":")
    table = dict(text.split(","))
    counts = [0] * len(asked)
    for i, letter in enumerate(asked):
        while letter in table:
            letter, counts[i] = table[letter], counts[i] + 1
    return max(counts)


def nesting(question: list[str]) -> int:
    """Brackets open at once, at most."""
    depth, most = 0, 0
    for symbol in question:
        depth += (symbol == "(") - (symbol == ")")
        most = max(most, depth)
    return most


@dataclass(frozen=True)
class Case:
    """A task in a small form, and what is true of its questions, found in another way than the task does it."""

    options: dict[str, Any]
    answers: Callable[[list[str]], set[str]]
    """The answers that a question allows."""
    difficulty: Callable[[list[str]], int] = len


CASES: dict[str, Case] = {
    "copy": Case({"kind": "copy", "difficulty": [11, 30]}, copied),
    "copy of few numbers": Case({"kind": "copy", "difficulty": [12, 12], "numbers": 6}, copied),
    "counting": Case({"kind": "counting", "difficulty": [1, 64]}, counted),
    "counting balanced": Case(
        {"kind": "counting", "difficulty": [6, 20], "numbers": 9, "target": 3, "balanced": True},
        partial(counted, target="3"),
    ),
    "pattern": Case({"kind": "pattern", "difficulty": [11, 24]}, hidden_pattern),
    "parity": Case({"kind": "parity", "difficulty": [1, 12]}, odd),
    "addition": Case({"kind": "addition", "difficulty": [1, 9]}, added, digits),
    "addition reversed": Case(
        {"kind": "addition", "difficulty": [1, 9], "order": "reversed"}, partial(added, order="reversed"), digits
    ),
    "addition with a reversed sum": Case(
        {"kind": "addition", "difficulty": [1, 9], "order": "reversed_sum"},
        partial(added, order="reversed_sum"),
        digits,
    ),
    "p_hop": Case({"kind": "p_hop", "difficulty": [1, 8]}, hopped, hops),
    "p_hop unary": Case(
        {"kind": "p_hop", "difficulty": [1, 8], "count": "unary"},
        partial(hopped, unary=True),
        partial(hops, unary=True),
    ),
    "p_hop far": Case({"kind": "p_hop", "difficulty": [9, 12], "length": 60, "letters": 5}, hopped, hops),
    "chain": Case({"kind": "chain", "difficulty": [1, 8]}, followed, pointers),
    "chain asked often": Case({"kind": "chain", "difficulty": [1, 6], "pairs": 9, "queries": 5}, followed, pointers),
    "chain of all": Case({"kind": "chain", "difficulty": [1, 13], "pairs": 13}, followed, pointers),
    "arithmetic": Case({"kind": "arithmetic", "difficulty": [1, 5]}, evaluated, nesting),
    "arithmetic in a chain": Case(
        {"kind": "arithmetic", "difficulty": [1, 7], "modulus": 10, "side_depth": 0},
        partial(evaluated, modulus=10),
        nesting,
    ),
}
SMALL = {name: case.options for name, case in CASES.items()}

STORY = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary took the milk.
5 Where is the milk? \tbathroom\t1 4
1 Ann is a frog.
2 What is Ann?\tfrog,green\t1
"""
SUMS = [
    {"question": "One and one?", "answer": "It is 1+1=<<1+1=2>>2.\n#### 2"},
    {"question": "Two and two, twice?", "answer": "2+2=4\n4+4=8\n#### 1,008"},
]


def write_sets(folder: Path, sizes: Sequence[str] = ("en",)) -> None:
    """bAbI, in these sizes, and GSM8K, made up and very small, laid out as in $MOREX_DATA."""
    for name in ("babi", "gsm8k"):
        (folder / name).mkdir(parents=True)
    for size in sizes:
        with tarfile.open(folder / "babi" / f"{size}.tar.gz", "w:gz") as archive:
            for task, split in product((1, 2, 11, 15, 16), ("train", "test")):
                content = STORY.replace("Mary", f"Mary{task}").encode()
                member = tarfile.TarInfo(f"tasks_1-20_v1-2/{size}/qa{task}_some-task_{split}.txt")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    lines = "".join(json.dumps(entry) + "\n" for entry in SUMS)
    (folder / "gsm8k" / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "gsm8k" / "test.jsonl").write_text(lines)
