"""CSV and TSV: quoting, and every fault with the line on which its row starts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from morex.data.formats.tables import read_csv, read_tsv

Refused = Callable[..., str]


def test_quotes_hold_delimiters_quotes_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\r\n1,"a, b"\r\n\r\n2,"one\nline and ""another"""\r\n3,plain')
    assert list(read_csv(path, "text")) == ["a, b", 'one\nline and "another"', "plain"]
    assert list(read_csv(path, "id")) == ["1", "2", "3"]


def test_tabs_part_the_columns_of_tsv(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tid\na, b\t1\n"tab\there"\t2\n')
    assert list(read_tsv(path, "text")) == ["a, b", "tab\there"]


def test_a_field_may_be_as_long_as_a_book(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "word " * 200_000 + "\n")
    assert list(read_csv(path, "text")) == ["word " * 200_000]


@pytest.mark.parametrize(
    ("rows", "line", "words"),
    [
        ('1,"two\nlines"\n2\n', 4, ("1 fields", "the header has 2", "double quotes")),
        ("1,a, b\n", 2, ("3 fields", "the header has 2")),
        ('1,a\n2,"never\nclosed\n', 3, ("unexpected end of data", "quotes")),
        ('1,"closed" early\n', 2, ("quotes",)),
        ("1,a\r2,b\r", 2, ("new-line character", "line ends")),
    ],
)
def test_rows_that_cannot_be_used_are_named_by_line(
    tmp_path: Path, refused: Refused, rows: str, line: int, words: tuple[str, ...]
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + rows)
    refused(lambda: list(read_csv(path, "text")), f"{path}:{line}: ", *words)


def test_the_header_must_have_the_column_once(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\ntext,id,text\na,b,c\n")
    refused(lambda: list(read_csv(path, "text")), f"{path}:2: ", "'text' 2 times")
    assert list(read_csv(path, "id")) == ["b"]
    path.write_text('"' + "It was a\ndark night. " * 100 + '"\n')
    sentence = refused(lambda: list(read_csv(path, "text")), f"{path}:1: ", "no column 'text'", "It was a dark night")
    assert len(sentence) < 500
