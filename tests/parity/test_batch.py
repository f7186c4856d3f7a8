"""Invariant 2: a sequence's logits depend neither on its neighbours, nor on what follows, nor on padding."""

import pytest
import torch

from parity.helpers import (
    CASES,
    LM_CASES,
    MODES,
    REPEATABLE,
    cases,
    config_of,
    eval_model,
    fresh_model,
    labels_for,
    largest_change,
    pad,
    ragged_rows,
    random_tokens,
    row_logits,
)

LENGTHS = [16, 7, 1]


@pytest.mark.parametrize(("case", "mode"), MODES)
def test_batch_invariance(case: str, mode: str) -> None:
    """A row alone, and among neighbours of other lengths; in training too, where top-k counts a row's own tokens."""
    model = eval_model(case) if mode == "eval" else fresh_model(case)
    rows = ragged_rows(case, LENGTHS)
    tokens, lengths = pad(rows)
    together = model(tokens, lengths=lengths).logits
    for row, logits in zip(rows, together, strict=True):
        assert largest_change(model(row[None]).logits[0], row_logits(logits, len(row))) <= 1e-9


@pytest.mark.parametrize("case", CASES)
def test_prefix_parity(case: str) -> None:
    """A row cut off is the row that ends there, whatever stands behind its end."""
    model, tokens = eval_model(case), random_tokens(case)
    for t in (1, 6, 15):
        ended = model(tokens, lengths=torch.full((2,), t)).logits
        alone = model(tokens[:, :t]).logits
        assert largest_change(alone, ended if ended.dim() == 2 else ended[:, :t]) <= 1e-9


@pytest.mark.parametrize("case", LM_CASES)
def test_logits_are_those_of_the_prefix(case: str) -> None:
    model, tokens = eval_model(case), random_tokens(case)
    logits = model(tokens).logits
    for t in (1, 6, 15):
        assert largest_change(model(tokens[:, :t]).logits, logits[:, :t]) <= 1e-9


@pytest.mark.parametrize(("case", "mode"), MODES)
def test_padding_values_are_irrelevant(case: str, mode: str) -> None:
    model = eval_model(case) if mode == "eval" else fresh_model(case)
    rows = ragged_rows(case, LENGTHS)
    outs = []
    for value in (0, 5):
        tokens, lengths = pad(rows, value)
        outs.append(model(tokens, labels=labels_for(case, tokens, lengths), lengths=lengths))
    for first, second, length in zip(outs[0].logits, outs[1].logits, LENGTHS, strict=True):
        assert largest_change(row_logits(first, length), row_logits(second, length)) <= 1e-12
    assert outs[0].losses.keys() == outs[1].losses.keys()
    for name, loss in outs[0].losses.items():
        assert largest_change(loss, outs[1].losses[name]) <= 1e-12, name


@pytest.mark.parametrize("case", REPEATABLE)
def test_more_padding_changes_nothing(case: str) -> None:
    model = fresh_model(case)
    rows = ragged_rows(case, LENGTHS)
    tokens, lengths = pad(rows)
    wider = torch.cat([tokens, torch.full((len(rows), 7), 3)], 1)
    narrow = model(tokens, labels=labels_for(case, tokens, lengths), lengths=lengths)
    wide = model(wider, labels=labels_for(case, wider, lengths), lengths=lengths)
    for first, second, length in zip(wide.logits, narrow.logits, LENGTHS, strict=True):
        assert largest_change(row_logits(first, length), row_logits(second, length)) <= 1e-9
    assert largest_change(wide.loss, narrow.loss) <= 1e-9


@pytest.mark.parametrize("case", LM_CASES)
def test_documents_do_not_see_each_other(case: str) -> None:
    """Two documents in one row, told apart by `document_ids`, as two rows of their own."""
    model = eval_model(case)
    first, second = ragged_rows(case, [9, 7])
    packed = torch.cat([first, second])[None]
    document_ids = torch.tensor([0] * 9 + [1] * 7)[None]
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    logits = model(packed, document_ids=document_ids, positions=positions).logits[0]
    assert largest_change(logits[:9], model(first[None]).logits[0]) <= 1e-9
    other = torch.cat([(first + 1) % config_of(case).vocab_size, second])[None]
    changed = model(other, document_ids=document_ids, positions=positions).logits[0]
    assert largest_change(changed[9:], logits[9:]) <= 1e-9
    assert largest_change(changed[:9], logits[:9]) > 1e-3
    assert largest_change(logits[9:], model(packed).logits[0, 9:]) > 1e-6
    if config_of(case).depth.kind != "random":  # which goes by the place in the row
        assert largest_change(logits[9:], model(second[None]).logits[0]) <= 1e-9


@pytest.mark.parametrize("case", LM_CASES)
def test_loss_is_the_shifted_cross_entropy(case: str) -> None:
    """Labels are the tokens themselves or the window with the token after it; -100 counts nowhere."""
    model, tokens = eval_model(case), random_tokens(case, 2, 12)
    labels = tokens.clone()
    labels[0, 3:6] = labels[1, 11] = -100
    out = model(tokens, labels=labels)
    log_probabilities = out.logits.log_softmax(-1)
    kept = [(b, t) for b in range(2) for t in range(11) if labels[b, t + 1] >= 0]
    expected = -sum(log_probabilities[b, t, labels[b, t + 1]].item() for b, t in kept) / len(kept)
    assert out.loss.item() == pytest.approx(expected, abs=1e-9)
    assert out.losses["lm"].item() == pytest.approx(expected, abs=1e-9)
    window = model(tokens[:, :-1], labels=tokens)
    log_probabilities = window.logits.log_softmax(-1)
    expected = -log_probabilities.gather(-1, tokens[:, 1:, None]).mean().item()
    assert window.loss.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_training_loss_is_the_weighted_sum(case: str) -> None:
    tokens = random_tokens(case, 2, 12)
    labels = labels_for(case, tokens)
    out = fresh_model(case)(tokens, labels=labels)
    assert out.objective == {"lm": "lm", "classifier": "classification"}[config_of(case).head.kind]
    assert {out.objective, *out.loss_weights} <= set(out.losses)
    total = out.losses[out.objective] + sum(weight * out.losses[name] for name, weight in out.loss_weights.items())
    assert largest_change(out.loss, torch.as_tensor(total)) <= 1e-12
    evaluated = eval_model(case)(tokens, labels=labels)
    assert torch.equal(evaluated.loss, evaluated.losses[out.objective])


@pytest.mark.parametrize("case", LM_CASES)
def test_logits_to_keep(case: str) -> None:
    model, tokens = eval_model(case), random_tokens(case)
    logits = model(tokens).logits
    for count in (1, 5):
        kept = model(tokens, logits_to_keep=count).logits
        assert kept.shape == (2, count, config_of(case).vocab_size)
        assert largest_change(kept, logits[:, -count:]) <= 1e-12


def by_distance(case: str) -> bool:
    """Whether positions count in rotary attention alone."""
    config = config_of(case)
    steps = getattr(getattr(config.mixer, "depth", None), "kind", "fixed")
    return config.attention.positions == "rope" and steps != "random"


@pytest.mark.parametrize("case", [case for case in cases("fixed") if by_distance(case)])
def test_positions_are_relative(case: str) -> None:
    """Rotary attention sees distances only: all positions moved by the same step change nothing."""
    model, tokens = eval_model(case), random_tokens(case)
    moved = model(tokens, positions=torch.arange(16)[None].expand(2, -1) + 17).logits
    assert largest_change(moved, model(tokens).logits) <= 1e-9
    stretched = model(tokens, positions=2 * torch.arange(16)[None].expand(2, -1)).logits
    assert largest_change(stretched, model(tokens).logits) > 1e-6
