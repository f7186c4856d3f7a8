"""docs/update_pages.py puts the numbers of a study and of benchmarks into the pages, and nothing else."""

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from documents import ROOT
from morex.loading import ConfigError
from morex.study.records import Results

SCRIPT = runpy.run_path(str(ROOT / "docs" / "update_pages.py"))
BENCH = {
    "machine": {"cpu": "A CPU", "versions": {"torch": "2.13.0"}, "command": "morex bench train more"},
    "rows": [
        {"preset": "more", "twin": "swiglu", "precision": "fp32", "threads": 1, "tokens_per_s": 12345.6}
        | {"batch_size": 32, "seq_len": 128}
        | {"time_ratio": 3.5, "flop_ratio": 3.85, "explained": 1.1, "peak_bytes": 500_000_000},
        {"preset": "more", "mode": "lockstep", "tokens_per_s": 10.0},
    ],
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the pages, with a study of three variants and one benchmark."""
    for folder in ("docs/images", "benchmarks/results", "studies/demo/figures"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copy(ROOT / "docs" / "speed.md", tmp_path / "docs")
    study = tmp_path / "studies" / "demo"
    (study / "results.json").write_text(json.dumps(results().model_dump(mode="json")))
    (study / "figures" / "loss.png").write_bytes(b"a picture")
    (tmp_path / "benchmarks" / "results" / "train.json").write_text(json.dumps(BENCH))
    return tmp_path


def results() -> Results:
    def row(name: str, kind: str, loss: float, oracle: float | None = None) -> dict[str, Any]:
        numbers = {"parameters": 2e6, "unique_non_embedding": 1.5e6, "train_flops_per_token": 9e6, "seconds": 61.0}
        return {"name": name, "kind": kind, "seeds": 1, "val_loss": loss, "val_loss_oracle": oracle, **numbers}

    study = {"name": "demo", "variants": [{"name": "vanilla"}, {"name": "mor-expert"}, {"name": "recursive"}]}
    rows = [
        row("vanilla", "dense", 3.25),
        row("mor-expert", "routed", 3.125, 3.0625),
        row("recursive", "recursive", 3.5),
    ]
    environment = {"cpu": "A CPU", "threads": 2, "versions": {"torch": "2.13.0"}}
    tree = {"study": study, "reference": "vanilla", "rows": rows, "cells": [], "environment": environment}
    return Results.model_validate({**tree, "command": "morex compare demo --out x", "findings": ["One wins.", "Two."]})


def test_readme_gets_table_findings_machine_and_picture(project: Path) -> None:
    before = (project / "README.md").read_text()
    SCRIPT["main"]([], root=project)
    after = (project / "README.md").read_text()
    table = after.partition("<!-- demo-table -->")[2].partition("<!-- /demo-table -->")[0]
    headings, ruler, *rows = [line for line in table.splitlines() if line.startswith("|")]
    assert headings.startswith("| model | held-out loss | oracle loss | parameters, M | non-embedding parameters, M |")
    assert headings.count("|") == ruler.count("|") == rows[0].count("|")
    assert [row.split("|")[1].strip(" `") for row in rows] == ["vanilla", "mor-expert", "recursive"]
    assert "| 3.250 | – | 2.00 | 1.50 | 9.00 |" in rows[0] and "| **3.125** | 3.062 |" in rows[1]
    assert "`morex compare demo --out x` on A CPU, 2 threads, torch 2.13.0; 1 seed" in table
    assert "- One wins.\n- Two." in table
    assert after.replace(table, "\n") == before.replace(
        before.partition("<!-- demo-table -->")[2].partition("<!-- /demo-table -->")[0], "\n"
    )
    assert (project / "docs" / "images" / "demo.png").read_bytes() == b"a picture"


def test_other_studies_have_pages_of_their_own(project: Path) -> None:
    demo = project / "studies" / "demo" / "results.json"
    content = json.loads(demo.read_text())
    content["study"]["name"] = "rates"
    rate = {"first_half": 3.0, "second_half": 3.125, "full": 3.0625, "full_spread": 0.25}
    unfinished = {"first_half": None, "second_half": None, "full": None, "full_spread": None}
    content["rows"][0] |= {"lr": 0.001, "learning_rates": [{"lr": 0.001, **rate}, {"lr": 0.003, **unfinished}]}
    demo.write_text(json.dumps(content))
    page = project / "docs" / "studies" / "rates.md"
    page.parent.mkdir()
    page.write_text("# Rates\n\n<!-- rates-table -->\n<!-- /rates-table -->\nThe end.\n")
    readme = (project / "README.md").read_text()
    SCRIPT["main"]([], root=project)
    text = page.read_text()
    assert "| `vanilla` | 0.001 | **3.0000** | **3.1250** | 3.0625 ± 0.2500 |" in text
    assert "| `vanilla` | 0.003 | – | – | – |" in text
    assert "- One wins." in text and text.endswith("<!-- /rates-table -->\nThe end.\n")
    assert (project / "docs" / "images" / "rates.png").read_bytes() == b"a picture"
    assert (project / "README.md").read_text() == readme


def test_a_study_of_depth_gets_its_accuracies(project: Path) -> None:
    """Means over seeds, by difficulty: as many recursions as it says, as many as trained, and the most."""

    def row(variant: str, seed: int, recursions: int | None, *accuracies: float) -> dict[str, Any]:
        levels = {str(level): {"accuracy": value, "examples": 10} for level, value in enumerate(accuracies, start=1)}
        return {"variant": variant, "seed": seed, "recursions": recursions, "trained_recursions": 2} | {
            "by_difficulty": levels
        }

    rows = [row("looped", seed, r, r / 10, 0.5 + seed / 5, r / 4) for seed in (0, 1) for r in (1, 2, 3, 4)]
    measured = {"machine": {"command": "python depth.py"}, "rows": [*rows, row("dense", 0, None, 1.0, 0.75, 0.0)]}
    (project / "benchmarks" / "results" / "hops-depths.json").write_text(json.dumps(measured))
    demo = project / "studies" / "demo" / "results.json"
    content = json.loads(demo.read_text())
    content["study"]["name"] = "hops"
    demo.write_text(json.dumps(content))
    page = project / "docs" / "studies" / "hops.md"
    page.parent.mkdir()
    marks = "".join(f"<!-- hops-{part} -->\n<!-- /hops-{part} -->\n" for part in ("table", "depths"))
    page.write_text(f"# Hops\n\n{marks}The end.\n")
    SCRIPT["main"]([], root=project)
    table = page.read_text().partition("<!-- hops-depths -->")[2]
    assert "`python depth.py` (`hops-depths.json`)" in table and "| model | recursions | 1 | 2 | 3 |" in table
    assert "| `looped` | as many as the difficulty | 0.10 | 0.60 | 0.75 |" in table
    assert "| `looped` | 2 | 0.20 | 0.60 | 0.50 |" in table and "| `looped` | 4 | 0.40 | 0.60 | 1.00 |" in table
    assert "| `dense` | its own | 1.00 | 0.75 | 0.00 |" in table


def test_many_difficulties_share_columns(tmp_path: Path) -> None:
    """Means over the examples of a column: thirty difficulties stand in ten columns of three."""

    def row(recursions: int) -> dict[str, Any]:
        right = {level: float(level == recursions) for level in range(1, 31)}
        levels = {str(level): {"accuracy": share, "examples": level} for level, share in right.items()}
        return {"variant": "looped", "recursions": recursions, "trained_recursions": 2, "by_difficulty": levels}

    path = tmp_path / "hops-depths.json"
    path.write_text(json.dumps({"machine": {"command": "python depth.py"}, "rows": [row(r) for r in (1, 2, 3, 4)]}))
    lines = SCRIPT["depth_section"](path).splitlines()
    assert lines[2].startswith("| model | recursions | 1 to 3 | 4 to 6 |") and lines[2].endswith("| 28 to 30 |")
    assert lines[4].startswith("| `looped` | as many as the difficulty | 1.00 | 1.00 | – |")
    assert lines[5].startswith("| `looped` | 2 | 0.33 | 0.00 |")
    assert lines[6].startswith("| `looped` | 4 | 0.00 | 0.27 |")


def test_a_study_of_routers_gets_what_they_do(project: Path) -> None:
    """Means over seeds of the lowest and the highest; only what some model has."""

    def row(variant: str, seed: int, lr: float = 0.002, **quantities: tuple[float, float]) -> dict[str, Any]:
        found = {name.replace("_", " "): {"low": low, "high": high} for name, (low, high) in quantities.items()}
        return {"variant": variant, "seed": seed, "lr": lr, "quantities": found}

    rows = [row("mor", 0, mean_depth=(1.5, 2.0)), row("mor", 1, mean_depth=(2.5, 3.0)), row("moe", 0, gate=(1, 1))]
    rows.append(row("moe", 1, expert_load_CV=(0.25, 0.25)))
    measured = {"machine": {"command": "python routing.py"}, "rows": rows}
    (project / "benchmarks" / "results" / "demo-routing.json").write_text(json.dumps(measured))
    page = project / "README.md"
    page.write_text(page.read_text() + "<!-- demo-routing -->\n<!-- /demo-routing -->\n")
    SCRIPT["main"]([], root=project)
    table = page.read_text().partition("<!-- demo-routing -->")[2]
    assert "`python routing.py` (`demo-routing.json`)" in table and "| model | mean depth | expert load CV |" in table
    assert "| `mor` | 2.00 to 2.50 | – |" in table and "| `moe` | – | 0.25 |" in table
    measured["rows"] = [*rows, row("mor", 0, 0.004, mean_depth=(1.0, 1.0))]
    (project / "benchmarks" / "results" / "demo-routing.json").write_text(json.dumps(measured))
    SCRIPT["main"]([], root=project)
    table = page.read_text().partition("<!-- demo-routing -->")[2]
    assert "| `mor` at 0.002 | 2.00 to 2.50 | – |" in table and "| `mor` at 0.004 | 1.00 | – |" in table


def test_speed_page_gets_the_training_rows(project: Path) -> None:
    SCRIPT["main"]([], root=project)
    text = (project / "docs" / "speed.md").read_text()
    assert "`morex bench train more` on A CPU, torch 2.13.0 (`train.json`):" in text
    assert "| `more` | swiglu | 32 x 128 | fp32 | 1 | 12,346 | 3.85 | 3.50 | 1.10 | – | – | 500 MB |" in text
    assert text.count("| `more` |") == 1


def test_running_it_again_changes_nothing(project: Path) -> None:
    SCRIPT["main"]([], root=project)
    first = (project / "README.md").read_text(), (project / "docs" / "speed.md").read_text()
    SCRIPT["main"]([str(project / "studies" / "demo"), "--picture", "loss"], root=project)
    assert ((project / "README.md").read_text(), (project / "docs" / "speed.md").read_text()) == first


def test_what_is_missing_is_named(project: Path) -> None:
    with pytest.raises(ConfigError, match="no picture 'cost'; there are loss"):
        SCRIPT["main"](["--picture", "cost"], root=project)
    with pytest.raises(ConfigError, match=r"nowhere' has no results\.json; `morex compare`"):
        SCRIPT["main"]([str(project / "nowhere")], root=project)
    page = project / "README.md"
    page.write_text(page.read_text().replace("<!-- /demo-table -->", ""))
    with pytest.raises(ValueError, match="no place '<!-- demo-table -->"):
        SCRIPT["main"]([], root=project)
