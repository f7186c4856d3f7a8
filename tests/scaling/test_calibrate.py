"""What this machine's processor can do: rates with which the closed forms give what was measured."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import morex
from morex.loading import ConfigError, presets
from morex.model.count import block_costs, count
from morex.scaling import calibrate
from morex.scaling.calibrate import this_processor
from morex.scaling.layouts import evaluate
from morex.scaling.memory import Layout
from morex.scaling.speed import OPTIMIZER_TRAFFIC, passes_of

SIZES = "train.batch_size=4", "train.accumulation=1"
MOVED = 0.001
"""Seconds that bytes take, as the tests have it."""


def pretend(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Passes through the blocks take so long, and moving bytes `MOVED`."""

    def timed(run: Callable[[], Any], *limits: Any, **options: Any) -> float:
        run()
        return seconds if run.__name__ == "passes" else MOVED

    monkeypatch.setattr(calibrate, "_seconds", timed)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", ["vanilla", "mor-expert", "more", "moe", "huginn"])
def test_the_closed_forms_take_as_long_as_the_blocks(
    preset: str, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the measured rates, a plan for the model that was measured says what was measured."""
    config = morex.load_config(preset, SIZES, tiny=True)
    pretend(monkeypatch, 3.0)
    device = this_processor(config, 1, precision)
    own = config.model_copy(update={"model": calibrate._sample(config.model)})
    plan = evaluate(own, Layout(1, 1, 1), device, precision)
    update = OPTIMIZER_TRAFFIC * plan.memory.parameters / device.bandwidth
    assert plan.time.seconds - update == pytest.approx(3.0)
    assert device.bandwidth == 12 * 2**21 / MOVED


@pytest.mark.parametrize("name", presets())
def test_every_model_has_blocks_that_run(name: str) -> None:
    """As many tokens as asked for, whatever the router, the rule of keys or the head of the model."""
    config = morex.load_config(name, tiny=True)
    sample = calibrate._sample(config.model)
    assert block_costs(sample).parameters == block_costs(config.model).parameters
    tokens = torch.randint(sample.vocab_size, (2, 8))
    loss = morex.build_model(sample).train()(tokens, labels=tokens).loss
    assert loss is not None and torch.isfinite(loss)


def test_passes_that_only_move_bytes_still_have_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    config = morex.load_config("vanilla", SIZES, tiny=True)
    pretend(monkeypatch, 1e-9)
    assert 0 < this_processor(config, 1, "fp32").flops_fp32 < float("inf")


def test_a_pass_is_short_however_large_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer sequences, and of the one that is left fewer tokens; the rate is still that of what was measured."""
    config = morex.load_config("vanilla", ["train.batch_size=8", "train.accumulation=1"], tiny=True)
    sample, length = calibrate._sample(config.model), config.train.seq_len
    per_token = count(sample, seq_len=length).train_flops_per_token
    pretend(monkeypatch, 3.0)
    for most, rows, tokens in ((100 * length, 8, length), (3.5 * length, 3, length), (length / 2, 1, length // 2)):
        monkeypatch.setattr(calibrate, "MOST_FLOPS", most * per_token)
        flops, size = passes_of(sample, rows, tokens, "fp32", has_fast_paths=True)
        device = this_processor(config, 1, "fp32")
        assert device.flops_fp32 == pytest.approx(flops / (3.0 - size / device.bandwidth))


def test_more_ranks_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with pytest.raises(ConfigError, match="--gpus 3 is more than the 2 cores of this machine; use 1 to 2"):
        this_processor(morex.load_config("vanilla", SIZES, tiny=True), 3, "fp32")
