"""`morex analyze`, end to end at tiny sizes."""

import json
import re
import sys
from pathlib import Path

import pytest

from cli.shell import Shell, contents


def test_analyze_a_run(trained: Path, shell: Shell) -> None:
    result = shell.succeeds("analyze", trained, "--tokens", "128", "--out", "found", "--trace", "t.npz")
    assert f"{trained}, step 3: 128 tokens in 4 windows, depth by router" in result.out
    assert re.search(r"^(ok|warn) +depths in use [123] in all groups \(healthy from 2", result.out, re.M)
    assert re.search(r"^info mean depth \d\.?\d* in all groups$", result.out, re.M)
    # What does not apply stands together, with its reason.
    assert re.search(r"^none expert load CV, .*: this model has no experts$", result.out, re.M)
    assert "Written: found" in result.err
    assert {"analysis.json", "depth.png", "state-change.png", "drift.png"} <= set(contents(Path("found")))
    assert Path("t.npz").is_file()


def test_analyze_as_json_is_the_file(trained: Path, shell: Shell) -> None:
    printed = shell.succeeds("analyze", trained, "--tokens", "64", "--depth", "2", "--out", "found", "--json").json
    assert printed == json.loads(Path("found/analysis.json").read_text())
    assert printed["policy"] == "2" and printed["groups"][0]["active_share"] == [1.0, 1.0]


def test_analyze_a_trace_file(trained: Path, shell: Shell) -> None:
    shell.succeeds("analyze", trained, "--tokens", "64", "--out", "found", "--trace", "t.npz")
    result = shell.succeeds("analyze", "t.npz")
    assert "t.npz: 64 tokens in 2 windows" in result.out
    assert "a trace file has no weights; analyse the run" in result.out
    assert {"analysis.json", "depth.png"} <= set(contents(Path("t-analysis")))


def test_without_matplotlib_there_are_no_figures(trained: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = shell.succeeds("analyze", trained, "--tokens", "32", "--out", "found")
    assert list(contents(Path("found"))) == ["analysis.json"]
    assert "pip install 'morex[viz]'" in result.err


def test_mistakes(trained: Path, shell: Shell) -> None:
    assert "neither a run folder nor a checkpoint folder" in shell.refuses("analyze", "nowhere")
    assert "tokens 0 must be 1 or more" in shell.refuses("analyze", trained, "--tokens", "0", "--out", "x")
    assert "depth 'deep' is not understood" in shell.refuses("analyze", trained, "--depth", "deep", "--out", "x")
    assert "there is no folder 'no'" in shell.refuses("analyze", trained, "--trace", "no/t.npz", "--out", "x")
    assert not Path("x").exists()
    Path("t.npz").write_text("nothing")
    assert "no trace file" in shell.refuses("analyze", "t.npz")
    assert "--difficulty is for runs on a task" in shell.refuses("eval", trained, "--difficulty", "1:2")
    assert "--out 't.npz/x' cannot be a folder" in shell.refuses("analyze", trained, "--out", "t.npz/x")
    assert "--tokens is for a run" in shell.refuses("analyze", "t.npz", "--tokens", "5")
