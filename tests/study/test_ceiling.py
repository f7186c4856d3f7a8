"""The best schedule on costs that are made up, and that passes are measured with what they should hold."""

import pytest
import torch

from morex.loading import load_config
from morex.model.count import count
from morex.model.lm import build_model
from morex.study.ceiling import PassCosts, Seconds, ceiling, fill, measure_passes, sizes_for

MIX = (1.0, 0.75, 0.5, 0.25)
SMALL = ["model.schedule={sharing: middle_cycle, layers: 5, recursions: 3}"]


def line(fixed: float, each: float) -> Seconds:
    return {n: fixed + each * n for n in (1, 2, 3, 4, 6, 8)}


def costs(prelude: Seconds, core: Seconds, leave: Seconds, prompt: float = 0.0, recursions: int = 4) -> PassCosts:
    return PassCosts(prelude, [core] * recursions, leave, prompt)


def test_arithmetic_alone_costs_the_same_by_any_schedule() -> None:
    """Without anything fixed in a pass, a token costs its own work: prelude, 2.5 visits of the core, and the rest."""
    found = ceiling(costs(line(0, 1), line(0, 2), line(0, 3)), 8, MIX, new_tokens=1_000_000)
    assert found == pytest.approx(1 / (1 + 2.5 * 2 + 3), rel=1e-5)


def test_weights_of_the_core_alone_are_read_best_depthwise() -> None:
    """Every pass of the core is full: 2.5 visits in 8 tokens each; waves would need 4 passes for 8 tokens."""
    own = costs(line(0, 0), line(1, 0), line(0, 0))
    assert ceiling(own, 8, MIX, 1_000_000) == pytest.approx(8 / 2.5, rel=1e-5)
    assert ceiling(own, 8, MIX, 1_000_000, waves=True) == pytest.approx(8 / 4, rel=1e-5)


def test_weights_of_the_head_alone_are_read_best_in_waves() -> None:
    own = costs(line(0, 0), line(0, 0), line(1, 0))
    assert ceiling(own, 8, MIX, 1_000_000) == pytest.approx(8, rel=1e-5)


def test_between_them_tokens_are_collected_for_some_passes() -> None:
    """Core passes cost 1 and the head 1: by hand for k = 1, 2, 3, 4 at d = 2.5, the third is best."""
    own = costs(line(0, 0), line(1, 0), line(1, 0))
    by_hand = []
    for k in (1, 2, 3, 4):
        m = 8 / (1 + (k - 1) / 5)
        by_hand.append(2.5 / m + 1 / (k * m / 2.5))
    assert by_hand == pytest.approx([0.625, 0.5625, 0.5833333, 0.625])
    assert ceiling(own, 8, MIX, 1_000_000) == pytest.approx(1 / 0.5625, rel=1e-5)


def test_a_model_without_recursions_is_batched_whole() -> None:
    own = costs(line(0.5, 0), line(4, 1), line(1, 0.25), recursions=1)
    assert ceiling(own, 8, (1.0,), 1_000_000) == pytest.approx(8 / (0.5 + 4 + 8 + 1 + 2), rel=1e-5)
    # Sizes that were not measured lie on the line between their neighbours.
    assert ceiling(own, 7, (1.0,), 1_000_000) == pytest.approx(7 / (0.5 + 4 + 7 + 1 + 1.75), rel=1e-5)


def test_a_prompt_costs_its_share() -> None:
    own = costs(line(0, 0), line(0, 1), line(0, 0), prompt=3.0, recursions=1)
    assert ceiling(own, 1, (1.0,), new_tokens=5) == pytest.approx(5 / (3 + 4 * 1))


def test_groups_share_the_tokens_under_way() -> None:
    """Two groups of half the core each: depth-wise their passes hold half the tokens, in waves all of them."""
    own = costs(line(0, 0), line(1, 0), line(0, 0))
    assert ceiling(own, 8, (1.0,) * 4, 1_000_000, groups=2) == pytest.approx(8 / 4, rel=1e-5)
    assert ceiling(own, 8, MIX, 1_000_000, groups=2) == pytest.approx(8 / 4, rel=1e-5)


def test_sizes_cover_what_a_schedule_asks_for() -> None:
    assert sizes_for(1) == [1]
    assert sizes_for(32) == [1, 4, 8, 16, 24, 32]


@pytest.mark.parametrize("kv", ["per_recursion", "shared_first", "refresh"])
def test_stores_are_filled_by_the_shares(kv: str) -> None:
    config = load_config("mor-expert", [*SMALL, f"model.kv={kv}"], tiny=True).model
    model = build_model(config)
    store, shares = model.new_store(2**20), (1.0, 0.75, 0.5)
    sequences = [store.open() for _ in range(3)]
    fill(store, model, sequences, 16, shares)
    store.check()
    assert [store.tokens(sequence) for sequence in sequences] == [16] * 3
    assert store.bytes() == 3 * 16 * count(config, shares=shares).kv_bytes_per_token


@pytest.mark.parametrize("name", ["mor-expert", "mor-token", "mor-act", "huginn"])
def test_every_pass_is_measured(name: str) -> None:
    models = [build_model(load_config(preset, tiny=True).model).eval() for preset in (name, "vanilla")]
    shares = [(1.0,) * model.config.schedule.recursions for model in models]
    state = torch.get_rng_state()
    routed, dense = measure_passes(models, [[1, 3], [1, 2, 4]], shares, prompt_tokens=5, context=8, repeats=1)
    assert torch.equal(state, torch.get_rng_state())
    assert len(routed.core) == models[0].config.schedule.recursions
    assert len(dense.core) == 1
    for found, sizes in ((routed, {1, 3}), (dense, {1, 2, 4})):
        for seconds in (found.prelude, *found.core, found.leave):
            assert seconds.keys() == sizes
            assert min(seconds.values()) > 0
        assert found.prompt > 0
