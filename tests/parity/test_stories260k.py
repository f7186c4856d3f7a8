"""Against a model that others trained: stories260K of llama2.c gives its documented text, and its logits are exact."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import morex
from morex.config import ModelConfig
from morex.loading import validate
from parity import llama2c
from parity.helpers import largest_change, pad

FIRST = [403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338]
"""The first tokens after BOS."""
STEPS = 256
"""Tokens of the documented story: what llama2.c writes where it is not told otherwise. It breaks off in a sentence."""
FIRST_LOGITS = {403: 17.0235, 385: 15.4062, 410: 13.1083, 317: 12.7692, 407: 12.4181}
# Greedy output as llama2.c documents it (doc/stories260K.md there).
STORY = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, \
red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with \
your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know what to do." Her mom said, "Don't worry, \
Lily. We can help you."""


def folder() -> Path:
    given = os.environ.get("MOREX_DATA")
    if not given or not Path(given, "stories260K", "stories260K.bin").is_file():
        pytest.skip("MOREX_DATA names no folder with stories260K/stories260K.bin")
    return Path(given, "stories260K")


@cache
def checkpoint() -> llama2c.Checkpoint:
    return llama2c.read_checkpoint(folder() / "stories260K.bin")


def halves_first(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of queries or keys whose rotation turns channels (2i, 2i + 1), in the order that turns (i, i + dim / 2)."""
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


@cache
def model(dtype: torch.dtype = torch.float64) -> Any:
    """The checkpoint as a model of ours, in eval mode."""
    theirs = checkpoint()
    tree = {
        "vocab_size": theirs.vocab_size,
        "d_model": theirs.dim,
        "max_seq_len": theirs.seq_len,
        "norm_eps": llama2c.EPS,
        "attention": {"heads": theirs.heads, "kv_heads": theirs.kv_heads, "rope_base": llama2c.ROPE_BASE},
        "mixer": {"kind": "swiglu", "d_ff": theirs.hidden_dim},
        "schedule": {"layers": theirs.layers},
    }
    w = theirs.weights
    weights = {"embedding.weight": w["embedding"], "norm.weight": w["norm"]}
    for layer in range(theirs.layers):
        block = f"stack.core.blocks.{layer}"
        weights |= {
            f"{block}.norm1.weight": w["attention_norm"][layer],
            f"{block}.norm2.weight": w["mixer_norm"][layer],
            f"{block}.attention.v.weight": w["v"][layer],
            f"{block}.attention.o.weight": w["o"][layer],
        }
        weights |= {f"{block}.attention.{n}.weight": halves_first(w[n][layer], theirs.head_dim) for n in "qk"}
        weights |= {f"{block}.mixer.{n}.weight": w[n][layer] for n in ("gate", "up", "down")}
    built: Any = morex.build_model(validate(ModelConfig, tree), dtype=dtype)
    built.load_state_dict({name: torch.tensor(values) for name, values in weights.items()}, strict=True)
    return built.eval()


@cache
def story(dtype: torch.dtype = torch.float64) -> tuple[int, ...]:
    """BOS and what the model writes."""
    (ids,) = model(dtype).generate([[llama2c.BOS]], max_new_tokens=STEPS, eos_id=llama2c.BOS)
    return tuple(ids)


def test_every_weight_of_the_file_is_used() -> None:
    """Beside the tables of angles, which follow from the base: they start with angle 0, cosine 1 and sine 0."""
    unused = checkpoint().weights["angles"]
    assert np.array_equal(unused[0, 0], np.ones(4)) and np.array_equal(unused[1, 0], np.zeros(4))
    read = sum(values.size for values in checkpoint().weights.values())
    assert morex.count(model().config).parameters == read - unused.size == 260_032


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_decoding_writes_the_documented_story(dtype: torch.dtype) -> None:
    ids = story(dtype)
    assert list(ids[1:17]) == FIRST
    assert len(ids) == 1 + STEPS
    assert llama2c.decode(ids, llama2c.read_vocabulary(folder() / "tok512.bin")) == STORY


def test_the_first_logits_are_the_documented_ones() -> None:
    values, ids = model()(torch.tensor([[llama2c.BOS]])).logits[0, 0].topk(5)
    assert ids.tolist() == list(FIRST_LOGITS)
    assert values.tolist() == pytest.approx(list(FIRST_LOGITS.values()), abs=1e-4)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_logits_are_those_of_a_plain_forward(dtype: torch.dtype, atol: float) -> None:
    """Along the whole story, against the reference that is written from the description of the format."""
    ids = story()
    expected = torch.from_numpy(llama2c.logits(checkpoint(), ids))
    assert expected.argmax(-1)[:-1].tolist() == list(ids[1:])
    with torch.no_grad():
        found = model(dtype)(torch.tensor([ids])).logits[0]
    assert largest_change(found, expected) <= atol


def test_channels_in_their_file_order_would_turn_otherwise() -> None:
    """What the comparison is worth: without reordering queries and keys the logits are far off."""
    theirs, ids = checkpoint(), torch.tensor([story()[:32]])
    unordered: Any = morex.build_model(model().config, dtype=torch.float64).eval()
    weights = dict(model().state_dict())
    for layer in range(theirs.layers):
        weights |= {
            f"stack.core.blocks.{layer}.attention.{n}.weight": torch.tensor(theirs.weights[n][layer]) for n in "qk"
        }
    unordered.load_state_dict(weights)
    with torch.no_grad():
        assert largest_change(unordered(ids).logits, model()(ids).logits) > 1.0


def test_cached_logits_are_the_uncached_ones() -> None:
    """Three pieces of the story of different lengths, fed in chunks."""
    ids = story()
    rows = [torch.tensor(ids[start : start + length]) for start, length in ((0, 120), (7, 64), (100, 33))]
    cache, found = model().new_cache(3), [[] for _ in rows]
    with torch.no_grad():
        for first, last in ((0, 40), (40, 41), (41, 42), (42, 120)):
            tokens, lengths = pad([row[first:last] for row in rows])
            out = model()(tokens, lengths=lengths, cache=cache)
            for pieces, logits, length in zip(found, out.logits, lengths.tolist(), strict=True):
                pieces.append(logits[:length])
        for row, pieces in zip(rows, found, strict=True):
            assert largest_change(torch.cat(pieces), model()(row[None]).logits[0]) <= 1e-9


def test_generation_with_and_without_cache_is_the_same() -> None:
    prompts = [list(story()[:1]), list(story()[:9])]
    cached = model().generate(prompts, max_new_tokens=24)
    assert cached == model().generate(prompts, max_new_tokens=24, use_cache=False)
    assert [tuple(ids) for ids in cached] == [story()[:25], story()[:33]]
