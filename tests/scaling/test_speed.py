"""Time of a step, against sums by hand."""

from dataclasses import replace
from typing import Any

import pytest

import morex
from morex.config import Config
from morex.model.count import count, expected_shares
from morex.model.lm import attention_shape
from morex.nn.attention import attention_maps
from morex.nn.mixers import feed_forward_maps
from morex.scaling.devices import Device
from morex.scaling.layouts import evaluate
from morex.scaling.memory import Layout, units_of
from morex.scaling.speed import StepTime

PLAIN = Device(
    "plain", 1e12, 1e12, 1e15, 1e30, 1e6, 1e5, 4, "made up", 1.0, 1.0, 1.0, latency=0.0, overlaps=False
)  # fmt: skip
"""Memory that costs no time, links of 1 MB/s inside machines of four, a network of a tenth of that."""


@pytest.fixture
def config() -> Config:
    return morex.load_config("mor-expert", ["train.batch_size=16", "train.accumulation=1"])


def took(config: Config, layout: Layout, device: Device = PLAIN) -> StepTime:
    return evaluate(config, layout, device, "fp32").time


def test_arithmetic_is_the_count_of_flops(config: Config) -> None:
    counts = count(config.model, seq_len=config.train.seq_len)
    tokens = config.train.batch_size * config.train.seq_len
    alone, again = (took(config, Layout(1, 1, 1, recompute)) for recompute in ("nothing", "steps"))
    assert alone.arithmetic == pytest.approx(tokens * counts.train_flops_per_token / 1e12)
    repeated = counts.forward_flops_per_token - 2 * config.model.d_model * config.model.vocab_size
    assert again.arithmetic - alone.arithmetic == pytest.approx(tokens * repeated / 1e12)
    assert took(config, Layout(4, 1, 2, "nothing")).arithmetic == pytest.approx(alone.arithmetic / 4)
    assert alone.exchange == alone.exposed == alone.exchanged == 0


def test_linear_maps_that_keep_their_results_are_not_computed_again(config: Config) -> None:
    """What is left of a step is its attention over pairs."""
    counts = count(config.model, seq_len=config.train.seq_len)
    tokens, d_model = config.train.batch_size * config.train.seq_len, config.model.d_model
    alone, again = (took(config, Layout(1, 1, 1, recompute)) for recompute in ("nothing", "selective"))
    schedule, shares = config.model.schedule.resolved, expected_shares(config.model, config.train.seq_len)
    visits = schedule.prelude + schedule.coda + schedule.core * sum(shares)
    mixer: Any = config.model.mixer
    maps = attention_maps(d_model, attention_shape(config.model)) | feed_forward_maps(
        mixer.kind, d_model, mixer.hidden(d_model)
    )
    weights = sum(inputs * outputs for inputs, outputs in maps.values())
    head = 2 * d_model * config.model.vocab_size
    repeated = counts.forward_flops_per_token - head - visits * 2 * weights
    assert again.arithmetic - alone.arithmetic == pytest.approx(tokens * repeated / 1e12)
    assert 0 < repeated < 0.2 * counts.forward_flops_per_token


def test_units_are_gathered_as_often_as_fsdp_gathers_them(config: Config) -> None:
    """Every unit in the forward pass, all but the root in the backward pass, and every gradient once a step."""
    units, part = units_of(config.model), 3 / 4
    gathers = 4 * part * (2 * units.total - units.root)
    reductions = 4 * part * units.total
    assert took(config, Layout(4, 4, 1, "nothing")).exchanged == pytest.approx(gathers + reductions)
    assert took(config, Layout(4, 4, 4, "nothing")).exchanged == pytest.approx(4 * gathers + reductions)
    copies = 2 * 4 * units.total / 4 * (1 / 2)
    assert took(config, Layout(8, 4, 1, "nothing")).exchanged == pytest.approx(gathers + reductions + copies)


def test_blocks_as_units_are_gathered_for_every_use(config: Config) -> None:
    """In both passes, R times each; their gradients are still exchanged once."""
    units, part = units_of(config.model), 3 / 4
    whole, parts = (took(config, Layout(4, 4, 1, "nothing", by_block)).exchanged for by_block in (False, True))
    assert parts - whole == pytest.approx(4 * part * 2 * (units.recursions - 1) * units.core)


def test_inside_a_machine_links_count_and_between_them_the_network(config: Config) -> None:
    units = units_of(config.model)
    volume = 4 * (3 * units.total - units.root)
    assert took(config, Layout(4, 4, 1, "nothing")).exchange == pytest.approx(volume * 3 / 4 / 1e6)
    # Two machines of four: each takes in the other's half, by four ways.
    assert took(config, Layout(8, 8, 1, "nothing")).exchange == pytest.approx(volume / 2 / 4 / 1e5)
    # Divided inside machines, only a quarter of the gradients crosses the network, twice half of it.
    inside = volume * 3 / 4 / 1e6
    crossing = 4 * units.total / 4 * 2 / 2 / 1e5
    assert took(config, Layout(8, 4, 1, "nothing")).exchange == pytest.approx(inside + crossing)


def test_exchange_hides_behind_computing(config: Config) -> None:
    """Never more than without overlap, never less than the first unit's gathering and the last one's reduction."""
    layout = Layout(4, 4, 1, "nothing")
    apart = took(config, layout)
    overlapping = took(config, layout, replace(PLAIN, overlaps=True))
    slow = took(config, layout, replace(PLAIN, overlaps=True, flops_fp32=1e3))
    assert apart.exposed == apart.exchange == overlapping.exchange
    assert slow.exposed < overlapping.exposed < apart.exposed
    units = units_of(config.model)
    ends = 4 * 3 / 4 / 1e6 * (2 * units.root + 2 * units.block)
    assert slow.exposed == pytest.approx(ends)


def test_what_bounds_a_step(config: Config) -> None:
    layout = Layout(4, 4, 1, "nothing")
    assert took(config, layout).bound == "exchange"
    assert took(config, layout, replace(PLAIN, link=1e30)).bound == "arithmetic"
    assert took(config, layout, replace(PLAIN, link=1e30, bandwidth=1e6)).bound == "memory"
