"""Dropout: what is dropped, how much, when, and that a seed repeats it."""

from typing import Any

import pytest
import torch

import morex
from morex.nn.attention import Attention, AttentionShape
from morex.nn.dropout import dropped
from morex.nn.packing import pack_batch
from morex.nn.rope import Rope
from parity.helpers import CASES, REPEATABLE, config_of, fresh_model, labels_for, largest_change, load, random_tokens

DROPPING = [case for case in CASES if case not in REPEATABLE]


def test_there_is_a_case_of_each_kind_of_dropout() -> None:
    rates = [config_of(case).dropout for case in DROPPING]
    assert all(any(getattr(rate, kind) for rate in rates) for kind in ("attention", "residual", "embedding"))


@pytest.mark.parametrize("case", DROPPING)
def test_training_drops_by_the_seed_and_evaluation_nothing(case: str) -> None:
    model, tokens = fresh_model(case), random_tokens(case)

    def logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        result: torch.Tensor = model(tokens).logits
        return result

    assert torch.equal(logits(1), logits(1))
    assert largest_change(logits(1), logits(2)) > 1e-3
    plain = fresh_model(case).eval()
    before = torch.get_rng_state()
    assert torch.equal(model.eval()(tokens).logits, plain(tokens).logits)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["attention", "residual", "embedding"])
def test_each_kind_of_dropout_drops(kind: str) -> None:
    model: Any = morex.build_model(load("vanilla", f"model.dropout={{{kind}: 0.3}}").model).train()
    tokens = random_tokens("vanilla")
    assert largest_change(model(tokens).logits, model(tokens).logits) > 1e-6


@pytest.mark.parametrize("case", ["vanilla", "mor-expert", "more-tuned"])
def test_without_dropout_nothing_is_drawn(case: str) -> None:
    model, tokens = fresh_model(case), random_tokens(case)
    before = torch.get_rng_state()
    model(tokens, labels=labels_for(case, tokens)).loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_dropped_is_zero_and_the_rest_keeps_the_mean() -> None:
    torch.manual_seed(0)
    y = dropped(torch.ones(100_000, dtype=torch.float64), 0.25, True)
    assert sorted(set(y.tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert (y == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)


def test_residual_dropout_falls_on_the_branches() -> None:
    """Nearly all of every branch dropped: the stream is the embeddings, and the logits what the head makes of them."""
    model: Any = morex.build_model(load("recursive", "model.dropout={residual: 0.9999999}").model, dtype=torch.float64)
    tokens = random_tokens("recursive")
    alone = model.norm(model.embedding(tokens)) @ model.embedding.weight.t()
    torch.manual_seed(0)
    assert largest_change(model.train()(tokens).logits, alone) <= 1e-12


def test_attention_dropout_keeps_the_mean() -> None:
    """Over many draws, attention with dropped probabilities is attention."""
    torch.manual_seed(0)
    shape = AttentionShape(heads=2, kv_heads=1, head_dim=4, scale=0.5, rope=Rope(100.0))
    attention = Attention(8, shape, dropout=0.2).double().train()
    x = torch.randn(6, 8, dtype=torch.float64)
    packing = pack_batch((1, 6), x.device)
    with torch.no_grad():
        draws = torch.stack([attention(x, packing) for _ in range(4000)])
        assert draws.std(0).max() > 0.01
        torch.testing.assert_close(draws.mean(0), attention.eval()(x, packing), rtol=0, atol=0.02)
