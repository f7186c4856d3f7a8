"""Every format says the same: the same documents give the same tokens and the same split, and none is read at once."""

import csv
import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morex.data.corpora import open_corpus
from morex.data.formats import columnar, files
from morex.data.formats.kinds import FORMATS, documents_of, format_of
from morex.data.prepare import prepare
from morex.sections.data import DataConfig

Config = Callable[..., DataConfig]
Refused = Callable[..., str]
HARD = [
    'a "quoted" word',
    "comma, tab\tand\nline ends\r\nof both kinds\n",
    "naïve café \U0001f989",
    " spaces ",
    "'",
    "\\n",
]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts), encoding="utf-8", newline="")


def write_json(path: Path, texts: list[str]) -> None:
    path.write_text(json.dumps([{"n": 1, "text": text} for text in texts], indent=1), encoding="utf-8")


def write_table(path: Path, texts: list[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
        writer.writerows([["n", "text"], *(["1", text] for text in texts)])


def table_of(texts: list[str]) -> Any:
    pyarrow = pytest.importorskip("pyarrow", reason="the package pyarrow of the extra `data` is not installed")
    return pyarrow.table({"n": [1] * len(texts), "text": pyarrow.array(texts, "string")})


def write_parquet(path: Path, texts: list[str]) -> None:
    table = table_of(texts)
    from pyarrow import parquet

    parquet.write_table(table, path, row_group_size=7)


def write_arrow(path: Path, texts: list[str]) -> None:
    table = table_of(texts)
    from pyarrow import ipc

    with ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


WRITERS = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_table,
    ".tsv": write_table,
    ".parquet": write_parquet,
    ".arrow": write_arrow,
}
ROWS = list(WRITERS)
AS_TEXT = [".jsonl", ".json", ".csv", ".tsv"]


def texts_in(path: Path, column: str = "text") -> list[str]:
    return ["".join(document) for document in documents_of(path, column)]


def test_every_format_is_tested_here() -> None:
    assert set(FORMATS) == {".txt", ".md", *ROWS}


@pytest.mark.parametrize("suffix", ROWS)
def test_a_format_gives_the_tokens_and_the_split_of_json_lines(
    tmp_path: Path, stories: list[str], byte_config: Config, suffix: str
) -> None:
    texts = [*stories, *HARD]
    write_jsonl(tmp_path / "reference.jsonl", texts)
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, texts)
    expected = prepare(byte_config(tmp_path / "reference.jsonl", val_fraction=0.2), 257, 8)
    found = prepare(byte_config(path, val_fraction=0.2), 257, 8)
    assert texts_in(path) == texts
    assert found.content == expected.content and found.folder == expected.folder
    assert found.train.tokens.tolist() == expected.train.tokens.tolist()
    assert found.val.tokens.tolist() == expected.val.tokens.tolist()


@pytest.mark.parametrize("suffix", AS_TEXT)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), min_size=1)
)
@settings(max_examples=40, deadline=None)
def test_text_formats_give_every_text_back(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, texts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("rows") / f"a{suffix}"
    WRITERS[suffix](path, texts)
    assert texts_in(path) == texts


@pytest.mark.parametrize("suffix", AS_TEXT)
def test_packed_files_and_byte_order_marks(tmp_path: Path, suffix: str) -> None:
    path, packed = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}.gz"
    WRITERS[suffix](path, HARD)
    content = b"\xef\xbb\xbf" + path.read_bytes()
    path.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    assert texts_in(path) == texts_in(packed) == HARD


@pytest.mark.parametrize("suffix", ROWS)
def test_empty_texts_are_passed_over(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / f"a{suffix}", ["", "one", "", "two"])
    assert texts_in(tmp_path / f"a{suffix}") == ["one", "two"]


@pytest.mark.parametrize("suffix", ROWS)
def test_a_missing_column_names_those_there_are(tmp_path: Path, refused: Refused, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, ["one"])
    refused(lambda: texts_in(path, "body"), str(path), "no column 'body'", "data.column", "'n', 'text'")


@pytest.mark.parametrize("suffix", [*ROWS, ".txt"])
def test_files_without_content_are_refused(tmp_path: Path, refused: Refused, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"")
    refused(lambda: texts_in(path), str(path), "empty")


@pytest.mark.parametrize("suffix", ROWS)
def test_tables_without_rows_are_an_empty_corpus(
    tmp_path: Path, byte_config: Config, refused: Refused, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, [])
    refused(lambda: prepare(byte_config(path), 257, 8), str(path), "empty")


@pytest.mark.parametrize("suffix", AS_TEXT)
def test_nul_bytes_and_foreign_encodings_are_refused_with_their_place(
    tmp_path: Path, refused: Refused, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    for strange, words in ((b"\0", ("binary", "NUL")), (b"\xff", ("not UTF-8",))):
        WRITERS[suffix](path, ["one", "two @ three"])
        content = path.read_bytes()
        path.write_bytes(content.replace(b"@", strange))
        refused(lambda: texts_in(path), f"'{path}'", f"byte {content.index(b'@')} ", *words)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_nul_inside_a_value_is_text_as_in_json(tmp_path: Path, suffix: str) -> None:
    for name in (f"a{suffix}", "a.jsonl"):
        WRITERS[format_of(Path(name))](tmp_path / name, ["one\0two"])
        assert texts_in(tmp_path / name) == ["one\0two"]


@pytest.mark.parametrize("suffix", AS_TEXT)
def test_the_first_document_comes_before_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 64)
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, [f"document {i}" for i in range(200)])
    asked: list[int] = []

    class Watched:
        """A file that notes how far it was read."""

        def __init__(self, file: IO[bytes]) -> None:
            self.file = file

        def read(self, size: int) -> bytes:
            asked.append(size)
            return self.file.read(size)

        def __iter__(self) -> Iterator[bytes]:
            for line in self.file:
                asked.append(len(line))
                yield line

    opened = files.opened

    class Opened:
        def __init__(self, path: Path) -> None:
            self.inner = opened(path)

        def __enter__(self) -> Watched:
            return Watched(self.inner.__enter__())

        def __exit__(self, *fault: Any) -> bool | None:
            return self.inner.__exit__(*fault)

    monkeypatch.setattr(files, "opened", Opened)
    documents = documents_of(path, "text")
    assert asked == []
    assert "".join(next(documents)) == "document 0"
    assert 0 < sum(asked) <= 512 < path.stat().st_size
    assert ["".join(document) for document in documents] == [f"document {i}" for i in range(1, 200)]


@pytest.mark.parametrize(("suffix", "read"), [(".parquet", "iter_batches"), (".arrow", "read_next_batch")])
def test_columns_are_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, read: str) -> None:
    """Of the batches of a file only those are asked for whose documents are wanted."""
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, [f"document {i}" for i in range(700)])
    asked: list[int] = []
    slices = columnar.texts_of

    def counted(batches: Any, column: str, name: str) -> Iterator[str]:
        def passing() -> Iterator[Any]:
            for batch in batches:
                asked.append(batch.num_rows)
                yield batch

        return slices(passing(), column, name)

    monkeypatch.setattr(columnar, "texts_of", counted)
    documents = documents_of(path, "text")
    assert ["".join(document) for document in itertools.islice(documents, 3)] == [f"document {i}" for i in range(3)]
    assert len(asked) == 1 and asked[0] <= columnar.BATCH_ROWS
    assert len(list(documents)) == 697


def test_a_folder_mixes_all_formats_but_json_settings(tmp_path: Path) -> None:
    for suffix, write in WRITERS.items():
        write(tmp_path / f"a{suffix}", [f"in {suffix}"])
    (tmp_path / "z.txt").write_text("in .txt")
    found = ["".join(document) for document in open_corpus(str(tmp_path)).documents()]
    assert found == ["in .arrow", "in .csv", "in .jsonl", "in .parquet", "in .tsv", "in .txt"]
    assert texts_in(tmp_path / "a.json") == ["in .json"]
