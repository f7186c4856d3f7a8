"""The classifier head: what it pools, its loss, and what it refuses. The invariants run over it as over all cases."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import morex
from parity.helpers import (
    CLASSIFIER_CASES,
    config_of,
    eval_model,
    fresh_model,
    largest_change,
    load,
    pad,
    ragged_rows,
    random_tokens,
)

LENGTHS = [12, 7, 1]


def last_states(model: Any, row: torch.Tensor) -> torch.Tensor:
    """The normed states [T, D] of one sequence."""
    states: list[torch.Tensor] = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    model(row[None])
    hook.remove()
    return states[0]


def by_hand(model: Any, row: torch.Tensor) -> torch.Tensor:
    """Logits [C] of one sequence, from its normed states."""
    states, head = last_states(model, row), model.config.head
    pooled = states[-1] if head.pooling == "last" else sum(states.unbind(0)) / len(row)
    logits = model.state_dict()["head.weight"] @ pooled + model.state_dict()["head.bias"]
    cap = model.config.logit_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("case", CLASSIFIER_CASES)
def test_logits_are_a_linear_map_of_the_pooled_state(case: str) -> None:
    model, rows = eval_model(case), ragged_rows(case, LENGTHS)
    tokens, lengths = pad(rows)
    logits = model(tokens, lengths=lengths).logits
    assert logits.shape == (3, config_of(case).head.classes)
    for row, own in zip(rows, logits, strict=True):
        assert largest_change(own, by_hand(model, row)) <= 1e-12


@pytest.mark.parametrize("case", CLASSIFIER_CASES)
def test_loss_is_the_mean_over_labelled_rows(case: str) -> None:
    model, (tokens, lengths) = eval_model(case), pad(ragged_rows(case, LENGTHS))
    out = model(tokens, labels=torch.tensor([2, -100, 0]), lengths=lengths)
    log_probabilities = out.logits.log_softmax(-1)
    expected = -(log_probabilities[0, 2] + log_probabilities[2, 0]).item() / 2
    assert out.losses["classification"].item() == pytest.approx(expected, abs=1e-12)
    assert "lm" not in out.losses
    assert model(tokens, labels=torch.full((3,), -100), lengths=lengths).loss.item() == 0


@pytest.mark.parametrize("case", CLASSIFIER_CASES)
def test_a_row_without_tokens_has_the_state_zero(case: str) -> None:
    model = eval_model(case)
    tokens, lengths = pad([*ragged_rows(case, [5]), torch.zeros(0, dtype=torch.long)])
    logits = model(tokens, lengths=lengths).logits
    bias, cap = model.state_dict()["head.bias"], config_of(case).logit_cap or math.inf
    assert largest_change(logits[1], bias if math.isinf(cap) else cap * torch.tanh(bias / cap)) <= 1e-12
    assert largest_change(logits[:1], model(tokens[:1, :5]).logits) <= 1e-12


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_classifier_learns(pooling: str) -> None:
    """The class is the first token's: it has to come to the end by attention, or into the mean."""
    config = load("vanilla", f"model.head={{kind: classifier, classes: 3, pooling: {pooling}}}").model
    model: Any = morex.build_model(config).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        tokens = torch.randint(9, (16, 6), generator=generator)
        out = model(tokens, labels=tokens[:, 0] % 3)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens = torch.randint(9, (64, 6), generator=generator)
    assert (model.eval()(tokens).logits.argmax(-1) == tokens[:, 0] % 3).double().mean() > 0.9


def test_the_head_is_counted_once_a_sequence() -> None:
    plain, classifier = load("vanilla").model, load("vanilla", "model.head={kind: classifier, classes: 7}").model
    width, vocabulary = plain.d_model, plain.vocab_size
    for seq_len in (8, 64):
        per_token, per_sequence = (morex.count(config, seq_len=seq_len) for config in (plain, classifier))
        saved = per_token.forward_flops_per_token - per_sequence.forward_flops_per_token
        assert saved == pytest.approx(2 * width * vocabulary - 2 * width * 7 / seq_len)
        assert per_sequence.parameters - per_token.parameters == 7 * (width + 1)
        assert per_sequence.unique_non_embedding == per_token.unique_non_embedding
        assert per_sequence.decode_flops_per_token == per_sequence.kv_bytes_per_token == 0


@pytest.mark.parametrize("tied", ["true", "false"])
def test_tied_embeddings_mean_nothing_to_a_classifier(tied: str) -> None:
    model = morex.build_model(load("sandbox-token", f"model.tie_embeddings={tied}").model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith("head.")}
    assert shapes == {"head.weight": (4, 32), "head.bias": (4,)}


REFUSALS: dict[str, tuple[str, dict[str, Any]]] = {
    "a class too many": (r"label 4 .*4 classes \(model.head.classes\)", {"labels": torch.tensor([0, 4])}),
    "a label for each token": (r"labels of a classifier .*\[2\], not \[2, 16\]", {"labels": torch.zeros(2, 16).long()}),
    "labels that are no integers": (r"labels .*float32", {"labels": torch.zeros(2)}),
    "some logits of a row": (r"logits_to_keep .*language model", {"logits_to_keep": 1}),
    "logits at places of a row": (r"logits_to_keep .*language model", {"logits_to_keep": torch.tensor([1])}),
    "several texts in a row": (r"document_ids .*a row of its own", {"document_ids": torch.zeros(2, 16).long()}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_classifier_refuses(name: str) -> None:
    pattern, options = REFUSALS[name]
    with pytest.raises(ValueError, match=pattern) as refusal:
        eval_model("sandbox-expert")(random_tokens("sandbox-expert"), **options)
    assert "\n" not in str(refusal.value)


def test_a_classifier_does_not_decode() -> None:
    model: Any = fresh_model("sandbox-token").eval()
    tokens, cache = random_tokens("sandbox-token"), eval_model("vanilla").new_cache(2)
    for attempt in (
        lambda: model.new_cache(2),
        lambda: model(tokens, cache=cache),
        lambda: model.generate(tokens, max_new_tokens=1),
    ):
        with pytest.raises(ValueError, match=r"model\.head\.kind 'classifier'") as refusal:
            attempt()
        assert "\n" not in str(refusal.value)


def test_under_autocast_the_loss_is_in_full_precision() -> None:
    model, tokens = fresh_model("sandbox-token", torch.float32), random_tokens("sandbox-token")
    labels = torch.tensor([1, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tokens, labels=labels)
    assert out.losses["classification"].dtype == torch.float32
    torch.testing.assert_close(out.losses["classification"], F.cross_entropy(out.logits.float(), labels))
