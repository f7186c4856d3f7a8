"""Invariant 9: weights that are saved and loaded give the same logits, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import morex
from parity.helpers import (
    CASES,
    config_of,
    fresh_model,
    labels_for,
    random_tokens,
)


@pytest.mark.parametrize("case", CASES)
def test_save_load(case: str, tmp_path: Path) -> None:
    """The state dict as safetensors takes it: every tensor once; router state that training moved is part of it."""
    tokens = random_tokens(case)
    model: Any = fresh_model(case, torch.float32)
    model.update_routers(model(tokens, labels=labels_for(case, tokens)).stats, 1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other: Any = morex.build_model(config_of(case).model_copy(update={"seed": 99}))
    before = other.eval()(tokens).logits
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert not torch.equal(before, other(tokens).logits)
    assert torch.equal(other(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("case", CASES)
def test_load_refuses_another_shape(case: str) -> None:
    state = fresh_model(case, torch.float32).state_dict()
    narrower: Any = morex.build_model(config_of(case).model_copy(update={"vocab_size": 61}))
    with pytest.raises(RuntimeError, match=r"embedding\.weight"):
        narrower.load_state_dict(state)
