"""Parquet and Arrow files: types of text, and every fault with its row."""

import hashlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morex.data.formats.columnar import read_arrow, read_parquet

pyarrow = pytest.importorskip("pyarrow", reason="the package pyarrow of the extra `data` is not installed")
parquet = pytest.importorskip("pyarrow.parquet")

Refused = Callable[..., str]


def parquet_of(path: Path, values: Any, **changes: Any) -> Path:
    parquet.write_table(pyarrow.table({"text": values}), path, **changes)
    return path


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_type_of_text_is_read(tmp_path: Path, kind: str) -> None:
    texts = ["one", "größe", "one"]
    values = pyarrow.array(texts)
    values = values.dictionary_encode() if kind == "dictionary" else values.cast(getattr(pyarrow, kind)())
    assert list(read_parquet(parquet_of(tmp_path / "a.parquet", values), "text")) == texts


def test_both_kinds_of_arrow_file_are_read(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"document {i}" for i in range(200)]})
    for name, writer in (("stream.arrow", pyarrow.ipc.new_stream), ("file.arrow", pyarrow.ipc.new_file)):
        with writer(tmp_path / name, table.schema) as file:
            file.write_table(table, max_chunksize=90)
        assert list(read_arrow(tmp_path / name, "text")) == table["text"].to_pylist()


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    """Halfway through a row group of 20 MB, pyarrow holds a page of it and what was read of the file for the next."""
    texts = [f"{i} " + hashlib.shake_256(str(i).encode()).hexdigest(1000) for i in range(10_000)]
    path = parquet_of(tmp_path / "a.parquet", texts, compression="none", use_dictionary=False)
    assert parquet.ParquetFile(path).num_row_groups == 1 and path.stat().st_size > 20_000_000
    before = pyarrow.total_allocated_bytes()
    documents = read_parquet(path, "text")
    assert list(itertools.islice(documents, 5000)) == texts[:5000]
    assert pyarrow.total_allocated_bytes() - before < 6_000_000
    assert list(documents) == texts[5000:]


def test_nulls_are_named_by_row(tmp_path: Path, refused: Refused) -> None:
    path = parquet_of(tmp_path / "a.parquet", pyarrow.array(["a"] * 150 + [None]))
    refused(lambda: list(read_parquet(path, "text")), f"{path}: row 151: ", "'text' holds null")


def test_columns_of_something_else_are_refused(tmp_path: Path, refused: Refused) -> None:
    path = parquet_of(tmp_path / "a.parquet", pyarrow.array([1, 2]))
    refused(lambda: list(read_parquet(path, "text")), str(path), "'text' holds values of type int64")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path, refused: Refused) -> None:
    values = pyarrow.array([b"one", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    path = parquet_of(tmp_path / "a.parquet", values)
    refused(lambda: list(read_parquet(path, "text")), f"{path}: rows 1 to 2: ", "not UTF-8")


def test_damaged_files_are_refused(tmp_path: Path, refused: Refused) -> None:
    path = parquet_of(tmp_path / "a.parquet", pyarrow.array(["one"] * 100))
    whole = path.read_bytes()
    for content in (b"no table at all", whole[:-20], whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused(lambda: list(read_parquet(path, "text")), str(path), "not a whole Parquet file")
    arrow = tmp_path / "a.arrow"
    arrow.write_bytes(b"no table at all")
    refused(lambda: list(read_arrow(arrow, "text")), str(arrow), "not a whole Arrow file")


def test_packed_and_missing_files_are_refused(tmp_path: Path, refused: Refused) -> None:
    refused(lambda: list(read_parquet(tmp_path / "a.parquet.gz", "text")), "gzipped Parquet", "unpack")
    refused(lambda: list(read_parquet(tmp_path / "a.parquet", "text")), "does not exist")
    refused(lambda: list(read_parquet(tmp_path, "text")), str(tmp_path), "cannot be read")


def test_without_pyarrow_the_sentence_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    path = parquet_of(tmp_path / "a.parquet", pyarrow.array(["one"]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(lambda: list(read_parquet(path, "text")), str(path), "pyarrow", "morex[data]")


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, path)
    refused(lambda: list(read_parquet(path, "text")), f"'{path}' has 2 columns 'text'")
