"""`morex plan` on the command line."""

import json
from pathlib import Path

import pytest

from cli.shell import Shell
from morex.cli.scaling import numbers_of, tokens_of
from morex.loading import ConfigError

BATCH = ("--set", "train.batch_size=64", "--set", "train.accumulation=1")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("8", [8]), ("8..64", [8, 16, 32, 64]), ("6..50", [6, 12, 24, 48]), ("24, 8,8", [8, 24]), ("8..8", [8])],
)
def test_numbers_of_gpus(text: str, numbers: list[int]) -> None:
    assert numbers_of(text) == numbers


@pytest.mark.parametrize(("text", "tokens"), [("300B", 3e11), ("1.5T", 1.5e12), ("12", 12), ("3e9", 3e9), ("2 M", 2e6)])
def test_numbers_of_tokens(text: str, tokens: float) -> None:
    assert tokens_of(text) == tokens


@pytest.mark.parametrize("text", ["0", "0..8", "64..8", "eight", "8...64", "", "-8", "8,"])
def test_what_is_no_number_of_gpus(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpus"):
        numbers_of(text)


@pytest.mark.parametrize("text", ["0", "many", "3X", "-1", ""])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(ConfigError, match="--tokens"):
        tokens_of(text)


def test_a_plan_for_several_numbers_of_gpus(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    done = shell(
        "plan", "mor-llm-small", "--gpus", "8..128", *BATCH, "--tokens", "1B", "--price", "2", "--json", file
    )  # fmt: skip
    assert done.code == 0, done.err
    content = json.loads(file.read_text())
    assert [row["gpus"] for row in content["rows"]] == [8, 16, 32, 64]
    assert content["target_tokens"] == 1e9
    for row in content["rows"]:
        assert row["cost"] == pytest.approx(2 * row["gpu_hours"])
        assert row["shards"] * row["copies"] == row["gpus"]
        held = row["memory"]
        rest = held["parameters"] + held["optimizer"] + held["gathered"] + held["passing"]
        assert held["peak"] == pytest.approx(rest)
    [refused] = content["refused"]
    assert refused["gpus"] == 128 and "use train.batch_size=128" in refused["reason"]
    assert "128: train.batch_size 64 does not divide over 128 ranks" in done.out
    assert "Steps of 64 x 256 = 16,384 tokens in bf16 on h100." in done.out
    assert "of keys and values" in done.out


def test_the_list_of_devices(shell: Shell) -> None:
    done = shell("plan", "--devices")
    assert done.code == 0
    assert "h100" in done.out and "mi300x: AMD Instinct MI300X data sheet" in done.out


def test_this_machine_is_measured(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    small = ("--set", "model.d_model=32", "--set", "model.vocab_size=512")
    done = shell("plan", "vanilla", *small, "--gpus", "1", "--device", "cpu", "--json", file, *BATCH)
    assert done.code == 0, done.err
    [row] = json.loads(file.read_text())["rows"]
    assert row["device"] == "cpu" and row["step"]["exchange"] == 0
    assert row["step"]["arithmetic"] > 0 and row["step"]["traffic"] > 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["plan"], "a config is missing"),
        (["plan", "vanilla", "--gpus", "0"], "--gpus '0' must be 1 or more"),
        (["plan", "vanilla", "--device", "h1000"], "--device 'h1000' is unknown; use h100, "),
        (
            ["plan", "vanilla", "--gpus", "7"],
            "train.batch_size 16 does not divide over 7 ranks; use train.batch_",
        ),
        (
            ["plan", "mor-llm-large", "--gpus", "8", "--set", "train.core_units=core"],
            "no layout fits 8 x h100: at least",
        ),
        (["plan", "vanilla", "--price", "-1"], "--price -1.0 must be 0 or more"),
        (["plan", "vanilla", "--json", "/nowhere/plan.json"], "--json '/nowhere/plan.json' cannot be written"),
        (["plan", "vanilla", "--device", "cpu", "--gpus", "4096", "--set", "train.batch_size=4096"], "cores of this"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words: list[str], sentence: str, shell: Shell) -> None:
    done = shell(*words)
    assert done.code == 2
    assert sentence in done.err and "Traceback" not in done.err
