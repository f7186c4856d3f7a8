"""The formulas of the independent reference: one vector at a time, from the papers, nothing of morex imported."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    mean_square = sum(value * value for value in x.tolist()) / len(x)
    return x / math.sqrt(mean_square + eps) * weight


def stretched(frequency: float, scaling: Mapping[str, Any]) -> float:
    """A rotary frequency under Llama 3's scaling, by the cases of its published program."""
    length, factor = scaling["original_max_seq_len"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / frequency
    if wavelength < length / high:
        return frequency
    if wavelength > length / low:
        return frequency / factor
    smooth = (length / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def rotate(x: Tensor, position: int, base: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Turns channel i together with channel i + d/2 by the angle position * base^(-2i/d)."""
    half = len(x) // 2
    turned = x.clone()
    for i in range(half):
        frequency = base ** (-2 * i / len(x))
        angle = position * (frequency if scaling is None else stretched(frequency, scaling))
        cos, sin = math.cos(angle), math.sin(angle)
        turned[i] = x[i] * cos - x[i + half] * sin
        turned[i + half] = x[i + half] * cos + x[i] * sin
    return turned


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    exponentials = [math.exp(logit - top) for logit in logits]
    return [value / sum(exponentials) for value in exponentials]


def best(scores: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` largest scores, largest first."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


def feed_forward(kind: str, x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None) -> Tensor:
    if kind in ("swiglu", "geglu"):
        assert gate is not None
        return down @ ((silu if kind == "swiglu" else gelu_tanh)(gate @ x) * (up @ x))
    return down @ (gelu(up @ x) if kind == "gelu" else torch.clamp(up @ x, min=0))
