"""Every command and every example of the README and of the first pages runs, at tiny sizes."""

import json
import re
from pathlib import Path

import pytest

from data.tasks.helpers import write_sets
from documents import ROOT, code_blocks, run_page

STUDIES = sorted((ROOT / "docs" / "studies").iterdir())
COMMANDS = {"presets", "data", "train", "eval", "analyze", "generate", "chat", "compare", "bench", "runs", "plan"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_cells: None) -> Path:
    """An empty folder, the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_readme_works(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = run_page(ROOT / "README.md", folder)
    printed = capsys.readouterr().out
    assert {command.split()[1] for command in commands if command.startswith("morex")} == COMMANDS
    assert {"make demo", "make test"} <= set(commands)
    assert "'lm'" in printed and "'router_bce'" in printed
    assert (folder / "studies" / "demo" / "report.html").is_file()
    assert_benchmark(folder / "speed.json")


@pytest.mark.slow
def test_getting_started_works(folder: Path) -> None:
    commands = run_page(ROOT / "docs" / "getting-started.md", folder)
    assert {"train", "eval", "generate", "chat", "compare"} <= {command.split()[1] for command in commands}
    assert (folder / "studies" / "mine" / "report.html").is_file()


@pytest.mark.slow
def test_configuration_page_works(folder: Path) -> None:
    assert len(run_page(ROOT / "docs" / "configuration.md", folder)) == 2
    assert (folder / "runs" / "mine" / "summary.json").is_file()


@pytest.mark.slow
def test_data_page_works(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets", reason="the package datasets of the extra `data` is not installed")
    assert run_page(ROOT / "docs" / "data.md", folder)
    shards = re.findall(r"^Token shards: (.*)$", capsys.readouterr().out, re.M)
    assert shards[1] == shards[2] == shards[4]
    assert {"texts", "masked", "random", "on-shards", "mixed"} == {path.name for path in (folder / "runs").iterdir()}


@pytest.mark.slow
def test_analysis_page_works(folder: Path) -> None:
    commands = run_page(ROOT / "docs" / "analysis.md", folder)
    assert {"train", "analyze"} == {command.split()[1] for command in commands}
    assert (folder / "runs" / "routed" / "analysis" / "depth.png").is_file()
    assert (folder / "routed.npz").is_file()


@pytest.mark.slow
def test_speed_page_works(folder: Path) -> None:
    assert run_page(ROOT / "docs" / "speed.md", folder)
    assert_benchmark(folder / "speed.json")


@pytest.mark.slow
def test_tasks_page_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sets(folder / "sets")
    monkeypatch.setenv("MOREX_DATA", str(folder / "sets"))
    assert run_page(ROOT / "docs" / "tasks.md", folder)
    for name in ("sums", "parity", "counting", "babi"):
        assert "val_accuracy" in json.loads((folder / "runs" / name / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("page", STUDIES, ids=lambda page: page.stem)
def test_pages_of_studies_work(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sets(folder / "sets", ["en-10k"])
    monkeypatch.setenv("MOREX_DATA", str(folder / "sets"))
    assert run_page(page, folder)
    assert (folder / "studies" / page.stem / "report.html").is_file()


def test_contributing_works(folder: Path) -> None:
    assert run_page(ROOT / "CONTRIBUTING.md", folder) == ["make check", "make test"]


def test_every_page_with_commands_is_run_by_a_test() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    runnable = {page.name for page in pages if any(block.commands for block in code_blocks(page))}
    studies = {page.name for page in STUDIES}
    # In test_docs.py; coming-from.md has its commands in tables.
    elsewhere = {"adding-a-router.md", "adding-experts.md", "adding-a-task.md"}
    guides = {"analysis.md", "configuration.md", "data.md", "getting-started.md", "speed.md", "tasks.md"}
    assert runnable == {"README.md", "CONTRIBUTING.md"} | guides | studies | elsewhere


def assert_benchmark(path: Path) -> None:
    """The file has the rows of both presets."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert {row["preset"] for row in rows} >= {"more", "mor-expert"}


def test_readme_shows_a_real_run() -> None:
    """The table comes from a study, and the picture is there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("<!-- demo-table -->")[2].partition("<!-- /demo-table -->")[0]
    assert table.count("\n|") >= 2 + 7, "run make demo and then python docs/update_pages.py"
    assert (ROOT / "docs" / "images" / "demo.png").stat().st_size > 10_000
