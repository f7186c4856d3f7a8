"""The benchmark's arithmetic and rows; speed itself is never asserted."""

import json
from pathlib import Path

import pytest
import torch

from morex.loading import ConfigError, load_config
from morex.model.count import count
from morex.study.bench import Match, _row, _shape, bench_train, paired_ratio, twin_name, write_json
from morex.study.contender import Contender, Shape, drawn_experts, random_batches
from morex.study.twins import bench_twin

CPU = torch.device("cpu")
SHAPE = Shape(2, 16, "fp32", CPU)
SMALL = ["model.d_model=16", "model.attention={heads: 2, kv_heads: 1}", "model.vocab_size=64"]
KEYS = {
    "preset",
    "twin",
    "precision",
    "threads",
    "tokens_per_s",
    "time_ratio",
    "flop_ratio",
    "explained",
    "peak_bytes",
}


def test_a_classifier_is_measured() -> None:
    small = ["model.d_model=16", "model.attention.heads=2"]
    [row] = bench_train(["sandbox-token"], 2, 16, steps=1, rounds=1, twins=False, overrides=small, memory=False)
    assert row["tokens_per_s"] > 0


def test_rows_of_every_kind(tmp_path: Path) -> None:
    rows = bench_train(["vanilla", "mor-expert", "moe"], 2, 16, steps=1, rounds=2, overrides=SMALL, memory=False)
    dense, routed, experts = rows
    for row in rows:
        assert row.keys() >= KEYS
        assert (row["batch_size"], row["seq_len"], row["precision"], row["threads"]) == (2, 16, "fp32", 1)
        assert row["tokens_per_s"] > 0
    assert (dense["twin"], dense["time_ratio"], dense["flop_ratio"], dense["explained"]) == ("vanilla", 1, 1, 1)
    assert (routed["twin"], experts["twin"]) == ("unrolled", "swiglu")
    assert routed["unrouted_time_ratio"] > 0
    assert experts["unrouted_time_ratio"] is None
    for row in (routed, experts):
        assert row["explained"] == pytest.approx(row["flop_ratio"] / row["time_ratio"])
    write_json(tmp_path / "rows.json", rows, ["morex", "bench", "train"])
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["rows"] == json.loads(json.dumps(rows))
    assert content["machine"]["command"] == "morex bench train"
    assert content["machine"]["cores"] >= 1


def test_steps_that_draw_their_depth_count_at_the_mean() -> None:
    """FLOPs are those of the drawn depths, and times are means as well: a median leaves the deep draws out."""
    [row] = bench_train(["huginn"], 1, 8, steps=1, rounds=6, overrides=SMALL, memory=False)
    assert row["explained"] == pytest.approx(row["flop_ratio"] / row["time_ratio"])
    contender = Contender(load_config("huginn", SMALL), SHAPE)
    contender.active = [(1.0,) * 2, (1.0,) * 6]
    alone = [count(contender.config.model, seq_len=16, shares=own).train_flops_per_token for own in contender.active]
    assert contender.flops_per_token() == pytest.approx(sum(alone) / 2)
    assert contender.shares() == (1.0, 1.0, 0.5, 0.5, 0.5, 0.5)
    assert contender.typical([1.0, 1.0, 4.0]) == 2.0


def test_flops_follow_the_shares_that_were_measured() -> None:
    """16 tokens give top-k of 16, floor(10.67) = 10 and 5 active tokens, and not 2/3 and 1/3 of them."""
    config = load_config("mor-expert", SMALL)
    routed = Contender(config, SHAPE)
    routed.timed(random_batches(64, SHAPE, 2))
    assert routed.shares() == pytest.approx((1.0, 10 / 16, 5 / 16))
    expected = count(config.model, seq_len=16, shares=(1.0, 10 / 16, 5 / 16)).train_flops_per_token
    assert routed.flops_per_token() == pytest.approx(expected)
    assert expected < count(config.model, seq_len=16).train_flops_per_token
    dense = Contender(load_config("vanilla", SMALL), SHAPE)
    dense.timed(random_batches(64, SHAPE, 1))
    assert dense.shares() is None


def test_ratios_are_paired_within_a_round() -> None:
    """The machine is ten times slower in the second round; the ratio does not notice."""
    assert paired_ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.5]) == 2.0
    config = load_config("moe", SMALL)
    twin = bench_twin(config.model)
    assert twin is not None
    contenders = {
        "preset": Contender(config, SHAPE),
        "twin": Contender(config.model_copy(update={"model": twin}), SHAPE),
    }
    row = _row(Match("moe", contenders, {"preset": [1.0, 8.0, 1.0], "twin": [0.5, 4.0, 0.5]}), SHAPE, 1, 4)
    assert row["time_ratio"] == 2.0
    assert row["tokens_per_s"] == 2 * 16 * 4
    assert row["twin_tokens_per_s"] == 2 * 16 * 4 / 0.5


def test_steps_train_the_model() -> None:
    contender = Contender(load_config("mor-threshold", SMALL), SHAPE)
    before = [parameter.clone() for parameter in contender.model.parameters()]
    contender.step(random_batches(64, SHAPE, 1)[0])
    assert any(not torch.equal(a, b) for a, b in zip(before, contender.model.parameters(), strict=True))
    thresholds = [buffer for name, buffer in contender.model.named_buffers() if name.endswith("threshold")]
    assert any((buffer[torch.isfinite(buffer)] != 0).any() for buffer in thresholds)


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    [row] = bench_train(["vanilla"], 2, 16, steps=1, rounds=1, twins=False, overrides=SMALL)
    assert row["peak_bytes"] > 4 * 4 * row["parameters"]  # weights, gradients and two moments, in fp32


def test_without_twins_there_are_no_ratios() -> None:
    [row] = bench_train(["recursive"], 2, 16, steps=1, rounds=1, twins=False, overrides=SMALL, memory=False)
    assert (row["twin"], row["time_ratio"], row["explained"]) == (None, None, None)


def test_several_precisions() -> None:
    rows = bench_train(
        ["vanilla"], 2, 16, steps=1, rounds=1, precision=("fp32", "bf16"), twins=False, overrides=SMALL, memory=False
    )
    assert [row["precision"] for row in rows] == ["fp32", "bf16"]
    assert rows[0]["fp32_speedup"] is None
    assert rows[1]["fp32_speedup"] == pytest.approx(rows[1]["tokens_per_s"] / rows[0]["tokens_per_s"])


def test_the_shape_is_the_presets_own_unless_it_is_large() -> None:
    def shape(name: str) -> tuple[int, int]:
        found = _shape(load_config(name), None, None, "fp32", CPU)
        return found.batch_size, found.seq_len

    assert shape("more") == (32, 128)
    assert shape("vanilla") == (16, 256)
    assert shape("paper-360m-vanilla") == (8, 2048)
    large = load_config("vanilla", ["train.batch_size=512"])
    assert _shape(large, None, 64, "fp32", CPU) == Shape(8, 64, "fp32", CPU)


def test_names_of_twins() -> None:
    both = load_config("mor-expert", ["model.mixer={kind: moe}"]).model
    twin = bench_twin(both)
    assert twin is not None
    assert twin_name(both, twin) == "unrolled swiglu"


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'mor'"):
        bench_train(["mor"])


@pytest.mark.parametrize(("loads", "top_k"), [([0.25] * 4, 2), ([0.4, 0.4, 0.1, 0.1], 2), ([0.7, 0.1, 0.2], 1)])
def test_experts_are_drawn_in_the_given_shares(loads: list[float], top_k: int) -> None:
    asked: list[torch.Tensor] = []

    def own_choice(probabilities: torch.Tensor) -> torch.Tensor:
        asked.append(probabilities)
        return torch.zeros(len(probabilities), top_k, dtype=torch.long)

    choose = drawn_experts(loads, top_k, own_choice)
    probabilities = torch.zeros(20_000, len(loads))
    chosen = choose(probabilities)
    assert len(asked) == 1 and asked[0] is probabilities
    others = [choose(probabilities) for _ in range(3)]
    assert torch.equal(others[-1], chosen) and not torch.equal(others[0], chosen)  # those of three warm-up steps
    assert chosen.shape == (20_000, top_k)
    assert all(len(set(row)) == top_k for row in chosen[:500].tolist())
    shares = torch.bincount(chosen.flatten(), minlength=len(loads)) / chosen.numel()
    assert shares.tolist() == pytest.approx(loads, abs=0.01)


def test_experts_work_under_the_loads_that_were_asked_for() -> None:
    config = load_config("more-tuned", SMALL)
    contender = Contender(config, Shape(8, 64, "fp32", CPU), (0.5, 0.3, 0.2, 0.0))
    stats = contender.step(random_batches(64, Shape(8, 64, "fp32", CPU), 1)[0])
    loads = [fields["load"] for fields in stats.values() if "load" in fields]
    assert len(loads) == 2
    for load in loads:
        assert (load / load.sum()).tolist() == pytest.approx([0.5, 0.3, 0.2, 0.0], abs=0.05)
    [row] = bench_train(["more-tuned"], 2, 16, steps=1, rounds=1, twins=False, overrides=SMALL, memory=False)
    assert row["expert_loads"] == [0.25] * 4
    [row] = bench_train(["vanilla"], 2, 16, steps=1, rounds=1, twins=False, overrides=SMALL, memory=False)
    assert row["expert_loads"] is None


@pytest.mark.parametrize(
    ("loads", "sentence"),
    [
        ([0.5, 0.5], "name 2 experts, but 'more' has 4"),
        ([0.6, 0.2, 0.1, 0.1], "each at most 1/2"),
        ([0.4, 0.4, 0.1, 0.2], "sum to 1"),
        ([0.5, 0.5, 0.1, -0.1], "0 or more"),
    ],
)
def test_loads_that_no_router_could_have_are_refused(loads: list[float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        bench_train(["more"], loads=loads)
