"""Steps that are computed again in the backward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from morex.config import Config
from morex.loading import ConfigError
from morex.model.lm import build_model
from morex.train.parallel import parallelise
from morex.train.ranks import ALONE
from train.helpers import KINDS, checkpoint_bytes, configure, losses, run

KEPT = {name: kind for name, kind in KINDS.items() if kind[0] not in ("huginn", "ouro")}
"""Whose kv is not `refresh`."""


@pytest.mark.parametrize("kind", KEPT)
def test_nothing_else_changes(kind: str, corpus: Path, tmp_path: Path) -> None:
    """To the bit: what is drawn at random is drawn again as it was."""
    preset, overrides = KEPT[kind]
    folders = [
        run(configure(preset, corpus, *overrides, f"train.recompute={what}"), tmp_path / what)
        for what in ("nothing", "steps")
    ]
    assert losses(folders[0]) == losses(folders[1])
    assert checkpoint_bytes(folders[0], 6) == checkpoint_bytes(folders[1], 6)


def kept_bytes(config: Config) -> int:
    """What a forward pass keeps for its backward pass, weights apart."""
    model = build_model(config.model).train()
    parallelise(model, config.train, ALONE, "cpu")
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(1, 200, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out: Any = model(tokens, labels=tokens)
    out.loss.backward()
    return sum(storages.values())


def test_four_recursions_keep_less_than_half(corpus: Path) -> None:
    """At R = 4 a step keeps at most two fifths of what it keeps otherwise."""
    own = ("model.schedule={sharing: middle_cycle, layers: 14, recursions: 4}", "model.d_model=64", "train.seq_len=64")
    plain, again = (
        kept_bytes(configure("mor-expert", corpus, *own, f"train.recompute={what}")) for what in ("nothing", "steps")
    )
    assert again < 0.4 * plain


def test_rules_that_read_what_came_later_are_refused(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.recompute 'steps' .* model.kv 'refresh'"):
        configure("huginn", corpus, "train.recompute=steps")
