"""docs/scaling.md shows what `morex plan` says today."""

import re
import runpy
from pathlib import Path

from documents import ROOT
from morex.model.count import block_costs
from morex.nn.costs import Rows
from morex.scaling.devices import DEVICES
from morex.scaling.memory import units_of

PAGE: Path = ROOT / "docs" / "scaling.md"
SCRIPT = runpy.run_path(str(ROOT / "docs" / "generate_scaling.py"))


def test_tables_are_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, section in SCRIPT["sections"]().items():
        shown = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.S)
        assert shown is not None, f"docs/scaling.md has no place for {name}"
        assert shown[1] == section, "run python docs/generate_scaling.py"


def test_formulas_are_those_of_the_parts() -> None:
    """A block of the medium recipe keeps what the table of bytes adds up to."""
    config = SCRIPT["recipe"]("medium").model
    d, f, h = config.d_model, config.mixer.d_ff, config.attention.heads
    dim = d // h
    kept = block_costs(config).kept
    assert kept.fp32 == 2 * (12 * d + 4) + 16 * f
    assert kept.bf16 == 2 * (8 * d + 4) + 8 * f + 4 * d
    [pairs] = block_costs(config).attention
    heads = pairs.kept(Rows(2048))
    assert heads.fp32 == 8 * dim * (h + h) + 4 * h
    assert heads.bf16 == 4 * dim * (h + h) + 4 * h


def test_what_the_page_says_about_the_core() -> None:
    """Nearly two thirds of an H100 for the large one; a third of 80 GB for three billion, of 180 GB for seven."""
    core = 8 * units_of(SCRIPT["recipe"]("large").model).core
    assert 0.55 < core / DEVICES["h100"].memory < 0.7
    assert 0.28 < 8 * 3e9 / DEVICES["h100"].memory < 0.36
    assert 0.28 < 8 * 7e9 / DEVICES["b200"].memory < 0.36
