"""The guide to data sets says what the program says."""

import re
from pathlib import Path

import morex
from morex.data.formats.kinds import FORMATS
from morex.data.named import NAMED

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SOURCE = Path(morex.__file__).parent


def test_every_sentence_of_the_guide_is_one_of_the_program() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", code)
    rows = re.findall(r"^\| `([^`]+)` \|", PAGE.partition("## What each sentence says")[2], re.M)
    assert len(rows) > 20
    for row in rows:
        for part in row.split("..."):
            assert part in joined, f"no sentence has {part!r}"


def test_every_format_and_every_name_is_in_the_guide() -> None:
    for suffix in FORMATS:
        assert f"`{suffix}`" in PAGE
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.partition("### Corpora by name")[2].partition("## What is held")[0], re.M)
    assert rows == list(NAMED)
