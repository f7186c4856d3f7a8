"""Held-out loss: every token once, with the same weight, by the rule that decoding uses and by the oracle's."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import morex
from morex.data.loader import Loader
from morex.data.prepare import prepare
from morex.data.stream import TokenStream
from morex.eval.loss import evaluate
from morex.loading import ConfigError
from morex.model.lm import LanguageModel, build_model
from train.helpers import write_corpus

SEQ_LEN = 16


def stream_of(length: int, vocabulary: int = 97, num_bytes: int = 0) -> TokenStream:
    """Random tokens in two documents."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, length).astype(np.uint16)
    return TokenStream(tokens, np.array([0, length // 2]), num_bytes or 2 * length)


def model_of(preset: str, *overrides: str) -> LanguageModel:
    """A tiny model in float64 whose routers really decide."""
    model = build_model(morex.load_config(preset, list(overrides), tiny=True).model, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@torch.no_grad()
def by_hand(model: LanguageModel, stream: TokenStream, depth: int | str | None = None) -> float:
    """Window by window, one sequence at a time, summed token by token."""
    model.eval()
    tokens = torch.from_numpy(np.asarray(stream.tokens).astype(np.int64))
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(tokens) - 1, SEQ_LEN):
        window = tokens[start : start + SEQ_LEN + 1]
        logits = model(window[None, :-1], depth=depth).logits[0]
        total -= logits.log_softmax(-1)[torch.arange(len(window) - 1), window[1:]].sum()
    return float(total) / (len(tokens) - 1)


@pytest.mark.parametrize(
    "preset", ["vanilla", "recursive", "mor-expert", "mor-token", "mor-threshold", "mor-act", "more-tuned"]
)
@pytest.mark.parametrize("length", [4 * SEQ_LEN + 1, 4 * SEQ_LEN + 6])
def test_the_loss_is_that_of_the_hand(preset: str, length: int) -> None:
    model, stream = model_of(preset), stream_of(length)
    result = evaluate(model, stream, SEQ_LEN, batch_size=3)
    assert result.tokens == length - 1
    assert result.loss == pytest.approx(by_hand(model, stream), abs=1e-9)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert not result.is_oracle and result.by_depth is None


def test_the_batch_size_does_not_matter() -> None:
    model, stream = model_of("mor-expert"), stream_of(5 * SEQ_LEN + 3)
    results = [evaluate(model, stream, SEQ_LEN, size) for size in (1, 2, 5, 64)]
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, abs=1e-9)
        assert result.oracle_loss == pytest.approx(results[0].oracle_loss, abs=1e-9)


def test_bits_per_byte_come_from_the_bytes_of_the_text() -> None:
    model = model_of("vanilla")
    one_byte = evaluate(model, stream_of(50, num_bytes=50), SEQ_LEN, 4)
    assert one_byte.bits_per_byte == pytest.approx(one_byte.loss / math.log(2))
    four_bytes = evaluate(model, stream_of(50, num_bytes=200), SEQ_LEN, 4)
    assert four_bytes.bits_per_byte == pytest.approx(one_byte.bits_per_byte / 4)


def test_expert_choice_is_measured_by_both_rules() -> None:
    model, stream = model_of("mor-expert"), stream_of(70)
    result = evaluate(model, stream, SEQ_LEN, 4)
    assert result.oracle_loss == pytest.approx(by_hand(model, stream, "oracle"), abs=1e-9)
    assert result.loss == pytest.approx(by_hand(model, stream), abs=1e-9)
    assert result.loss != pytest.approx(result.oracle_loss, abs=1e-6)
    for preset in ("mor-token", "mor-threshold", "mor-act", "recursive"):
        assert evaluate(model_of(preset), stream, SEQ_LEN, 4).oracle_loss is None


def test_without_a_causal_rule_the_loss_says_that_it_is_the_oracles() -> None:
    model, stream = model_of("mor-expert", "model.depth.causal=none"), stream_of(70)
    result = evaluate(model, stream, SEQ_LEN, 4)
    assert result.is_oracle and result.loss == result.oracle_loss
    assert result.loss == pytest.approx(by_hand(model, stream, "oracle"), abs=1e-9)


@pytest.mark.parametrize("preset", ["recursive", "mor-expert", "mor-token", "mor-act"])
def test_loss_at_each_depth(preset: str) -> None:
    model, stream = model_of(preset), stream_of(70)
    result = evaluate(model, stream, SEQ_LEN, 4, by_depth=True)
    assert result.by_depth is not None and list(result.by_depth) == [1, 2, 3]
    for depth, loss in result.by_depth.items():
        assert loss == pytest.approx(by_hand(model, stream, depth), abs=1e-9)
    assert len(set(result.by_depth.values())) == 3
    if preset == "recursive":
        assert result.by_depth[3] == result.loss
    assert evaluate(model_of("vanilla"), stream, SEQ_LEN, 4, by_depth=True).by_depth is None


def test_loss_at_more_depths_than_in_training() -> None:
    model, stream = model_of("recursive"), stream_of(70)
    found = evaluate(model, stream, SEQ_LEN, 4, by_depth=True, deepest=5)
    assert found.by_depth is not None and list(found.by_depth) == [1, 2, 3, 4, 5]
    assert found.by_depth[5] == evaluate(model, stream, SEQ_LEN, 4, depth=5).loss


def test_a_dense_model_has_no_depths() -> None:
    assert evaluate(model_of("vanilla"), stream_of(70), SEQ_LEN, 4, by_depth=True, deepest=5).by_depth is None


def test_more_depths_than_a_model_takes_are_refused() -> None:
    model, stream = model_of("mor-token"), stream_of(70)
    with pytest.raises(ConfigError, match=r"eval\.deepest 4 is more than the 3 recursions"):
        evaluate(model, stream, SEQ_LEN, 4, by_depth=True, deepest=4)


def test_a_depth_policy_is_measured_alone() -> None:
    model, stream = model_of("mor-expert"), stream_of(70)
    result = evaluate(model, stream, SEQ_LEN, 4, depth="uniform:2")
    assert result.loss == pytest.approx(by_hand(model, stream, 2), abs=1e-9) and result.oracle_loss is None


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_and_nothing_else_changes(training: bool) -> None:
    model, stream = model_of("mor-threshold").train(training), stream_of(70)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    first, second = evaluate(model, stream, SEQ_LEN, 4), evaluate(model, stream, SEQ_LEN, 4)
    assert first == second
    assert model.training is training and all(module.training is training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_is_put_back_after_a_fault() -> None:
    model = model_of("vanilla").train()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        evaluate(model, stream_of(70, vocabulary=400), SEQ_LEN, 4)
    assert model.training


def test_documents_may_be_kept_apart() -> None:
    model, stream = model_of("vanilla"), stream_of(3 * SEQ_LEN + 1)
    joined = evaluate(model, stream, SEQ_LEN, 4)
    apart = evaluate(model, stream, SEQ_LEN, 4, mask_documents=True)
    assert apart.loss != pytest.approx(joined.loss, abs=1e-6)
    single = dataclasses.replace(stream, document_starts=np.array([0]))
    assert evaluate(model, single, SEQ_LEN, 4, mask_documents=True).loss == pytest.approx(joined.loss, abs=1e-9)


def test_autocast_computes_in_its_format() -> None:
    model, stream = model_of("vanilla").float(), stream_of(70)
    exact, rough = (evaluate(model, stream, SEQ_LEN, 4, autocast=dtype) for dtype in (None, torch.bfloat16))
    assert rough.loss != exact.loss and rough.loss == pytest.approx(exact.loss, rel=0.02)


def test_a_hopeless_model_has_an_infinite_perplexity() -> None:
    model = model_of("vanilla")
    with torch.no_grad():
        model.embedding.weight.mul_(1e6)
    result = evaluate(model, stream_of(70), SEQ_LEN, 4)
    assert result.loss > 700 and result.perplexity == math.inf


def test_on_a_real_corpus_every_held_out_token_counts(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text.txt")
    config = morex.load_config(
        "vanilla", ["model.vocab_size=257", "data.tokenizer={kind: byte}", f"data.corpus={corpus}"], tiny=True
    )
    data = prepare(config.data, config.model.vocab_size, SEQ_LEN)
    model = build_model(config.model, dtype=torch.float64)
    result = evaluate(model, data.val, SEQ_LEN, 8)
    assert result.tokens == data.val.num_tokens - 1
    assert result.loss == pytest.approx(by_hand(model, data.val), abs=1e-9)
    assert result.loss == pytest.approx(math.log(257), abs=0.3)
    assert Loader(data.train, SEQ_LEN, 2).next_batch().tokens.shape == (2, SEQ_LEN)
