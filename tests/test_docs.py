"""The documentation says what the program does: pages are current, links lead somewhere, worked examples work."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import morex
from documents import ROOT, apply_diff, code_blocks
from morex.study.spec import studies

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


def test_configuration_page_is_current() -> None:
    page = runpy.run_path(str(DOCS / "generate_configuration.py"))
    assert page["render"]() == page["PAGE"].read_text(encoding="utf-8"), "run python docs/generate_configuration.py"


def test_configuration_page_names_every_key() -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    for key in ("rope_base", "balance_weight", "hierarchical", "momentum", "step_embedding", "mask_documents", "clip"):
        assert f"| `{key}` |" in text
    assert "| `steps` | integer ≥ 0 | `1000` | Optimizer steps. |" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    """Paths of this repository in backticks, but for those that a page is about to add."""
    text = page.read_text(encoding="utf-8")
    added = set(re.findall(r'^```python title="([^"]+)"', text, re.M))
    for name in re.findall(r"`((?:src|tests|docs|benchmarks|examples)/[\w./-]+)`", text):
        assert name in added or (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("name", ["one_idea", "schedules", "routers", "experts", "batching"])
def test_figures_are_drawn(name: str, tmp_path: Path) -> None:
    script = DOCS / "figures" / f"{name}.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, env=environment(ROOT / "src"), capture_output=True)
    (drawn,) = tmp_path.iterdir()
    # Each label stands beside its outlines as a comment; outlines may differ between versions of matplotlib.
    labels, shown = (
        re.findall("<!-- (.*?) -->", path.read_text(encoding="utf-8")) for path in (drawn, DOCS / "images" / drawn.name)
    )
    assert len(labels) > 20 and labels == shown, f"run python docs/figures/{name}.py"


def test_family_page_has_every_preset_with_its_parameters() -> None:
    text = (DOCS / "family.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| ([\d,]+) \|", text, re.M))
    counted = {name: f"{morex.count(morex.load_config(name).model).parameters:,}" for name in morex.presets()}
    assert rows == counted


def test_family_page_has_source_and_use_of_every_preset() -> None:
    text = (DOCS / "family.md").read_text(encoding="utf-8")
    sources = dict(re.findall(r"^\| `([\w-]+)` \| [\d,]+ \|.*\| *([^|]*?) *\|$", text, re.M))
    assert all(sources[name] for name in morex.presets())
    (table,) = re.findall(r"^\| presets \| when to use \|\n((?:\|.*\n)+)", text, re.M)
    groups = re.findall(r"`([\w*-]+)`", table)
    for name in morex.presets():
        assert any(fnmatch(name, group) for group in groups), f"nothing says when to use {name}"
    for group in groups:
        assert any(fnmatch(name, group) for name in morex.presets()), f"there is no preset {group}"


def test_speed_page_says_which_presets_miss_its_target() -> None:
    """From the files of results: which presets are below 0.90, and which have no row that could say so."""
    explained: dict[str, list[float]] = {}
    for path in (ROOT / "benchmarks" / "results").glob("train*.json"):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            even = len(set(row["expert_loads"] or [1.0])) == 1
            if row["threads"] == 1 and row["precision"] == "fp32" and row["explained"] is not None and even:
                explained.setdefault(row["preset"], []).append(row["explained"])
    text = (DOCS / "speed.md").read_text(encoding="utf-8")
    _, below, *others = text.partition("## The target")[2].partition("\n## ")[0].split("\n- ")
    named = set(re.findall(r"`([\w-]+)`", below))
    assert named == {preset for preset, found in explained.items() if min(found) < 0.90}
    unmeasured = re.findall(r"`([\w-]+)`", " ".join(others))
    assert sorted(unmeasured) == sorted(set(morex.presets()) - explained.keys())


def test_decoding_page_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = (block.text for block in code_blocks(DOCS / "decoding.md") if block.language == "python")
    exec(program, {})
    texts, *events, scores = capsys.readouterr().out.splitlines()
    assert [len(text) for text in json.loads(texts)] == [8, 8]
    assert [line.split()[::2] for line in events] == [["2", "2"]] * 4, "request 2 at depth 2"
    assert "stack.core.groups.0.router" in scores


def test_every_study_is_in_the_table() -> None:
    """By its name, or in the row of the study that it is a form of."""
    text = (DOCS / "getting-started.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", text.partition("These come with the library:")[2], re.M)
    named = {name + ending for name, text in rows for ending in ["", *re.findall(r"`(-[\w-]+)`", text)]}
    assert named == set(studies())


ADDED = {
    "adding-a-router.md": ("`periodic`", r"0\.\d\d of the FLOPs\n", 10),
    "adding-experts.md": ("`moe_shared`", r"1\.\d\d times the FLOPs\n", 10),
    "adding-a-task.md": ("`sorting`", r"Task: sorting\.", 4),
}
"""Page -> what it adds to the page of options, what its program says, and the fewest tests that it runs."""


@pytest.mark.parametrize("name", ADDED)
def test_what_is_added_works(name: str, tmp_path: Path) -> None:
    """Every change of the page, applied to a copy of the package; then its programs and its tests run."""
    unused = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("src", "tests/parity", "tests/data"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=unused)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "docs").mkdir()
    shutil.copy(DOCS / "generate_configuration.py", tmp_path / "docs")
    outputs = []
    for block in code_blocks(DOCS / name):
        if block.language == "diff":
            assert block.title
            apply_diff(tmp_path / block.title, block.text)
        elif block.language == "python":
            assert block.title
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
        for command in block.commands if block.language == "console" else []:
            assert command[0] == "python"
            done = subprocess.run(
                [sys.executable, *command[1:]],
                cwd=tmp_path,
                env=environment(tmp_path / "src"),
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            outputs.append(done.stdout)
    _, tried, tested = outputs
    kind, says, fewest = ADDED[name]
    page = (tmp_path / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page != (DOCS / "configuration.md").read_text(encoding="utf-8") and kind in page
    assert re.search(says, tried), tried
    passed = re.search(r"(\d+) passed", tested)
    assert passed and int(passed[1]) >= fewest


def environment(source: Path) -> dict[str, str]:
    """This process's environment with `source` as the only place that morex is found."""
    return {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
