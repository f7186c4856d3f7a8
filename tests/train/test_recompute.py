"""Steps that are computed again in the backward pass."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import morex
from morex.config import Config
from morex.loading import ConfigError
from morex.model.lm import build_model
from morex.train.parallel import parallelise, recompute
from morex.train.ranks import ALONE
from train.helpers import KINDS, checkpoint_bytes, configure, losses, run

KEPT = {name: kind for name, kind in KINDS.items() if kind[0] not in ("huginn", "ouro")}
"""Whose kv is not `refresh`."""


WAYS = "steps", "recursions", "selective"
ALL_WAYS = (
    *("dropout", "expert_choice accumulated", "token_choice", "halting", "fixed"),
    *("experts routed", "experts with steps by a router", "recurrent experts", "recurrent layer"),
)
"""Kinds that are computed again in all ways, the others in one."""


@pytest.mark.parametrize("kind", KEPT)
def test_nothing_else_changes(kind: str, corpus: Path, tmp_path: Path) -> None:
    """To the bit: what is drawn at random is drawn again as it was."""
    preset, overrides = KEPT[kind]
    plain, *others = (
        run(configure(preset, corpus, *overrides, f"train.recompute={what}"), tmp_path / what)
        for what in ("nothing", *(WAYS if kind in ALL_WAYS else WAYS[:1]))
    )
    for other in others:
        assert losses(plain) == losses(other)
        assert checkpoint_bytes(plain, 6) == checkpoint_bytes(other, 6)


def test_nothing_else_changes_under_autocast(corpus: Path, tmp_path: Path) -> None:
    """To the bit, but that `selective` sums the gradients of shared weights in fp32."""
    plain, *exact, selective = (
        run(configure("mor-expert", corpus, "train.precision=bf16", f"train.recompute={what}"), tmp_path / what)
        for what in ("nothing", *WAYS)
    )
    for other in exact:
        assert losses(plain) == losses(other)
        assert checkpoint_bytes(plain, 6) == checkpoint_bytes(other, 6)
    pairs = zip(losses(plain), losses(selective), strict=True)
    assert losses(plain)[0][1] == losses(selective)[0][1]
    assert all(abs(mine["lm"] - theirs["lm"]) < 1e-3 for (_, mine, *_), (_, theirs, *_) in pairs)


def kept_bytes(config: Config) -> int:
    """What a forward pass keeps for its backward pass."""
    model = build_model(config.model).train()
    parallelise(model, config.train, ALONE, "cpu")
    tokens = torch.randint(1, 200, (4, 64))
    before = storages()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):  # seen by Python
        out: Any = model(tokens, labels=tokens)
    kept = sum(size for pointer, size in storages().items() if pointer not in before)
    out.loss.backward()
    return kept


def storages() -> dict[int, int]:
    """Bytes of all memory that tensors hold, by address."""
    gc.collect()
    held = [thing.untyped_storage() for thing in gc.get_objects() if type(thing) in (Tensor, Parameter)]
    return {storage.data_ptr(): storage.nbytes() for storage in held}


def test_four_recursions_keep_less(corpus: Path) -> None:
    """At R = 4 steps keep at most two fifths of what they keep otherwise, recursions less still."""
    own = ("model.schedule={sharing: middle_cycle, layers: 14, recursions: 4}", "model.d_model=64", "train.seq_len=64")
    plain, steps, recursions, selective = (
        kept_bytes(configure("mor-expert", corpus, *own, f"train.recompute={what}")) for what in ("nothing", *WAYS)
    )
    assert recursions < steps < 0.4 * plain and steps < selective < plain


@pytest.mark.parametrize("what", WAYS)
def test_rules_that_read_what_came_later_are_refused(what: str, corpus: Path) -> None:
    with pytest.raises(ConfigError, match=rf"train.recompute '{what}' .* model.kv 'refresh'"):
        configure("huginn", corpus, f"train.recompute={what}")


@pytest.mark.parametrize("what", WAYS)
@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("recursive", ()),
        ("recursive", ("model.mixer={kind: recursive}", "model.schedule={sharing: sequence, recursions: 2, core: 2}")),
        ("mor-threshold", ()),
        ("mor-token", ()),
    ],
)
def test_keys_of_the_first_recursion_are_read_again(preset: str, overrides: tuple[str, ...], what: str) -> None:
    """Also of rows of several lengths, whose keys stand in frames with padding."""
    config = morex.load_config(preset, ["model.kv=shared_first", *overrides], tiny=True)
    tokens = torch.randint(config.model.vocab_size, (3, 12), generator=torch.Generator().manual_seed(1))
    found: list[list[Tensor | None]] = []
    for way in ("nothing", what):
        model = build_model(config.model, dtype=torch.float64).train()
        recompute(model.stack, way)
        out = model(tokens, labels=tokens, lengths=torch.tensor([12, 5, 9]))
        assert out.loss is not None
        out.loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or (theirs is not None and torch.equal(mine, theirs))
