"""Reading files: text comes back as it is, in pieces, and every fault is named with its place."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morex.data.formats import files
from morex.data.formats.files import decoded
from morex.data.formats.json_files import read_json, read_jsonl
from morex.data.formats.kinds import format_of

Refused = Callable[..., str]


def test_text_is_kept_as_it_is(tmp_path: Path) -> None:
    text = "first\r\nsecond\n\n  naïve café \U0001f989\tend \n"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert "".join(decoded(path)) == text


def test_long_text_comes_in_pieces_and_characters_survive_their_borders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 5)
    text = "aé\U0001f989ß" * 20
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    pieces = list(decoded(path))
    assert "".join(pieces) == text
    assert len(pieces) > 20 and all(pieces)


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes(b"\xef\xbb\xbfhello")
    lines.write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    assert list(decoded(text)) == ["hello"]
    assert list(read_jsonl(lines, "text")) == ["hello"]


def test_gzip_reads_like_the_file_itself(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt.gz", tmp_path / "a.jsonl.gz"
    text.write_bytes(gzip.compress("größe".encode()))
    lines.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}'))
    assert list(decoded(text)) == ["größe"]
    assert list(read_jsonl(lines, "text")) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.txt", ".txt"), ("a.JSONL.gz", ".jsonl"), ("a.md.gz", ".md"), ("plain", ""), ("b.gz", "")]
)
def test_format_is_the_suffix_before_gz(name: str, suffix: str) -> None:
    assert format_of(Path(name)) == suffix


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1))
@settings(max_examples=50)
def test_json_lines_give_every_text_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text("".join(json.dumps({"body": text, "n": 1}) + "\n" for text in texts), encoding="utf-8")
    assert list(read_jsonl(path, "body")) == texts


def test_blank_lines_and_empty_texts_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "one"}\n   \n{"text": ""}\n{"text": "two"}\n\n')
    assert list(read_jsonl(path, "text")) == ["one", "two"]


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_empty_text_is_refused(tmp_path: Path, refused: Refused, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    refused(lambda: list(decoded(path)), str(path), "empty")


def test_empty_json_lines_are_refused(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"")
    refused(lambda: list(read_jsonl(path, "text")), str(path), "empty")


@pytest.mark.parametrize("chunk", [4, 1 << 20])
@pytest.mark.parametrize(
    ("content", "place", "word"),
    [
        (b"plain text\0more", 10, "binary"),
        (b"caf\xe9 au lait", 3, "UTF-8"),
        ("größ".encode() + b"\xff!", 6, "UTF-8"),
        ("abcdefg é".encode()[:-1], 8, "UTF-8"),
        ("abc".encode("utf-16"), 3, "binary"),
    ],
)
def test_binary_and_foreign_encodings_are_refused_with_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused, content: bytes, place: int, word: str, chunk: int
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk)
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    refused(lambda: list(decoded(path)), str(path), word, f"byte {place} ")


def test_json_lines_report_bytes_of_the_whole_file(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "a.jsonl"
    good = b'{"text": "one"}\n'
    path.write_bytes(good + b'{"text": "caf\xe9"}\n')
    refused(lambda: list(read_jsonl(path, "text")), str(path), "UTF-8", f"byte {len(good) + 13} ")
    path.write_bytes(good + b"\0\n")
    refused(lambda: list(read_jsonl(path, "text")), str(path), "binary", f"byte {len(good)} ")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", ("not JSON",)),
        ('{"text": "cut', ("not JSON",)),
        ("[" * 100_000, ("not JSON",)),
        ('["text"]', ("a list",)),
        ("3", ("a number",)),
        ('{"body": "b", "title": "t"}', ("no column 'text'", "data.column", "'body', 'title'")),
        ("{}", ("no column 'text'", "none")),
        ('{"text": "a", "number": ' + "1" * 5000 + "}", ("not JSON", "a number that is too long")),
        ('{"text": null}', ("'text' holds null",)),
        ('{"text": 3.5}', ("'text' holds a number",)),
        ('{"text": ["a"]}', ("'text' holds a list",)),
        ('{"text": "a\\ud800b"}', ("'text' holds \\ud800", "surrogate")),
    ],
)
def test_lines_that_cannot_be_used_are_named_by_number(
    tmp_path: Path, refused: Refused, line: str, words: tuple[str, ...]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n' + line + "\n")
    refused(lambda: list(read_jsonl(path, "text")), f"{path}:3: ", *words)


def test_whole_surrogate_pairs_are_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83e\\udd89"}\n')
    assert list(read_jsonl(path, "text")) == ["\U0001f989"]


def test_damaged_gzip_is_refused(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"some text " * 100)[:-12])
    refused(lambda: list(decoded(path)), str(path), "gzip")
    path.write_bytes(b"no gzip at all")
    refused(lambda: list(decoded(path)), str(path), "gzip")


def test_missing_file_is_refused(tmp_path: Path, refused: Refused) -> None:
    refused(lambda: list(decoded(tmp_path / "gone.txt")), "gone.txt", "does not exist")
    refused(lambda: list(decoded(tmp_path)), str(tmp_path), "cannot be read")


def write_array(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_arrays_are_read_however_they_are_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk)
    texts = ["one", "größe, ]}", 'a "quote"\n', "x" * 50, "\U0001f989"]
    for indent, escaped in ((None, True), (2, False)):
        content = json.dumps(
            [{"text": text, "more": {"n": [1, 2]}} for text in texts], indent=indent, ensure_ascii=escaped
        )
        path = write_array(tmp_path / "a.json", f"\n {content} \n")
        assert list(read_json(path, "text")) == texts
    assert list(read_json(write_array(path, "[ ]"), "text")) == []


def test_a_json_file_of_lines_is_read_as_such(tmp_path: Path, refused: Refused) -> None:
    path = write_array(tmp_path / "a.json", '\n{"text": "one"}\n{"text": "two"}\n')
    assert list(read_json(path, "text")) == ["one", "two"]
    write_array(path, '{\n "text": "one"\n}\n')
    refused(lambda: list(read_json(path, "text")), f"{path}:1: ", "not JSON")


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("", ("element 1 is followed by the end of the file",)),
        (' {"text": "b"}]', ("element 1 is followed by '{'",)),
        (", ]", ("element 2 is not JSON",)),
        (', {"text": "cut', ("element 2 is not JSON",)),
        (', "text"]', ("element 2 is text",)),
        (', {"text": 3}]', ("element 2: column 'text' holds a number",)),
        (', {"text": "a\\ud800b"}]', ("element 2: column 'text' holds \\ud800",)),
        ("] []", ("goes on with '['",)),
        (", " + "[" * 100_000, ("element 2 is not JSON", "nested too deeply")),
    ],
)
def test_elements_that_cannot_be_used_are_named_by_number(
    tmp_path: Path, refused: Refused, rest: str, words: tuple[str, ...]
) -> None:
    path = write_array(tmp_path / "a.json", '[{"text": "a"}' + rest)
    refused(lambda: list(read_json(path, "text")), str(path), *words)
