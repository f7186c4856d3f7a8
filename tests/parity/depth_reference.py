"""Huginn's recursion and Ouro's exits on plain numbers: lists and loops in double precision, from the formulas alone.

Nothing of morex is imported, and no tensor comes in or goes out. A sequence is a list of vectors, one for each token.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Vector = list[float]
Matrix = Sequence[Sequence[float]]


def product(matrix: Matrix, x: Sequence[float]) -> Vector:
    return [sum(weight * value for weight, value in zip(row, x, strict=True)) for row in matrix]


def total(x: Sequence[float], y: Sequence[float]) -> Vector:
    return [a + b for a, b in zip(x, y, strict=True)]


def rms_norm(x: Sequence[float], weight: Sequence[float], eps: float) -> Vector:
    root = math.sqrt(sum(value * value for value in x) / len(x) + eps)
    return [value / root * factor for value, factor in zip(x, weight, strict=True)]


def gated_mlp(x: Sequence[float], gate: Matrix, up: Matrix, down: Matrix) -> Vector:
    """down (silu(gate x) * up x)."""
    opened = [value * sigmoid(value) for value in product(gate, x)]
    return product(down, [a * b for a, b in zip(opened, product(up, x), strict=True)])


def turned(x: Sequence[float], position: int, base: float) -> Vector:
    """Channels i and i + d/2 turned by the angle position / base^(2i / d)."""
    half, out = len(x) // 2, list(x)
    for i in range(half):
        angle = position / base ** (2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return out


def attention(xs: Sequence[Vector], w: Mapping[str, Any], heads: int, kv_heads: int, base: float) -> list[Vector]:
    """Causal attention of each token to itself and those before it; head h reads key head h / (heads / kv_heads)."""
    dim = len(w["q"]) // heads
    queries, keys, values = ([product(w[name], x) for x in xs] for name in "qkv")

    def head(x: Vector, index: int) -> Vector:
        return x[index * dim : (index + 1) * dim]

    outputs = []
    for t, query in enumerate(queries):
        joined: Vector = []
        for h in range(heads):
            shared = h // (heads // kv_heads)
            own = turned(head(query, h), t, base)
            earlier = [turned(head(keys[s], shared), s, base) for s in range(t + 1)]
            weights = softmax([sum(a * b for a, b in zip(own, key, strict=True)) / math.sqrt(dim) for key in earlier])
            read = [head(values[s], shared) for s in range(t + 1)]
            joined += [sum(p * value[i] for p, value in zip(weights, read, strict=True)) for i in range(dim)]
        outputs.append(product(w["o"], joined))
    return outputs


def sandwich_block(
    xs: Sequence[Vector], w: Mapping[str, Any], heads: int, kv_heads: int, base: float, eps: float
) -> list[Vector]:
    """x <- n2(x + attention(n1(x))), then x <- n4(x + mlp(n3(x))) (Geiping et al. 2025, section 3.2)."""
    read = attention([rms_norm(x, w["n1"], eps) for x in xs], w, heads, kv_heads, base)
    xs = [rms_norm(total(x, y), w["n2"], eps) for x, y in zip(xs, read, strict=True)]
    made = [gated_mlp(rms_norm(x, w["n3"], eps), w["gate"], w["up"], w["down"]) for x in xs]
    return [rms_norm(total(x, y), w["n4"], eps) for x, y in zip(xs, made, strict=True)]


def core_step(
    states: Sequence[Vector],
    inputs: Sequence[Vector],
    adapter: Matrix,
    blocks: Sequence[Mapping[str, Any]],
    heads: int,
    kv_heads: int,
    base: float,
    eps: float,
) -> list[Vector]:
    """One recursion of Huginn's core: its blocks on adapter [s; e], of each token's state s and input e."""
    xs = [product(adapter, [*s, *e]) for s, e in zip(states, inputs, strict=True)]
    for block in blocks:
        xs = sandwich_block(xs, block, heads, kv_heads, base, eps)
    return xs


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softmax(scores: Sequence[float]) -> Vector:
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def exit_distribution(gates: Sequence[float]) -> Vector:
    """p_r = lambda_r prod_{s<r} (1 - lambda_s) of the gates lambda_1..lambda_{R-1}; recursion R takes what is left."""
    left, shares = 1.0, []
    for gate in gates:
        shares.append(gate * left)
        left *= 1 - gate
    return [*shares, left]


def entropy(shares: Sequence[float]) -> float:
    """In nats; a share of nothing counts nothing."""
    return -sum(p * math.log(p) for p in shares if p > 0)


def exit_loss(gates: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], beta: float) -> float:
    """Mean over tokens of sum_r p_r CE_r - beta H(p) (Zhu et al. 2025, section 3).

    Args:
        gates: lambda_1..lambda_{R-1} of each token.
        losses: CE_1..CE_R of each token.
        beta: weight of the entropy.
    """
    terms = []
    for own, ces in zip(gates, losses, strict=True):
        shares = exit_distribution(own)
        terms.append(sum(p * ce for p, ce in zip(shares, ces, strict=True)) - beta * entropy(shares))
    return sum(terms) / len(terms)


def exit_recursion(gates: Sequence[float], threshold: float) -> int:
    """The first recursion, from 1, up to which the exit probabilities sum to the threshold; otherwise the last."""
    reached = 0.0
    for r, share in enumerate(exit_distribution(gates), start=1):
        reached += share
        if reached >= threshold:
            return r
    return len(gates) + 1
