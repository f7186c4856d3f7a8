"""A folder that another one keeps up with."""

import io
import zipfile
from pathlib import Path

import pytest

from morex.study.mirror import Mirror, keep_up


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a run, and something of somebody else's."""
    (tmp_path / "here" / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    for name in ("run/config.yaml", "run/checkpoints/step-1/model", "run.log", "other/config.yaml"):
        (tmp_path / "here" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "here" / name).write_text(name)
    return tmp_path / "here"


OWNED = ("run", "run.log")


def test_it_keeps_up(here: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    (there / "other").mkdir(parents=True)
    (there / "other" / "summary.json").write_text("mine")
    mirror = Mirror(here, OWNED)
    first = mirror.changes()
    assert first is not None
    keep_up(there, first, OWNED)
    expected = {name: name for name in ("run/config.yaml", "run/checkpoints/step-1/model", "run.log")}
    assert contents(there) == expected | {"other/summary.json": "mine"}
    assert mirror.changes() is None

    (here / "run" / "checkpoints" / ".step-2").mkdir()
    (here / "run" / "checkpoints" / ".step-2" / "model").write_text("half")
    assert mirror.changes() is None
    (here / "run" / "checkpoints" / ".step-2").rename(here / "run" / "checkpoints" / "step-2")
    (here / "run" / "checkpoints" / "step-1" / "model").unlink()
    (here / "run" / "checkpoints" / "step-1").rmdir()
    (here / "run.log").write_text("more")
    second = mirror.changes()
    assert second is not None
    with zipfile.ZipFile(io.BytesIO(second)) as archive:
        assert set(archive.namelist()) == {"run/checkpoints/step-2/model", "run.log", ".names"}
    keep_up(there, second, OWNED)
    assert contents(there) == {
        "run/config.yaml": "run/config.yaml",
        "run/checkpoints/step-2/model": "half",
        "run.log": "more",
        "other/summary.json": "mine",
    }
    assert not (there / "run" / "checkpoints" / "step-1").exists()


def test_what_the_other_side_has_is_not_sent(here: Path) -> None:
    mirror = Mirror(here, OWNED)
    mirror.mark_as_sent()
    assert mirror.changes() is None


def test_an_archive_writes_nothing_else(tmp_path: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("../outside", "run/../../outside", "other/config.yaml", "run/config.yaml"):
            file.writestr(name, "text")
        file.writestr(".names", '["run/config.yaml"]')
    there = tmp_path / "there"
    there.mkdir()
    keep_up(there, archive.getvalue(), OWNED)
    assert contents(tmp_path) == {"there/run/config.yaml": "text"}
