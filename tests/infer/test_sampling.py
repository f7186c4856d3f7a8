"""Choosing the next token: right distributions, rows that know nothing of each other, and the filters of others."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from morex.model.sampling import BLOCK, Sampling, generator_of, likeliest, log_probabilities, rewind, sample
from parity.helpers import fresh_model

SIZES = [1, 2, 97, BLOCK, BLOCK + 1, 3 * BLOCK, 1000]


def logits_of(rows: int, size: int, seed: int = 0, ties: bool = False) -> Tensor:
    logits = 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    return logits.round() if ties else logits


def probabilities(logits: Tensor, own: Sampling) -> Tensor:
    """What a row [V] is drawn from, by the book."""
    scores = logits.double() / own.temperature
    if own.top_k is not None:
        scores[scores < scores.topk(min(own.top_k, len(scores))).values[-1]] = -torch.inf
    if own.top_p is not None:
        values, order = scores.softmax(0).sort(descending=True, stable=True)
        scores[order[values.cumsum(0) - values >= own.top_p]] = -torch.inf
    if own.min_p is not None:
        now = scores.softmax(0)
        scores[now < own.min_p * now.max()] = -torch.inf
    return scores.softmax(0)


FILTERS = [
    {}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.8}, {"top_p": 0.9, "min_p": 0.1},
    {"top_k": 8, "top_p": 0.95, "min_p": 0.05}, {"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9},
]  # fmt: skip


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("size", [12, 300])
def test_draws_have_the_right_distribution(filters: dict[str, Any], size: int) -> None:
    """Chi-square of 10,000 draws; above 5 sigma once in millions of seeds."""
    own = Sampling(temperature=1.5, **filters)
    logits, draws = logits_of(1, size), 10_000
    expected = probabilities(logits[0], own) * draws
    generator = generator_of(0, 0)
    found = sample(logits.expand(draws, -1), [own] * draws, [generator] * draws).bincount(minlength=size)
    assert not found[expected == 0].any()
    common = expected >= 5
    rare = expected[~common].sum()
    parts = [((found - expected) ** 2 / expected)[common].sum()]
    if rare >= 5:
        parts.append((found[~common].sum() - rare) ** 2 / rare)
    degrees = int(common.sum()) + len(parts) - 2
    assert float(sum(parts)) <= degrees + 5 * (2 * max(degrees, 1)) ** 0.5


@pytest.mark.parametrize("filters", [own for own in FILTERS if own], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_what_may_be_drawn_is_what_the_filters_leave(filters: dict[str, Any], ties: bool) -> None:
    """Every token that is left comes, and no other, whatever the size of the vocabulary."""
    for size in SIZES:
        logits = logits_of(1, size, ties=ties) / 3
        own = Sampling(temperature=2.0, **filters)
        left = probabilities(logits[0], own)
        found = set(sample(logits.expand(1000, -1), [own] * 1000, [generator_of(1, 0)] * 1000).tolist())
        assert found <= set(left.nonzero().flatten().tolist())
        assert found >= set((left > 0.02).nonzero().flatten().tolist())


@pytest.mark.parametrize(
    "filters", [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 9, "top_p": 0.6}], ids=str
)
def test_filters_are_those_of_transformers(filters: dict[str, Any]) -> None:
    library = pytest.importorskip("transformers")
    logits, own = logits_of(4, 97, seed=3), Sampling(temperature=1.7, **filters)
    config = library.GenerationConfig(do_sample=True, temperature=1.7, **({"top_k": 0} | filters))
    warpers = [
        library.TemperatureLogitsWarper(config.temperature),
        *([library.TopKLogitsWarper(own.top_k)] if own.top_k else []),
        *([library.TopPLogitsWarper(own.top_p)] if own.top_p else []),
        *([library.MinPLogitsWarper(own.min_p)] if own.min_p else []),
    ]
    scores = logits
    for warper in warpers:
        scores = warper(torch.zeros(4, 1, dtype=torch.long), scores)
    for row, theirs in zip(logits, scores.softmax(-1), strict=True):
        assert torch.allclose(probabilities(row, own).float(), theirs, atol=1e-6)


def test_the_penalty_is_that_of_transformers() -> None:
    library = pytest.importorskip("transformers")
    logits, texts = logits_of(3, 97), [[1, 5, 5], [0], [96, 2, 3, 4]]
    for penalty in (0.5, 1.3, 50.0):
        theirs = torch.cat(
            [
                library.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([text]), row[None].clone())
                for row, text in zip(logits, texts, strict=True)
            ]
        )
        own = [Sampling(repetition_penalty=penalty)] * 3
        assert sample(logits, own, [], texts).tolist() == theirs.argmax(-1).tolist()
    assert sample(logits, [Sampling()] * 3, []).tolist() == logits.argmax(-1).tolist(), "the logits are as they were"


def options(draw: Any) -> Sampling:
    temperature = draw(st.sampled_from([0.0, 0.3, 1.0, 40.0]))
    filters = {}
    if temperature:
        filters = {
            "top_k": draw(st.sampled_from([None, 1, 3, 70, 5000])),
            "top_p": draw(st.sampled_from([None, 0.01, 0.5, 0.999, 1.0])),
            "min_p": draw(st.sampled_from([None, 0.0, 0.01, 0.5])),
        }
    return Sampling(temperature=temperature, repetition_penalty=draw(st.sampled_from([1.0, 1.2])), **filters)


@given(st.data())
def test_a_row_among_others_is_what_it_is_alone(data: st.DataObject) -> None:
    """Any mixture of options, ties everywhere, in single and double precision."""
    rows, size = data.draw(st.integers(1, 6)), data.draw(st.sampled_from(SIZES))
    logits = logits_of(rows, size, data.draw(st.integers(0, 99)), data.draw(st.booleans()))
    logits = logits.to(data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])))
    own = [options(data.draw) for _ in range(rows)]
    texts = [[row % size, (7 * row) % size] for row in range(rows)]
    together = sample(logits, own, [generator_of(4, row) for row in range(rows)], texts).tolist()
    for row in range(rows):
        alone = sample(logits[row : row + 1], own[row : row + 1], [generator_of(4, row)], texts[row : row + 1])
        assert int(alone) == together[row]


@pytest.mark.parametrize("size", SIZES)
def test_the_likeliest_is_the_first_of_the_largest(size: int) -> None:
    for ties in (False, True):
        logits = logits_of(50, size, ties=ties)
        ids, values = likeliest(logits)
        assert ids.tolist() == logits.max(-1, keepdim=True).indices.tolist() == logits.argmax(-1, keepdim=True).tolist()
        assert torch.equal(values, logits.amax(-1, keepdim=True))


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1.0, 1e300])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}], ids=["all", "some"])
def test_logits_that_are_not_finite_end_in_no_token(temperature: float, filters: dict[str, Any]) -> None:
    """And leave the others alone; minus infinity only rules a token out."""
    own = Sampling(temperature=temperature, **(filters if temperature else {}))
    logits = torch.zeros(5, 200)
    logits[0, 150] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    logits[3] = -torch.inf
    logits[3, 199] = -4.0
    found = sample(logits, [own] * 5, [generator_of(0, row) for row in range(5)]).tolist()
    assert found[:4] == [-1, -1, -1, 199]
    assert 0 <= found[4] < 200


def test_generate_says_that_logits_are_not_finite() -> None:
    model: Any = fresh_model("vanilla")
    with torch.no_grad():
        model.embedding.weight[5] = torch.nan
    with pytest.raises(ValueError, match="logits of row 0 are not finite") as error:
        model.generate([[5, 2], [3]], max_new_tokens=2)
    assert "\n" not in str(error.value)


def test_a_generator_goes_back() -> None:
    own, logits = [Sampling(temperature=1.0)], logits_of(1, 97)
    for seed in (3, None):
        generator = generator_of(seed, 0)
        drawn = [int(sample(logits, own, [generator])) for _ in range(30)]
        for start in (0, 1, 17):
            rewind(generator, start)
            assert [int(sample(logits, own, [generator])) for _ in range(30 - start)] == drawn[start:]


def test_log_probabilities_are_those_of_the_logits() -> None:
    logits = logits_of(3, 97)
    own, values, ids = log_probabilities(logits, torch.tensor([4, 0, 96]), 5)
    expected = logits.double().log_softmax(-1)
    assert torch.allclose(own.double(), expected[torch.arange(3), torch.tensor([4, 0, 96])], atol=1e-5)
    assert torch.allclose(values.double(), expected.gather(-1, ids), atol=1e-5)
    assert ids.tolist() == logits.topk(5).indices.tolist()
