"""PNGs: all of them, of a size that can be read, none for what is not there."""

import struct
import warnings
from pathlib import Path

import pytest

from morex.study.pictures import write_pictures
from study.helpers import family, make_results, variant

pytest.importorskip("matplotlib")


def size_of(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_every_picture_of_a_study_with_every_kind(tmp_path: Path) -> None:
    written = write_pictures(family(), tmp_path / "figures")
    names = {path.stem for path in written}
    assert names == {
        "loss",
        "ranking",
        "parameters",
        "cost",
        "speed",
        "memory",
        "depth",
        "depth-map",
        "experts",
        "samples",
    }
    for path in written:
        width, height = size_of(path)
        assert width >= 700
        assert height >= 150
        assert path.stat().st_size > 4000


def test_pictures_of_what_is_gone_are_removed(tmp_path: Path) -> None:
    write_pictures(family(), tmp_path)
    plain = make_results(variant("a", "dense", 2.0), variant("b", "recursive", 2.1))
    left = {path.stem for path in write_pictures(plain, tmp_path)}
    assert left == {path.stem for path in tmp_path.glob("*.png")}
    assert "depth" not in left
    assert "loss" in left


def test_any_text_can_be_drawn(tmp_path: Path) -> None:
    """Control characters, mathematics and scripts without a glyph are no reason to fail or to warn."""
    odd = variant("a", "dense", 2.0, text="\x04\x00$x_{$ 日本 \t\r\n{}\\frac")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_pictures(make_results(odd, variant("b", "routed", 2.1, histogram=(0, 1, 1))), tmp_path)
    assert (tmp_path / "samples.png").is_file()
