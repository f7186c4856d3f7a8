"""The search for a layout, against all of them; and what a user is told whose model fits nowhere."""

import re
from dataclasses import replace
from itertools import product
from typing import get_args

import pytest

import morex
from morex.config import Config
from morex.loading import ConfigError
from morex.scaling.activations import Recompute
from morex.scaling.devices import DEVICES, Device, find_device
from morex.scaling.layouts import as_row, evaluate, layouts, plan
from morex.scaling.memory import Layout


def medium(batch: int, *overrides: str) -> Config:
    return morex.load_config(
        "mor-llm-medium", [f"train.batch_size={batch}", "train.accumulation=1", "train.seq_len=1024", *overrides]
    )


@pytest.mark.parametrize(("batch", "ranks"), [(64, 8), (96, 12), (48, 16), (64, 64)])
@pytest.mark.parametrize("device", ["h100", "rtx4090"])
def test_nothing_that_fits_is_faster(batch: int, ranks: int, device: str) -> None:
    """By brute force over every shards, accumulation, recompute and core_units, whether it divides or not."""
    config, on = medium(batch), DEVICES[device]
    best = plan(config, ranks, on, "bf16")
    rows = batch // ranks
    every = [
        evaluate(config, Layout(ranks, shards, parts, again, by_block), on, "bf16")
        for shards, parts, again, by_block in product(
            range(1, ranks + 1), range(1, rows + 1), get_args(Recompute), (False, True)
        )
        if ranks % shards == 0 and rows % parts == 0
    ]
    fitting = [one for one in every if one.memory.peak <= on.usable * on.memory]
    fastest = min(one.time.seconds for one in fitting)
    assert best.fits
    assert best.time.seconds <= 1.01 * fastest
    assert best.memory.peak == min(one.memory.peak for one in fitting if one.time.seconds <= 1.01 * fastest)


def test_less_memory_forces_another_layout() -> None:
    config = medium(64)
    roomy = plan(config, 8, DEVICES["b200"], "bf16")
    tight = plan(config, 8, replace(DEVICES["b200"], memory=roomy.memory.peak / 2), "bf16")
    assert tight.memory.peak <= 0.9 * roomy.memory.peak / 2
    assert tight.time.seconds >= roomy.time.seconds
    assert tight.layout != roomy.layout


def test_steps_are_not_computed_again_where_training_refuses_it() -> None:
    config = morex.load_config("ouro", ["train.batch_size=8", "train.accumulation=1"])
    device: Device = replace(DEVICES["h100"], memory=1e5)
    with pytest.raises(ConfigError, match="no layout fits"):
        plan(config, 8, device, "fp32")
    assert plan(config, 8, DEVICES["h100"], "fp32").layout.recompute == "nothing"


def test_linear_maps_keep_their_results_where_training_and_the_count_allow() -> None:
    """Not on a CPU, not in compiled blocks, and not where experts make products of their own."""
    gpu, cpu = DEVICES["h100"], replace(DEVICES["h100"], has_fast_paths=True)
    experts = morex.load_config("more", ["train.batch_size=8", "train.accumulation=1"])
    cases = (medium(8), gpu), (medium(8), cpu), (medium(8, "train.compile=true"), gpu), (experts, gpu)
    plain, *others = ({layout.recompute for layout in layouts(config, 1, device)} for config, device in cases)
    assert plain == set(get_args(Recompute))
    assert all(found == plain - {"selective"} for found in others)


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(
        ConfigError, match=r"train.batch_size 64 does not divide over 48 ranks; use train.batch_size=48"
    ):
        plan(medium(64), 48, DEVICES["h100"], "bf16")


def test_a_model_that_does_not_fit_is_told_what_would() -> None:
    batch = ["train.batch_size=8", "train.accumulation=1", "train.seq_len=256", "train.core_units=core"]
    large = morex.load_config("mor-llm-large", batch)
    with pytest.raises(ConfigError) as error:
        plan(large, 8, DEVICES["h100"], "bf16")
    match = re.search(
        r"no layout fits 8 x h100: at least [\d.]+ GB .* 72.0 GB .*; (\d+) of them would do", str(error.value)
    )
    assert match is not None
    more = int(match[1])
    grown = large.model_copy(update={"train": large.train.model_copy(update={"batch_size": more})})
    assert plan(grown, more, DEVICES["h100"], "bf16").fits
    with pytest.raises(ConfigError, match=r"it would fit on (h200|b200)"):
        plan(large, 8, DEVICES["l40s"], "bf16")


def test_what_follows_from_a_step() -> None:
    one = plan(medium(64), 8, DEVICES["h100"], "bf16")
    row = as_row(one, target_tokens=1e9)
    assert row["tokens_per_day"] == pytest.approx(64 * 1024 * 86_400 / one.time.seconds)
    assert row["gpu_hours"] == pytest.approx(8 * 24 * row["days"])
    assert 0 < row["utilisation"] < DEVICES["h100"].matmul_share


def test_an_unknown_device() -> None:
    with pytest.raises(ConfigError, match=r"--device 'h1000' is unknown; use h100, .*mi300x or cpu"):
        find_device("h1000")


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_the_table_is_in_order(device: Device) -> None:
    """Every device has a source; tensor units beat plain ones, and links the network."""
    assert "data sheet" in device.source or "white paper" in device.source
    assert device.flops_bf16 > device.flops_fp32
    assert device.link > device.network
    assert 1e10 < device.memory < 1e12 < device.bandwidth * 2
