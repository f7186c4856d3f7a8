"""Parquet and Arrow files, read some rows at a time through the package pyarrow of the extra `data`."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morex.data.errors import DataError
from morex.data.formats.columns import missing_column, not_text
from morex.data.formats.files import empty_file, is_packed, opened

if TYPE_CHECKING:
    import pyarrow

# Rows that become Python text at a time: few enough that rows of a book each stay small together.
BATCH_ROWS = 64
BUFFER_BYTES = 1 << 20
ARROW_FILE_MAGIC = b"ARROW1"


def read_parquet(path: Path, column: str) -> Iterator[str]:
    """The texts in `column` of a Parquet file; empty texts are passed over.

    Raises:
        DataError: pyarrow is not installed, the file is no whole Parquet file, or the column is not there, is not of
            text, or holds a null.
    """
    with _faults(path, "Parquet"):
        from pyarrow import parquet

        # With its own settings pyarrow would read the column of a row group, often that of the whole file, at once.
        with parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            check_column(file.schema_arrow, column, f"file '{path}'")
            batches = file.iter_batches(BATCH_ROWS, columns=[column], use_threads=False)
            yield from texts_of(batches, column, str(path))


def read_arrow(path: Path, column: str) -> Iterator[str]:
    """The texts in `column` of an Arrow file, in the stream or the file format; raises as `read_parquet`."""
    with _faults(path, "Arrow"):
        import pyarrow

        with pyarrow.memory_map(str(path)) as content:
            start = content.read(len(ARROW_FILE_MAGIC))
            content.seek(0)
            if start == ARROW_FILE_MAGIC:
                file = pyarrow.ipc.open_file(content)
                schema, batches = file.schema, map(file.get_batch, range(file.num_record_batches))
            else:
                stream = pyarrow.ipc.open_stream(content)
                schema, batches = stream.schema, iter(stream)
            check_column(schema, column, f"file '{path}'")
            yield from texts_of(batches, column, str(path))


def check_column(schema: "pyarrow.Schema", column: str, where: str) -> None:
    """Raises DataError where a table has no such column or has no text in it."""
    from pyarrow import types

    if column not in schema.names:
        raise missing_column(where, column, schema.names)
    if schema.names.count(column) > 1:
        raise DataError(f"{where} has {schema.names.count(column)} columns '{column}'; rename all but one")
    kind: Any = schema.field(column).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise not_text(where, column, f"values of type {kind}")


def texts_of(batches: Iterable[Any], column: str, name: str) -> Iterator[str]:
    """The texts in `column` of record batches or tables; empty ones are passed over.

    Raises:
        DataError: a text is null or not UTF-8; rows are counted from 1.
    """
    row = 0
    for batch in batches:
        texts = batch.column(column)
        for start in range(0, len(texts), BATCH_ROWS):
            try:
                values = texts.slice(start, BATCH_ROWS).to_pylist()
            except UnicodeDecodeError as error:
                rows = f"{row + 1} to {row + min(BATCH_ROWS, len(texts) - start)}"
                raise DataError(f"{name}: rows {rows}: column '{column}' is not UTF-8 ({error.reason})") from None
            except SystemError:  # what pyarrow's Python layer makes of offsets that lead out of the file
                raise DataError(f"{name}: the file is damaged behind row {row}, in column '{column}'") from None
            for text in values:
                row += 1
                if text is None:
                    raise not_text(f"{name}: row {row}", column, "null")
                if text:
                    yield text


@contextmanager
def _faults(path: Path, kind: str) -> Iterator[None]:
    """Says in a sentence what is wrong with a file, or that pyarrow is not there."""
    if is_packed(path):
        raise DataError(f"file '{path}' is a gzipped {kind} file, which cannot be read a row at a time; unpack it")
    with opened(path) as file:
        if not file.read(1):
            raise empty_file(path)
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"file '{path}' needs the package pyarrow; install it with pip install 'morex[data]'") from None
    try:
        yield
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise DataError(f"file '{path}' is not a whole {kind} file ({reason})") from None
    except OSError as error:
        raise DataError(f"file '{path}' cannot be read: {error.strerror or error}") from None
