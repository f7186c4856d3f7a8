"""Files: whole or not there at all."""

import hashlib
from pathlib import Path

import pytest

from morex.files import read_json, sha256, write_json, write_whole


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("content", ["ä\n", b"\xff\x00"])
def test_a_file_is_replaced_whole(tmp_path: Path, content: str | bytes) -> None:
    write_whole(tmp_path / "a.txt", "old")
    write_whole(tmp_path / "a.txt", content)
    assert everything(tmp_path) == {"a.txt": content.encode() if isinstance(content, str) else content}


@pytest.mark.parametrize("fault", [OSError, KeyboardInterrupt])
def test_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]) -> None:
    write_whole(tmp_path / "a.txt", "old")

    def broken(descriptor: int) -> None:
        raise fault("disk gone")

    monkeypatch.setattr("morex.files.os.fsync", broken)
    with pytest.raises(fault, match="disk gone"):
        write_whole(tmp_path / "a.txt", "new")
    assert everything(tmp_path) == {"a.txt": b"old"}


def test_json_that_is_written_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, None, "ä"]})
    assert read_json(tmp_path / "a.json") == {"a": [1, None, "ä"]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == {"a": [1, None, "ä"]}


@pytest.mark.parametrize("content", [b"[1]", b"{", b"", b"\x00", b"\xff"])
def test_a_file_without_a_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json' is damaged: it ") as refusal:
        read_json(tmp_path / "a.json")
    assert type(refusal.value) is ValueError and "\n" not in str(refusal.value)


def test_checksums_are_those_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    assert sha256(tmp_path / "a") == hashlib.sha256(b"content").hexdigest()
