"""Rows of the decoding benchmarks, and what they are made of; speed itself is never asserted."""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from morex.depth.random_choice import uniform_hash
from morex.infer.clock import PARTS
from morex.infer.room import page_bytes
from morex.loading import ConfigError
from morex.model.count import count
from morex.study import bench_decode as module
from morex.study.bench import Row, write_json
from morex.study.bench_decode import DecodePlan, bench_decode
from morex.study.bench_kv import RULES, bench_kv, expected_pages
from morex.study.depth_mix import nearest_seed, shares_of, weights_of_positions, with_depths
from morex.study.overhead import covered

SMALL = ["model.schedule={sharing: middle_cycle, layers: 5, recursions: 3}"]
QUICK: dict[str, Any] = {"tiny": True, "overrides": SMALL, "prompt_tokens": (3, 9), "new_tokens": 6, "rounds": 1}
KEYS = {
    "preset",
    "mode",
    "concurrency",
    "cache_bytes",
    "tokens_per_s",
    "ratio_to_vanilla",
    "ceiling",
    "share_of_ceiling",
    "mean_depth",
    "ttft_s",
    "tpot_s",
    "overhead_share",
    "kv_bytes_per_token",
    "seconds",
    "precision",
    "threads",
}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """A preset beside its twin."""
    return list(bench_decode(DecodePlan("mor-expert", concurrencies=(3,), requests=6, **QUICK | {"rounds": 2})))


def test_rows_of_a_preset_and_its_twin(rows: list[Row], tmp_path: Path) -> None:
    routed, dense = rows
    assert [row["concurrency"] for row in rows] == [3, 3]
    assert [(row["preset"], row["mode"], row["twin_of"]) for row in rows] == [
        ("mor-expert", "depthwise", None),
        ("vanilla", "continuous", "mor-expert"),
    ]
    for row in rows:
        assert row.keys() >= KEYS
        assert (row["precision"], row["threads"], row["rounds"], row["new_tokens"]) == ("fp32", 1, 2, 6)
        assert row["tokens"] == 2 * 6 * 6
        assert row["requests"] == 2 * 6
        assert 0 < row["overhead_share"] < 1
        assert 0 < row["ttft_s"]["p50"] <= row["ttft_s"]["p95"]
        assert 0 < row["tpot_s"]["p50"] <= row["tpot_s"]["p95"]
        assert row["share_of_ceiling"] == pytest.approx(row["ratio_to_vanilla"] / row["ceiling"])
        assert row["share_of_own_best"] == pytest.approx(row["tokens_per_s"] / row["ceiling_tokens_per_s"])
        assert 1 <= row["mean_running"] <= row["concurrency"]
    assert (dense["ratio_to_vanilla"], dense["ceiling"], dense["flop_ratio"]) == (1, 1, 1)
    assert routed["ceiling"] == pytest.approx(routed["ceiling_tokens_per_s"] / dense["ceiling_tokens_per_s"])
    assert routed["flop_ratio"] > 1
    write_json(tmp_path / "rows.json", rows, ["morex", "bench", "decode"])
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 2


def test_both_serve_the_same_requests(rows: list[Row]) -> None:
    routed, dense = rows
    assert routed["tokens_entering"] == dense["tokens_entering"]
    # Every new token but the last of a request is read again.
    assert dense["tokens_entering"] >= 2 * 6 * (3 + 6 - 1)
    # A step ends when somebody leaves, and those who are done first wait for all three recursions.
    assert routed["steps"] == dense["steps"]


def test_depths_come_out_in_the_mix(rows: list[Row]) -> None:
    routed, dense = rows
    assert routed["shares"] == pytest.approx((1, 2 / 3, 1 / 3), abs=0.15)
    assert routed["mean_depth"] == pytest.approx(2.0, abs=0.2)
    assert dense["mean_depth"] == 1.0
    assert routed["depth"]["kind"] == "random"
    assert routed["kv_bytes_per_token"] == pytest.approx(routed["kv_closed_form"], rel=0.15)
    assert dense["kv_bytes_per_token"] == dense["kv_closed_form"]


def test_seconds_by_part_are_all_seconds(rows: list[Row]) -> None:
    for row in rows:
        assert row["seconds"].keys() == {"tokenizing", "waiting", "scheduling", *PARTS}
        total = sum(row["seconds"].values())
        assert min(row["seconds"].values()) >= 0
        assert row["seconds"]["core"] > 0
        assert row["tokens"] / total == pytest.approx(row["tokens_per_s"], rel=0.9)


def test_the_ways_to_batch_one_model() -> None:
    """Lockstep waits and computes nobody who has left; uniform computes and keeps everybody, and draws as many."""
    modes = ("depthwise", "lockstep", "uniform")
    plan = DecodePlan("mor-expert", modes=modes, concurrencies=(3,), requests=6, **QUICK)
    early, waits, deepest, dense = bench_decode(plan)
    assert [row["mode"] for row in (early, waits, deepest, dense)] == [*modes, "continuous"]
    assert {row["tokens"] for row in (early, waits, deepest)} == {6 * 6}
    assert early["steps"] >= waits["steps"] == deepest["steps"] == dense["steps"]
    assert early["shares"] == waits["shares"] == pytest.approx((1, 2 / 3, 1 / 3), abs=0.15)
    assert deepest["shares"] == (1, 1, 1)
    assert (
        deepest["kv_bytes_per_token"] == deepest["kv_closed_form"] > waits["kv_closed_form"] == early["kv_closed_form"]
    )
    assert deepest["flop_ratio"] < waits["flop_ratio"] == early["flop_ratio"]
    for row in (early, waits, deepest):
        others = [row[f"ratio_to_{mode}"] for mode in ("lockstep", "uniform")]
        assert [ratio is None for ratio in others] == [row["mode"] == mode for mode in ("lockstep", "uniform")]
        assert row["ratio_to_vanilla"] > 0
    assert early["ratio_to_uniform"] == pytest.approx(early["tokens_per_s"] / deepest["tokens_per_s"])
    assert dense["ratio_to_lockstep"] is dense["ratio_to_uniform"] is None


def test_a_budget_holds_fewer_requests_where_all_go_all_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_rounds", lambda *rest: None)
    monkeypatch.setattr(module, "_ceilings", lambda *rest: {})
    monkeypatch.setattr(module, "_row", lambda plan, own, *rest: {"own": own})
    plan = DecodePlan("mor-expert", modes=("lockstep", "uniform"), cache_requests=(6,), **QUICK)
    waits, deepest, dense = [row["own"] for row in bench_decode(plan)]
    # Prelude, coda and three recursions of the core are as many lists as the five blocks of the twin.
    assert deepest.bytes_of(14) == dense.bytes_of(14)
    assert deepest.concurrency == dense.concurrency == 6 < waits.concurrency


def test_poisson_arrivals_have_no_ceiling() -> None:
    plan = DecodePlan("recursive", rate=1000.0, requests=5, against=None, **QUICK)
    [row] = bench_decode(plan)
    assert (row["rate"], row["tokens"], row["ceiling"], row["ratio_to_vanilla"]) == (1000.0, 5 * 6, None, None)
    assert (row["mean_depth"], row["depth"]["kind"]) == (3.0, "fixed")


def test_a_dense_preset_is_its_own_twin() -> None:
    [row] = bench_decode(DecodePlan("vanilla", requests=2, concurrencies=(2,), **QUICK | {"overrides": []}))
    assert (row["mode"], row["ratio_to_vanilla"], row["ceiling"]) == ("continuous", 1, 1)


def test_a_budget_holds_more_requests_of_a_model_that_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs as many as the memory of three dense requests holds of its own, and nobody computes anything here."""
    monkeypatch.setattr(module, "_rounds", lambda *rest: None)
    monkeypatch.setattr(module, "_ceilings", lambda *rest: {})
    monkeypatch.setattr(module, "_row", lambda plan, own, *rest: {"own": own})
    shared = [*SMALL, "model.kv=shared_first"]
    plan = DecodePlan("mor-expert", cache_requests=(1, 3), **QUICK | {"overrides": shared})
    few, _, routed, dense = [row["own"] for row in bench_decode(plan)]
    assert few is routed, "the model of one budget goes on to the next"
    pages = [expected_pages(own.config, shares, 14, 16) for own, shares in ((routed, (1.0,) * 3), (dense, (1.0,)))]
    # Prelude, core and coda once for a token, five blocks in the twin, and half a page of each list.
    assert pages == [-(-(3 * 14 + 3 * 8) // 16), -(-(5 * 14 + 5 * 8) // 16)]
    assert dense.concurrency == 3
    assert routed.cache_bytes == dense.cache_bytes == 3 * pages[1] * page_bytes(dense.model, 16)
    assert routed.concurrency == 3 * pages[1] // pages[0] == 4


@pytest.mark.parametrize("mix", [(1, 1, 1, 1), (5, 0, 3), (0, 0, 2), (1,)])
def test_shares_of_a_mix(mix: tuple[float, ...]) -> None:
    shares = shares_of(mix)
    assert shares[0] == 1
    assert sum(shares) == pytest.approx(sum(r * weight for r, weight in enumerate(mix, start=1)) / sum(mix))
    depths = [now - later for now, later in zip(shares, (*shares[1:], 0.0), strict=True)]
    assert depths == pytest.approx([weight / sum(mix) for weight in mix])


def test_the_nearest_seed_has_the_mix_at_the_positions_of_the_benchmark() -> None:
    shares = shares_of((1, 1, 1, 1))
    read, drawn = weights_of_positions((64, 256), 128)
    assert read[0] == 193 and read[63] == 193 and read[64 + 126] == 193 and read[256 + 126] == 1
    assert drawn[63] == 0 and drawn[64] == 1 and drawn.sum() == 193 * 127
    seed = nearest_seed(shares, read, drawn)
    positions = torch.arange(len(read))
    kept = [uniform_hash(seed, positions, r) < keep for r, keep in enumerate((1, 3 / 4, 2 / 3, 1 / 2), start=1)]
    for weights in (read, drawn):
        found = [float(weights[active].sum() / weights.sum()) for active in accumulate(kept, torch.logical_and)]
        assert found == pytest.approx(shares, abs=0.02)


def test_a_mix_becomes_an_override_that_repeats_it() -> None:
    config, overrides = with_depths("recursive", SMALL, True, (1, 1, 2), (4, 8), 8)
    assert config.model.depth.kind == "random"
    assert config.model.depth.capacities == (1.0, 0.75, 0.5)
    assert len(overrides) == 2 and overrides[0] == SMALL[0]
    plain, none = with_depths("recursive", SMALL, True, None, (4, 8), 8)
    assert (plain.model.depth.kind, none) == ("fixed", SMALL)


@pytest.mark.parametrize(
    ("name", "mix", "sentence"),
    [
        ("recursive", (1.0, 1.0), r"--depth-mix 1,1 names 2 depths, and 'recursive' has 3 recursions; give 3 weights"),
        ("recursive", (1.0, 1.0, 0.0), "--depth-mix 1,1,0 must be finite weights .* the last above 0"),
        ("recursive", (float("nan"), 1.0, 1.0), "must be finite weights"),
        ("vanilla", (1.0,), "--depth-mix 1 is for models with recursions, and 'vanilla' has none"),
    ],
)
def test_mixes_that_do_not_fit_are_refused(name: str, mix: tuple[float, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        with_depths(name, [], True, mix, (4, 8), 8)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (
            DecodePlan("mor-expert", modes=("continuous",), **QUICK),
            "--mode continuous is for models without recursions",
        ),
        (DecodePlan("mor-expert", cache_requests=(2,), against=None, **QUICK), "--cache-requests counts requests of"),
        (DecodePlan("mor-expert", against="vanila", **QUICK), "unknown preset 'vanila'"),
        (DecodePlan("mor-expert", cache_bytes=5000, **QUICK), "a request of up to .* give a larger cache_bytes"),
        (DecodePlan("sandbox-token", tiny=True), "'classifier' does not decode"),
    ],
)
def test_what_cannot_be_measured_is_refused(plan: DecodePlan, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        list(bench_decode(plan))


def test_spans_are_covered_once() -> None:
    assert covered([]) == 0
    assert covered([(0, 4), (1, 2), (3, 6), (10, 11), (10, 11)]) == 7


# Keys and values.


def test_keys_and_values_take_the_closed_form() -> None:
    """At a uniform depth and of the depths that came out, to the byte."""
    for options in ({"depth": "2"}, {"depth_mix": (1, 1, 1)}):
        found = list(bench_kv(["recursive"], tokens=33, sequences=2, tiny=True, overrides=SMALL, **options))
        assert [row["kv"] for row in found] == list(RULES)
        for row in found:
            exact = row["closed_form"] if "depth" in options else row["closed_form_as_measured"]
            assert row["kv_bytes_per_token"] == pytest.approx(exact, rel=1e-9)
            assert row["closed_form"] == pytest.approx(exact, rel=0.1)
            assert row["mean_depth"] == pytest.approx(2.0, abs=0 if "depth" in options else 0.1)


def test_the_core_keeps_what_its_capacities_say() -> None:
    """(R + 1) / 2R of full by recursion, 1/R where recursions share the keys of the first."""
    each, shared, latest = bench_kv(["mor-expert"], tokens=300, sequences=1, tiny=True)
    assert each["core_of_full"] == pytest.approx((3 + 1) / (2 * 3), abs=0.01)
    assert shared["core_of_full"] == pytest.approx(1 / 3)
    assert latest["core_of_full"] == each["core_of_full"]
    assert shared["requests_that_fit"] > each["requests_that_fit"] > each["requests_at_full_depth"]


def test_pages_held_and_requests_that_fit() -> None:
    """17 tokens of two blocks take two pages of 16 each, 30 of whose 64 entries are empty."""
    layers = ["model.schedule={sharing: none, layers: 2}"]
    [row] = bench_kv(["vanilla"], tokens=17, sequences=3, cache_bytes=2**16, tiny=True, overrides=layers)
    assert (row["pages"], row["page_fill"]) == (3 * 2 * 2, 17 / 32)
    page = 16 * row["full"] / 2
    assert row["requests_that_fit"] == 2**16 // page // 4
    assert (row["of_full"], row["core_of_full"], row["mean_depth"]) == (1, 1, 1)


def test_bytes_follow_the_number_format() -> None:
    [wide], [half] = (
        list(bench_kv(["vanilla"], tokens=8, sequences=1, tiny=True, precision=name)) for name in ("fp32", "bf16")
    )
    assert wide["kv_bytes_per_token"] == 2 * half["kv_bytes_per_token"]


def test_kv_refuses_two_depths_and_classifiers() -> None:
    with pytest.raises(ConfigError, match="--depth 2 and --depth-mix both say"):
        list(bench_kv(["recursive"], depth="2", depth_mix=(1, 1, 1)))
    with pytest.raises(ValueError, match="'classifier' does not decode"):
        list(bench_kv(["sandbox-token"], tiny=True))
    with pytest.raises(ConfigError, match=r"model\.kv"):
        list(bench_kv(["recursive"], ["first"], tiny=True))


def test_closed_forms_of_a_mix_are_those_of_the_count() -> None:
    [row] = bench_kv(["mor-expert"], ["per_recursion"], tokens=20, sequences=1, tiny=True, depth_mix=(1, 0, 1))
    config, _ = with_depths("mor-expert", ["model.kv=per_recursion"], True, (1, 0, 1), (20, 20), 1)
    assert row["closed_form"] == count(config.model).kv_bytes_per_token
