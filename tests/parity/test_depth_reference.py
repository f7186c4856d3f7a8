"""Huginn's recursion and Ouro's exits against plain numbers, and the facts that the plain formulas must have."""

import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from morex.config import ModelConfig
from morex.loading import validate
from parity.depth_reference import (
    core_step,
    entropy,
    exit_distribution,
    exit_loss,
    exit_recursion,
    rms_norm,
    sandwich_block,
)
from parity.helpers import build

BASE, EPS = 100.0, 1e-5
LOOP: dict[str, Any] = {
    "vocab_size": 19,
    "d_model": 12,
    "norm_eps": EPS,
    "attention": {"heads": 2, "kv_heads": 1, "rope_base": BASE},
    "mixer": {"kind": "swiglu", "d_ff": 10},
    "schedule": {"sharing": "cycle", "core": 2, "recursions": 4},
}
HUGINN = LOOP | {"norm_placement": "sandwich", "input_injection": "concat"}
OURO = LOOP | {"norm_placement": "pre_post", "depth": {"kind": "exit_gate", "entropy_weight": 0.3}, "kv": "refresh"}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def gates_of(count: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [draw.random() for _ in range(count)]


@pytest.mark.parametrize("recursions", [1, 2, 3, 8])
def test_exit_probabilities_sum_to_one(recursions: int) -> None:
    for seed in range(20):
        shares = exit_distribution(gates_of(recursions - 1, seed))
        assert len(shares) == recursions
        assert sum(shares) == pytest.approx(1, abs=1e-12)
        assert all(share >= 0 for share in shares)


def test_exit_probabilities_at_the_extremes() -> None:
    """A gate that is shut sends all to the end, one that is open lets all out, and nothing is NaN."""
    assert exit_distribution([0.0, 0.0, 0.0]) == [0, 0, 0, 1]
    assert exit_distribution([1.0, 0.5, 0.5]) == [1, 0, 0, 0]
    assert entropy([0, 0, 0, 1]) == entropy([1, 0, 0, 0]) == 0


@pytest.mark.parametrize("recursions", [2, 3, 8])
def test_gates_that_divide_evenly_have_the_highest_entropy(recursions: int) -> None:
    """lambda_r = 1 / (R - r + 1) makes all exits alike, and ln R; any other gates have less."""
    even = [1 / (recursions - r) for r in range(recursions - 1)]
    assert exit_distribution(even) == pytest.approx([1 / recursions] * recursions)
    assert entropy(exit_distribution(even)) == pytest.approx(math.log(recursions))
    assert all(entropy(exit_distribution(gates_of(recursions - 1, seed))) < math.log(recursions) for seed in range(20))


def test_the_loss_over_exits() -> None:
    """Equal losses are their own mean; a sure gate takes one of them; entropy lowers the loss by beta."""
    gates = [gates_of(2, seed) for seed in range(5)]
    assert exit_loss(gates, [[0.7] * 3] * 5, beta=0) == pytest.approx(0.7)
    assert exit_loss([[0.0, 1.0]], [[5.0, 2.0, 9.0]], beta=3.0) == 2
    plain, rewarded = (exit_loss([[1 / 3, 1 / 2]], [[1.0, 2.0, 3.0]], beta) for beta in (0.0, 0.5))
    assert (plain, plain - rewarded) == (pytest.approx(2), pytest.approx(0.5 * math.log(3)))


def test_the_exit_is_where_the_probabilities_reach_the_threshold() -> None:
    gates = [0.25, 0.5, 0.5]  # sums: 0.25, 0.625, 0.8125, 1
    assert [exit_recursion(gates, threshold) for threshold in (0.2, 0.25, 0.3, 0.7, 0.9, 1.0)] == [1, 1, 2, 3, 4, 4]
    assert exit_recursion([], 0.5) == 1
    depths = [exit_recursion(gates_of(5), threshold / 20) for threshold in range(1, 21)]
    assert depths == sorted(depths)


def test_norms_behind_a_sandwich_keep_the_size_of_states() -> None:
    """Whatever comes in, the last norm leaves a mean square of 1."""
    draw = random.Random(1)

    def matrix(rows: int, columns: int) -> list[list[float]]:
        return [[draw.gauss(0, 1) for _ in range(columns)] for _ in range(rows)]

    block: dict[str, Any] = {name: matrix(4, 4) for name in "qkvo"}
    block |= {"gate": matrix(6, 4), "up": matrix(6, 4), "down": matrix(4, 6)}
    block |= {f"n{i}": [1.0] * 4 for i in range(1, 5)}
    for size in (1e-3, 1.0, 1e6):
        xs = [[size * draw.gauss(0, 1) for _ in range(4)] for _ in range(3)]
        for x in sandwich_block(xs, block, heads=2, kv_heads=2, base=10.0, eps=1e-12):
            assert sum(value * value for value in x) / 4 == pytest.approx(1, rel=1e-6)
    assert rms_norm([3.0, 4.0], [1.0, 2.0], 0.0) == pytest.approx([3 / math.sqrt(12.5), 8 / math.sqrt(12.5)])


def plain_block(model: Any, index: int) -> dict[str, Any]:
    """The weights of a core block as lists, under the reference's names."""
    weights = {name: weight.tolist() for name, weight in model.stack.core.blocks[index].state_dict().items()}
    names = {"norm1": "n1", "norm1_after": "n2", "norm2": "n3", "norm2_after": "n4"}
    plain = {short: weights[f"{name}.weight"] for name, short in names.items()}
    plain |= {name: weights[f"attention.{name}.weight"] for name in "qkvo"}
    return plain | {name: weights[f"mixer.{name}.weight"] for name in ("gate", "up", "down")}


def test_each_recursion_of_the_core_is_huginns() -> None:
    """Sandwiched blocks on adapter [s; e], from the state before, the core's input injected every time."""
    model = build(validate(ModelConfig, HUGINN), std=0.4).eval()
    ((_, states),) = model(TOKENS, return_trace=True).trace.states.items()
    inputs = [model.embedding.weight[token].tolist() for token in TOKENS[0].tolist()]
    adapter = model.stack.core.groups[0].injection.adapter.tolist()
    blocks = [plain_block(model, index) for index in range(2)]
    before = inputs
    for state in states:
        before = core_step(before, inputs, adapter, blocks, heads=2, kv_heads=1, base=BASE, eps=EPS)
        assert (state[0] - torch.tensor(before, dtype=torch.float64)).abs().max() <= 1e-9
    assert len(states) == 4 and all((a - b).abs().max() > 1e-3 for a, b in pairwise(states))


def losses_of(model: Any, recursion: int) -> list[float]:
    """Cross-entropy of each next token after so many recursions."""
    logits: Tensor = model(TOKENS, depth=recursion).logits[0, :-1].log_softmax(-1)
    return (-logits.gather(1, TOKENS[0, 1:, None]))[:, 0].tolist()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_loss_and_the_exits_of_the_gate_are_ouros(seed: int) -> None:
    """From the gates that the model shows and its loss at each depth: the loss of training, and who leaves where."""
    model = build(validate(ModelConfig, OURO), std=0.4, seed=seed)
    out = model(TOKENS, labels=TOKENS, return_trace=True)
    ((_, scores),) = out.trace.scores.items()
    gates = [[score[0, t].item() for score in scores[:-1]] for t in range(TOKENS.shape[1])]
    assert scores[-1].isnan().all()
    losses = [list(own) for own in zip(*(losses_of(model, r) for r in range(1, 5)), strict=True)]
    assert out.loss.item() == pytest.approx(exit_loss(gates[:-1], losses, beta=0.3), abs=1e-9)
    taken = set()
    for threshold in (0.2, 0.5, 0.8):
        trace = model.eval()(TOKENS, depth=f"exit:gate:{threshold}", return_trace=True).trace
        ((_, shown),) = trace.scores.items()
        for t, depth in enumerate(trace.depth[0].tolist()):
            # Gates end where a token leaves; those after it, of 0 here, come too late to matter.
            assert depth == exit_recursion([score[0, t].nan_to_num().item() for score in shown[:-1]], threshold)
            assert all(score[0, t].isnan() for score in shown[depth:])
            taken.add(depth)
        # The first token sees nobody, so its gates are those of training.
        assert trace.depth[0, 0] == exit_recursion(gates[0], threshold)
    assert len(taken) > 1
