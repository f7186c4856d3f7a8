"""Batches of examples: what is labelled, what is padded, and that a loader goes on where it stood."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from data.tasks.helpers import SMALL, prepared
from morex.data.tasks.example import Example, answer_batch, class_batch
from morex.data.tasks.loader import TaskLoader
from morex.model.heads import IGNORED

EXAMPLES = [Example([5, 6, 7], [1, 9], 3), Example([8], [2, 3, 9], 1), Example([4, 4], [9], 2, label=0)]


def test_answers_are_labelled_and_rows_padded() -> None:
    batch = answer_batch(EXAMPLES)
    assert batch.tokens.tolist() == [[5, 6, 7, 1], [8, 2, 3, 0], [4, 4, 0, 0]]
    skip = IGNORED
    assert batch.labels.tolist() == [[skip, skip, skip, 1, 9], [skip, 2, 3, 9, skip], [skip, skip, 9, skip, skip]]
    assert batch.lengths is not None and batch.lengths.tolist() == [4, 3, 2]
    assert batch.num_predicted == 6
    assert batch.difficulty is not None and batch.difficulty.tolist() == [3, 1, 2]
    assert batch.document_ids.shape == batch.tokens.shape and not batch.document_ids.any()


def test_prompts_may_be_labelled_too() -> None:
    batch = answer_batch(EXAMPLES, predict_prompt=True)
    assert batch.labels.tolist()[1] == [8, 2, 3, 9, IGNORED]
    assert batch.num_predicted == 4 + 3 + 2


def test_targets_are_labelled_in_the_prompt() -> None:
    asked = Example([5, 6, 7], [1, 9], 3, targets=[IGNORED, 2])
    assert answer_batch([asked, EXAMPLES[1]]).labels.tolist() == [
        [IGNORED, IGNORED, 2, 1, 9],
        [IGNORED, 2, 3, 9, IGNORED],
    ]


def test_a_classifier_gets_prompts_and_classes() -> None:
    batch = class_batch([Example([4, 4], [1], 2, label=1), Example([5, 5, 5], [0], 3, label=0)])
    assert batch.tokens.tolist() == [[4, 4, 0], [5, 5, 5]]
    assert batch.labels.tolist() == [1, 0] and batch.num_predicted == 2
    assert batch.lengths is not None and batch.lengths.tolist() == [2, 3]


def test_without_padding_there_are_no_lengths() -> None:
    assert answer_batch(EXAMPLES[:1]).lengths is None
    moved = answer_batch(EXAMPLES).to("meta")
    assert moved.labels.device.type == "meta" and moved.lengths is not None and moved.lengths.device.type == "meta"


@pytest.mark.parametrize("classifies", [False, True])
@pytest.mark.parametrize("name", ["copy", "parity", "p_hop"])
def test_a_loader_goes_on_where_it_stood(name: str, classifies: bool) -> None:
    task = prepared(SMALL[name], classifies, held_out=5)
    loader = TaskLoader(task, batch_size=6, seed=2)
    for _ in range(3):
        loader.next_batch()
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = TaskLoader(prepared(SMALL[name], classifies, held_out=5), batch_size=6, seed=2)
    resumed.load_state_dict(state)
    for _ in range(3):
        mine, theirs = loader.next_batch(), resumed.next_batch()
        assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.labels, theirs.labels)


def test_the_batch_size_changes_no_example() -> None:
    task = prepared(SMALL["parity"], held_out=5)
    whole, parts = TaskLoader(task, 12, seed=1), TaskLoader(task, 4, seed=1)
    rows = list(rows_of(whole.next_batch()))
    assert [row for _ in range(3) for row in rows_of(parts.next_batch())] == rows


def rows_of(batch: Any) -> list[list[int]]:
    lengths = batch.lengths if batch.lengths is not None else [batch.tokens.shape[1]] * len(batch.tokens)
    return [row[: int(length)].tolist() for row, length in zip(batch.tokens, lengths, strict=True)]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"seed": 3}, ("seed 2", "3")), ({"difficulty": [1, 11]}, ("examples",))],
)
def test_another_task_or_seed_is_refused(
    change: dict[str, Any], words: tuple[str, ...], refused: Callable[..., str]
) -> None:
    options = SMALL["parity"] | {"held_out": 5}
    state = TaskLoader(prepared(options), 4, seed=2).state_dict()
    other = TaskLoader(
        prepared(options | {key: value for key, value in change.items() if key != "seed"}), 4, change.get("seed", 2)
    )
    refused(lambda: other.load_state_dict(state), "the saved place in the examples", *words)
