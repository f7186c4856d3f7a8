"""`bench decode` and `bench kv` as commands: what they print, write and refuse."""

import json
from pathlib import Path
from typing import Any

import pytest

from cli.shell import Shell
from morex.cli.decoding import DECODE_COLUMNS, KV_COLUMNS

SMALL = ["--tiny", "--set", "model.schedule={sharing: middle_cycle, layers: 5, recursions: 3}"]
QUICK = [*SMALL, "--prompt-tokens", "3:6", "--new-tokens", "4", "--requests", "3", "--rounds", "1"]


def test_decode_prints_and_writes_what_it_measured(shell: Shell) -> None:
    result = shell.succeeds("bench", "decode", "mor-expert", *QUICK, "--concurrency", "2", "--json", "decode.json")
    content = json.loads(Path("decode.json").read_text())
    assert [row["mode"] for row in content["rows"]] == ["depthwise", "continuous"]
    assert content["machine"]["cores"] >= 1
    for heading in DECODE_COLUMNS.values():
        assert heading.split("\n")[0] in result.out
    assert "mor-expert" in result.out and "vanilla" in result.out
    assert "round 1 of 1" in result.err and "round" not in result.out


def test_kv_prints_and_writes_what_it_measured(shell: Shell) -> None:
    result = shell.succeeds("bench", "kv", "recursive", *SMALL, "--tokens", "20", "--depth", "2", "--json", "kv.json")
    rows = json.loads(Path("kv.json").read_text())["rows"]
    assert [row["kv"] for row in rows] == ["per_recursion", "shared_first", "refresh"]
    for row in rows:
        assert row["kv_bytes_per_token"] == row["closed_form"]
    for heading in KV_COLUMNS.values():
        assert heading.split("\n")[0] in result.out


def test_ctrl_c_leaves_the_rows_that_are_there(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from morex.study import bench_kv as module

    measured = module.kv_row

    def interrupted(name: str, model: Any, *rest: Any) -> Any:
        if model.config.kv == "shared_first":
            raise KeyboardInterrupt
        return measured(name, model, *rest)

    monkeypatch.setattr(module, "kv_row", interrupted)
    result = shell("bench", "kv", "recursive", *SMALL, "--tokens", "8", "--json", "kv.json")
    assert result.code == 130
    assert [row["kv"] for row in json.loads(Path("kv.json").read_text())["rows"]] == ["per_recursion"]
    assert "per_recursion" in result.out and "shared_first" not in result.out
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["decode"], "Missing argument.*PRESET"),
        (["decode", "vanila"], "unknown preset 'vanila'; did you mean 'vanilla'"),
        (["decode", "mor-expert", "--concurrency", "0"], "--concurrency 0 must be 1 or more"),
        (["decode", "mor-expert", "--rounds", "0"], "--rounds 0 must be 1 or more"),
        (["decode", "mor-expert", "--mode", "parallel"], "--mode 'parallel' is unknown; use depthwise, lockstep"),
        (["decode", "mor-expert", "--precision", "fp8"], "--precision 'fp8' is unknown; use fp32, bf16"),
        (["decode", "mor-expert", "--arrivals", "bursts"], "--arrivals 'bursts' is unknown; use closed, poisson"),
        (["decode", "mor-expert", "--arrivals", "poisson"], "--arrivals poisson needs --rate"),
        (["decode", "mor-expert", "--rate", "2"], "--rate 2 goes with --arrivals poisson"),
        (["decode", "mor-expert", "--arrivals", "poisson", "--rate", "0"], "--rate 0 must be a finite number"),
        (["decode", "mor-expert", "--prompt-tokens", "9:3"], "--prompt-tokens '9:3' must be a number or a range"),
        (["decode", "mor-expert", "--depth-mix", "deep"], "--depth-mix 'deep' must be numbers with commas"),
        (["decode", "mor-expert", "--depth-mix", "1,1"], "names 2 depths, and 'mor-expert' has 3 recursions"),
        (["decode", "mor-expert", "--depth-mix", "1,1,1", "--own-router"], "--own-router and --depth-mix 1,1,1 both"),
        (["decode", "mor-expert", "--concurrency", "2", "--cache-requests", "2"], "--concurrency and --cache-requests"),
        (["decode", "mor-expert", "--cache-requests", "2", "--cache-bytes", "9"], "leave --cache-bytes out"),
        (["decode", "mor-expert", "--mode", "continuous"], "--mode continuous is for models without recursions"),
        (["decode", "mor-expert", "--seed", "-1"], "--seed -1 must be 0 or more"),
        (["decode", "mor-expert", "--json", "nowhere/a.json"], "--json 'nowhere/a.json' .*no folder 'nowhere'"),
        (["decode", "mor-expert", "--tiny", "--set", "model.vocab_size=20"], "vocab_size 20 has no room for 26"),
        (["decode", "sandbox-token", "--tiny"], "'classifier' does not decode"),
        (["kv"], "Missing argument.*PRESET"),
        (["kv", "recursive", "--kv", "first"], "model.kv"),
        (["kv", "recursive", "--tokens", "0"], "--tokens 0 must be 1 or more"),
        (["kv", "recursive", "--precision", "auto"], "--precision 'auto' is unknown; use fp32, bf16, fp64"),
        (["kv", "recursive", "--tiny", "--depth", "9:9"], "depth '9:9' is not understood"),
        (["kv", "recursive", "--tiny", "--cache-bytes", "100"], "cache_bytes 100 holds no page"),
    ],
)
def test_mistakes_get_one_sentence(shell: Shell, words: list[str], sentence: str) -> None:
    import re

    result = shell("bench", *words)
    assert result.code == 2, result
    assert result.out == ""
    last = result.err.strip().splitlines()[-1]
    assert re.search(sentence, last), last
    assert last.startswith("error: ")
