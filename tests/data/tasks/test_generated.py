"""Generated tasks: their answers, their difficulty, their split, and that an example follows from seed and number."""

import math
from collections import Counter
from collections.abc import Callable

import pytest

from data.tasks.helpers import CASES, SMALL, prepared, words
from morex.data.tasks.generated import HELD_OUT_SHARE, is_held_out
from morex.data.tasks.kinds import TASKS
from morex.data.tasks.text import TextTask
from morex.model.heads import IGNORED
from morex.sections.data import DataConfig
from morex.sections.tasks import GeneratedTaskConfig


def section(name: str) -> GeneratedTaskConfig:
    task = DataConfig.model_validate({"task": SMALL[name]}).task
    assert isinstance(task, GeneratedTaskConfig)
    return task


def test_every_generated_task_is_tested() -> None:
    generated = {kind for kind, task in TASKS.items() if not issubclass(task, TextTask)}
    assert {options["kind"] for options in SMALL.values()} == generated


@pytest.mark.parametrize("name", SMALL)
def test_answers_are_those_of_a_slow_formula(name: str) -> None:
    """For a run hidden among others that look like one, the answer is one of several."""
    task = prepared(SMALL[name], held_out=100)
    possible = 0
    for example in [*task.training(3).take(0, 300), *task.val.examples]:
        question, answer = words(task, example)
        allowed = CASES[name].answers(question)
        assert "".join(answer) in allowed
        possible += len(allowed)
    if "few numbers" not in name:
        assert possible < 1.1 * 400


@pytest.mark.parametrize("name", SMALL)
def test_sizes_and_difficulties_are_as_the_section_says(name: str) -> None:
    task, config = prepared(SMALL[name], held_out=50), section(name)
    assert task.tokenizer.vocab_size == config.vocab_size(classifies=False)
    low, high = config.difficulty
    seen = Counter()
    for example in task.training(0).take(0, 600):
        question, answer = words(task, example)
        longest = config.longest(example.difficulty)
        assert len(question) <= longest[0] and len(answer) <= longest[1]
        seen[example.difficulty] += 1
        assert CASES[name].difficulty(question) == example.difficulty
    assert set(seen) <= set(range(low, high + 1))
    # Of very easy questions there may be none on one side; all others come equally often.
    expected = 600 / (high - low + 1)
    for difficulty in range(max(low, 5), high + 1):
        assert abs(seen[difficulty] - expected) < 6 * math.sqrt(expected)


@pytest.mark.parametrize("name", SMALL)
def test_an_example_follows_from_seed_and_number(name: str) -> None:
    task, again = prepared(SMALL[name], held_out=20), prepared(SMALL[name], held_out=20)
    whole = task.training(5).take(0, 40)
    assert again.training(5).take(0, 40) == whole
    assert task.training(5).take(17, 9) == whole[17:26]
    assert task.training(6).take(0, 40) != whole
    assert task.val == again.val and task.content == again.content


@pytest.mark.parametrize("name", SMALL)
def test_nothing_that_is_held_out_is_trained_on(name: str) -> None:
    task = prepared(SMALL[name], held_out=200)
    held_out = {tuple(example.prompt) for example in task.val.examples}
    training = {tuple(example.prompt) for example in task.training(0).take(0, 2000)}
    assert not held_out & training
    assert all(is_held_out(question[:-1]) for question in held_out)


def test_a_small_space_is_parted_whole() -> None:
    """All 2^9 questions: each is on one side, and both sides are found."""
    task = prepared({"kind": "parity", "difficulty": [9, 9], "held_out": 1000})
    held_out = {tuple(example.prompt) for example in task.val.examples}
    training = {tuple(example.prompt) for example in task.training(0).take(0, 8000)}
    assert len(held_out) + len(training) == 2**9 and not held_out & training
    assert len(held_out) / 2**9 == pytest.approx(HELD_OUT_SHARE, abs=0.05)


def classes_of(**options: object) -> Counter[int | None]:
    task = prepared(options, classifies=True, held_out=1)
    return Counter(example.label for example in task.training(0).take(0, 4000))


def test_most_counting_sequences_are_of_class_0() -> None:
    """As in the program that the task comes from: of 4,000 there 3,760, 233, 7 and 0."""
    found = classes_of(kind="counting")
    share = (1 - 1 / 999) ** 64
    assert found[0] / 4000 == pytest.approx(share, abs=0.015) and share == pytest.approx(0.94, abs=0.005)
    assert found[1] / 4000 == pytest.approx(64 / 999 * (1 - 1 / 999) ** 63, abs=0.015)
    assert found[3] <= 4


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        ({"kind": "counting", "balanced": True}, 4),
        ({"kind": "copy"}, 4),
        ({"kind": "pattern"}, 4),
        ({"kind": "parity", "difficulty": [8, 30]}, 2),
        ({"kind": "p_hop"}, 4),
    ],
)
def test_other_classes_come_equally_often(options: dict[str, object], classes: int) -> None:
    found = classes_of(**options)
    assert set(found) == set(range(classes))
    for count in found.values():
        assert count / 4000 == pytest.approx(1 / classes, abs=0.03)


def test_a_balanced_sequence_counts_up_to_six_targets_anywhere() -> None:
    task = prepared(SMALL["counting balanced"], held_out=1)
    questions = [words(task, example)[0] for example in task.training(0).take(0, 2000)]
    counts = Counter(question.count("3") for question in questions)
    assert set(counts) == set(range(7))
    for count in range(3, 7):
        assert counts[count] / 2000 == pytest.approx(1 / 16, abs=0.025)
    assert {number for question in questions for number in question} == set("12345678")
    first, last = (sum(question[place] == "3" for question in questions) for place in (0, -1))
    assert first == pytest.approx(last, rel=0.25)


def test_held_out_examples_may_be_longer() -> None:
    options = {"kind": "parity", "difficulty": [1, 20], "eval_difficulty": [41, 60], "held_out": 300}
    task = prepared(options)
    assert {example.difficulty for example in task.val.examples} == set(range(41, 61))
    assert max(example.difficulty for example in task.training(0).take(0, 300)) == 20
    assert task.tokenizer.fingerprint == prepared({"kind": "parity"}).tokenizer.fingerprint


@pytest.mark.parametrize("name", ["copy", "counting", "pattern", "parity", "p_hop", "arithmetic"])
def test_a_classifier_reads_the_bare_question_and_learns_the_answer(name: str) -> None:
    model, classifier = (prepared(SMALL[name], classifies, held_out=30) for classifies in (False, True))
    assert classifier.tokenizer.vocab_size == section(name).vocab_size(classifies=True)
    assert classifier.tokenizer.eos_id is None
    for one, other in zip(model.val.examples, classifier.val.examples, strict=True):
        assert list(one.prompt[:-1]) == list(other.prompt) and other.label == one.answer[0]
        assert other.label is not None and other.label < (section(name).classes or 0)


def test_a_space_without_held_out_questions_is_refused(refused: Callable[..., str]) -> None:
    refused(lambda: prepared({"kind": "parity", "difficulty": [1, 1]}), "difficulty 1 to 1", "widen", "eval_difficulty")
    few = {"kind": "parity", "difficulty": [3, 3], "eval_difficulty": [1, 1]}
    refused(lambda: prepared(few), "held out", "eval_difficulty")


def test_more_hops_than_there_are_letters_for_are_refused(refused: Callable[..., str]) -> None:
    import numpy as np

    from morex.data.tasks.p_hop import PHop

    task = PHop(length=6, letters=4, count="decimal", places="last")
    refused(lambda: task.draw(np.random.default_rng(0), 6), "6 hops among 6 letters", "data.task.length")


@pytest.mark.parametrize("count", ["decimal", "unary"])
def test_each_place_from_which_so_many_hops_exist_may_be_asked(count: str) -> None:
    """By the definition, from each end of the sequence that a place makes; question and answer stay the same."""
    config = {"kind": "p_hop", "difficulty": [1, 5], "length": 24, "held_out": 5, "count": count}
    asked, last = (prepared({**config, "places": places}) for places in ("all", "last"))
    named = asked.tokenizer.decode
    for one, other in zip(asked.training(3).take(0, 40), last.training(3).take(0, 40), strict=True):
        assert named(one.prompt) + "=" == named(other.prompt) and list(one.answer) == list(other.answer[:-1])
        assert one.targets is not None and other.targets is None and len(one.targets) == len(one.prompt) - 1
        hops, letters = named(one.prompt).split(":")
        assert one.targets[: len(hops) + 1] == [IGNORED] * (len(hops) + 1)
        for place, target in enumerate([*one.targets[len(hops) + 1 :], *one.answer]):
            letter = hop_by_hop(letters[: place + 1], len(hops) if count == "unary" else int(hops))
            assert letter == (None if target == IGNORED else named([target]))
    for one, other in zip(asked.val.examples, last.val.examples, strict=True):
        assert one.targets is None and named(one.prompt) + "=" == named(other.prompt)


def hop_by_hop(letters: str, hops: int) -> str | None:
    """The letter where hops from the last one lead, or None where one of them has nowhere to go."""
    for _ in range(hops):
        earlier = letters[:-1].rfind(letters[-1])
        if earlier < 0:
            return None
        letters = letters[: earlier + 2]
    return letters[-1]
