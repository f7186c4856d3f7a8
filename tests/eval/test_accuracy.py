"""Accuracy: by hand, as greedy decoding has it, by difficulty and by depth."""

from typing import Any

import pytest
import torch

import morex
from data.tasks.helpers import prepared
from morex.data.tasks.prepared import HeldOut, PreparedTask
from morex.eval.accuracy import answered, scores
from morex.eval.loss import EvalResult, evaluate
from morex.model.heads import IGNORED
from morex.model.lm import LanguageModel, build_model

SUMS: dict[str, Any] = {"kind": "addition", "difficulty": [1, 2], "held_out": 60}
CLASSES: dict[str, Any] = {"kind": "counting", "numbers": 6, "target": 2, "difficulty": [3, 6], "held_out": 50}


def model_of(preset: str, *overrides: str) -> LanguageModel:
    """A tiny model in float64 that has been moved away from its start, so that it answers this and that."""
    model = build_model(morex.load_config(preset, ["model.vocab_size=13", *overrides], tiny=True).model)
    model.to(torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.eval()


def result_of(model: LanguageModel, held_out: HeldOut, batch_size: int = 8, **options: Any) -> EvalResult:
    return evaluate(model, held_out, seq_len=16, batch_size=batch_size, **options)


def trained_a_little(preset: str, task: PreparedTask, steps: int = 12) -> LanguageModel:
    """A model that gets some answers right: it has seen the held-out ones."""
    model = model_of(preset).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(steps):
        for batch in task.val.batches(30):
            loss = model(batch.tokens, labels=batch.labels, lengths=batch.lengths).loss
            assert loss is not None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("preset", ["recursive", "mor-token"])
def test_recursions_may_follow_the_difficulty(preset: str) -> None:
    """Every difficulty is measured as it would be at that depth."""
    held_out = prepared(SUMS).val
    model = model_of(preset)
    found = result_of(model, held_out, depth="difficulty").scores
    assert found is not None and len(found.by_difficulty) == 2
    for level, score in found.by_difficulty.items():
        alone = result_of(model, held_out, depth=level).scores
        assert alone is not None and score.loss == pytest.approx(alone.by_difficulty[level].loss, abs=1e-9)


@pytest.mark.parametrize("preset", ["recursive", "mor-expert", "mor-token"])
def test_an_answer_is_right_where_greedy_decoding_writes_it(preset: str) -> None:
    """One at a time, from the cache, up to the end of the text."""
    task = prepared(SUMS)
    model = trained_a_little(preset, task)
    right = {}
    for example in task.val.examples:
        written = model.generate([list(example.prompt)], max_new_tokens=len(example.answer))[0]
        right.setdefault(example.difficulty, []).append(written[len(example.prompt) :] == list(example.answer))
    result = result_of(model, task.val)
    assert result.scores is not None
    by_hand = {level: sum(found) / len(found) for level, found in sorted(right.items())}
    assert {level: score.accuracy for level, score in result.scores.by_difficulty.items()} == pytest.approx(by_hand)
    assert list(result.scores.by_difficulty) == sorted(by_hand)
    everything = [one for found in right.values() for one in found]
    assert result.scores.all.accuracy == pytest.approx(sum(everything) / 60)
    assert 0 < sum(everything) < 60, "the comparison says nothing"


def test_scores_by_hand() -> None:
    labels = torch.tensor([[IGNORED, 1, 2], [IGNORED, IGNORED, 0], [IGNORED, 2, IGNORED]])
    logits = torch.zeros(3, 2, 3, dtype=torch.float64)
    logits[0, 0, 1] = logits[0, 1, 0] = logits[1, 1, 0] = logits[2, 0, 2] = 5.0
    found = scores([answered(logits, labels, torch.tensor([4, 4, 7]))])
    assert (found.all.examples, found.all.tokens) == (3, 4)
    assert found.all.accuracy == pytest.approx(2 / 3) and found.all.token_accuracy == pytest.approx(3 / 4)
    assert found.by_difficulty[4].accuracy == 0.5 and found.by_difficulty[7].accuracy == 1.0
    likely, unlikely = (-torch.log_softmax(torch.tensor([5.0, 0.0, 0.0], dtype=torch.float64), 0)).tolist()[:2]
    assert found.all.loss == pytest.approx((3 * likely + unlikely) / 4)
    assert found.by_difficulty[7].loss == pytest.approx(likely)


def test_scores_of_classes() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [0.0, 1.0]])
    found = scores([answered(logits, torch.tensor([0, 1, 0]), torch.tensor([1, 1, 2]))])
    assert found.all.accuracy == found.all.token_accuracy == pytest.approx(2 / 3) and found.all.tokens == 3
    assert found.by_difficulty[2].accuracy == 0.0


@pytest.mark.parametrize("classifies", [False, True])
@pytest.mark.parametrize("preset", ["recursive", "mor-expert", "mor-token"])
def test_the_loss_is_that_of_the_model_and_the_batch_size_does_not_matter(preset: str, classifies: bool) -> None:
    head = ["model.head={kind: classifier, classes: 4}"] if classifies else []
    model, task = model_of(preset, *head), prepared(CLASSES if classifies else SUMS, classifies)
    results = [result_of(model, task.val, size) for size in (1, 7, 60)]
    for result in results:
        assert result.scores is not None and result.bits_per_byte is None
        assert result.scores.all.loss == pytest.approx(result.loss, abs=1e-9)
        assert result.loss == pytest.approx(results[0].loss, abs=1e-9)
        assert result.scores.all.accuracy == results[0].scores.all.accuracy  # type: ignore[union-attr]
        assert result.tokens == result.scores.all.tokens
        assert (result.oracle_scores is not None) == (preset == "mor-expert")


def test_accuracy_at_each_depth() -> None:
    model, task = model_of("recursive"), prepared(SUMS)
    result = result_of(model, task.val, by_depth=True)
    assert result.scores_by_depth is not None and list(result.scores_by_depth) == [1, 2, 3]
    assert result.scores_by_depth[3] == result.scores
    for depth, found in result.scores_by_depth.items():
        assert found == result_of(model, task.val, depth=depth).scores
    deeper = result_of(model, task.val, depth=8)
    assert deeper.scores is not None and deeper.loss != result.loss
