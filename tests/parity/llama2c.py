"""The checkpoint format of llama2.c (its legacy form) and the model that it describes, in plain numpy and float64.

Nothing of morex is imported: written from the description of the format, a reference that others' weights run on.
"""

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BOS = 1
EPS, ROPE_BASE = 1e-5, 10_000.0
"""Term under the root of the norms and base of the rotation, which the file does not hold."""


@dataclass(frozen=True)
class Checkpoint:
    """What the file holds; weights are stacked over layers, matrices are [out, in]."""

    dim: int
    hidden_dim: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    seq_len: int
    weights: Mapping[str, Array]

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def read_checkpoint(path: Path) -> Checkpoint:
    """Seven little-endian int32, then float32: seven stacks of weights, and two tables of angles that nobody needs.

    A positive vocabulary size says that the output head is the embedding.
    """
    content = path.read_bytes()
    sizes = struct.unpack_from("<7i", content)
    dim, hidden, layers, heads, kv_heads, vocabulary, seq_len = sizes
    assert vocabulary > 0, "a checkpoint with a head of its own is not read here"
    head_dim = dim // heads
    shapes = {
        "embedding": (vocabulary, dim),
        "attention_norm": (layers, dim),
        "q": (layers, dim, dim),
        "k": (layers, kv_heads * head_dim, dim),
        "v": (layers, kv_heads * head_dim, dim),
        "o": (layers, dim, dim),
        "mixer_norm": (layers, dim),
        "gate": (layers, hidden, dim),
        "down": (layers, dim, hidden),
        "up": (layers, hidden, dim),
        "norm": (dim,),
        "angles": (2, seq_len, head_dim // 2),
    }
    numbers = np.frombuffer(content, "<f4", offset=28).astype(np.float64)
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    assert len(numbers) == ends[-1], f"{path} has {len(numbers)} numbers, and its sizes ask for {ends[-1]}"
    parts = np.split(numbers, ends[:-1])
    weights = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    return Checkpoint(*sizes, weights)


def read_vocabulary(path: Path) -> list[bytes]:
    """The pieces of a tokenizer file: the longest length, then score, length and bytes of each piece."""
    content = path.read_bytes()
    pieces, at = [], 4
    while at < len(content):
        _, length = struct.unpack_from("<fi", content, at)
        pieces.append(content[at + 8 : at + 8 + length])
        at += 8 + length
    return pieces


def decode(ids: Sequence[int], pieces: Sequence[bytes]) -> str:
    """The text of token ids: the first piece after BOS loses its leading space, `<0x0A>` stands for a byte."""
    text, before = b"", None
    for token in ids:
        piece = pieces[token]
        if token != BOS:
            byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", piece)
            if before == BOS:
                piece = piece.removeprefix(b" ")
            text += bytes([int(byte[1], 16)]) if byte else piece
        before = token
    return text.decode("utf-8")


def logits(checkpoint: Checkpoint, tokens: Sequence[int]) -> Array:
    """Logits [T, V] of one sequence: a Llama whose rotation turns neighbouring channels (2i, 2i + 1)."""
    w = checkpoint.weights
    x = w["embedding"][np.asarray(tokens)]
    for layer in range(checkpoint.layers):
        y = _norm(x, w["attention_norm"][layer])
        q, k, v = (y @ w[name][layer].T for name in "qkv")
        x = x + _attention(checkpoint, q, k, v) @ w["o"][layer].T
        y = _norm(x, w["mixer_norm"][layer])
        gate = y @ w["gate"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"][layer].T)) @ w["down"][layer].T
    return _norm(x, w["norm"]) @ w["embedding"].T


def _norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


def _attention(checkpoint: Checkpoint, q: Array, k: Array, v: Array) -> Array:
    """Queries [T, H * dim], keys and values [T, KV * dim] -> [T, H * dim], one head after the other."""
    dim, group = checkpoint.head_dim, checkpoint.heads // checkpoint.kv_heads
    later = np.triu(np.ones((len(q), len(q)), dtype=bool), 1)
    heads = []
    for head in range(checkpoint.heads):
        own = slice(head * dim, (head + 1) * dim)
        shared = slice(head // group * dim, (head // group + 1) * dim)
        scores = _turned(q[:, own]) @ _turned(k[:, shared]).T / math.sqrt(dim)
        scores[later] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, shared])
    return np.concatenate(heads, -1)


def _turned(x: Array) -> Array:
    """Each pair of neighbouring channels [T, dim] as a complex number, turned by position / base^(2i / dim)."""
    positions, pairs = np.arange(x.shape[0])[:, None], np.arange(0, x.shape[1], 2)
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * positions * ROPE_BASE ** (-pairs / x.shape[1]))
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)
