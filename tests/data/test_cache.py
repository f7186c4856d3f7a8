"""The cache: whole or not there at all."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from morex.data.cache import building, discard, key_of, read_json, write_file
from morex.files import cache_folder

Refused = Callable[..., str]


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_cache_folder_is_that_of_the_environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("MOREX_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/morex")
    monkeypatch.setenv("MOREX_CACHE", "~/elsewhere")
    assert cache_folder() == Path("/home/somebody/elsewhere")


def test_keys_follow_their_parts() -> None:
    assert key_of(1, {"a": 2, "b": [3]}) == key_of(1, {"b": [3], "a": 2})
    assert len({key_of(1, 2), key_of(12), key_of(2, 1), key_of("1", 2), key_of([1, 2])}) == 5


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "down"
    with building(folder) as temporary:
        (temporary / "file").write_text("content")
        assert not folder.exists()
    assert everything(tmp_path) == ["deep", "deep/down", "deep/down/file"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ValueError])
def test_what_fails_leaves_nothing(tmp_path: Path, fault: type[BaseException]) -> None:
    with pytest.raises(fault), building(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("content")
        raise fault
    assert everything(tmp_path) == []


def test_the_first_to_finish_wins(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with building(folder) as slow:
        (slow / "file").write_text("slow")
        with building(folder) as fast:
            (fast / "file").write_text("fast")
    assert everything(tmp_path) == ["folder", "folder/file"]
    assert (folder / "file").read_text() == "fast"


def test_write_faults_are_one_sentence(tmp_path: Path, refused: Refused) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")

    def build() -> None:
        with building(blocked / "folder"):
            raise AssertionError("unreachable")

    refused(build, str(blocked), "cannot write", "MOREX_CACHE")
    refused(lambda: write_file(blocked / "a", b"content"), "cannot write", "MOREX_CACHE")


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert everything(tmp_path) == ["deep", "deep/file"]


def test_read_json_gives_objects_only(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_json(path) is None
    for content, expected in (("{", None), ("[1]", None), ('{"a": 1}', {"a": 1})):
        path.write_text(content)
        assert read_json(path) == expected


def test_discard_removes_a_folder_or_nothing(tmp_path: Path) -> None:
    discard(tmp_path / "gone")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("content")
    discard(tmp_path / "folder")
    assert everything(tmp_path) == []


def test_what_a_killed_process_left_is_swept_after_a_day(tmp_path: Path) -> None:
    old, young = tmp_path / ".unfinished-old", tmp_path / ".unfinished-young"
    for folder in (old, young):
        folder.mkdir()
    then = time.time() - 25 * 3600
    os.utime(old, (then, then))
    with building(tmp_path / "new"):
        pass
    assert everything(tmp_path) == [".unfinished-young", "new"]
