"""Tables as text: CSV and TSV with a header, one document a row."""

import csv
from collections.abc import Iterator
from pathlib import Path

from morex.data.errors import DataError
from morex.data.formats.columns import missing_column
from morex.data.formats.files import decoded_lines

# The module's own limit of 131,072 characters a field is shorter than a chapter of a book.
FIELD_CHARACTERS = (1 << 31) - 1


def read_csv(path: Path, column: str) -> Iterator[str]:
    """The texts in `column` of a table with commas; see `_rows`."""
    return _rows(path, column, ",")


def read_tsv(path: Path, column: str) -> Iterator[str]:
    """The texts in `column` of a table with tabs, quoted as in CSV; see `_rows`."""
    return _rows(path, column, "\t")


def _rows(path: Path, column: str, delimiter: str) -> Iterator[str]:
    """The texts in `column`, which the first row names; blank lines and empty texts are passed over.

    Quoting is that of RFC 4180: a field in double quotes may hold delimiters, line ends and doubled quotes.

    Raises:
        DataError: the file is empty, binary or not UTF-8, the column is not there or there twice, or a row is quoted
            wrongly or has another number of fields than the header; the line is that where the row starts.
    """
    csv.field_size_limit(FIELD_CHARACTERS)
    rows = csv.reader(decoded_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    place, line = 0, 1
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{line}: this is no row ({error}); check its quotes and line ends") from None
        if not row:
            pass
        elif header is None:
            header, place = row, _place(row, column, f"{path}:{line}")
        elif len(row) != len(header):
            raise DataError(
                f"{path}:{line}: the row has {len(row)} fields, where the header has {len(header)}; put fields with "
                "delimiters or quotes in them in double quotes"
            )
        elif row[place]:
            yield row[place]
        line = rows.line_num + 1


def _place(header: list[str], column: str, where: str) -> int:
    if column not in header:
        raise missing_column(where, column, header)
    if header.count(column) > 1:
        raise DataError(
            f"{where}: the header has column '{column}' {header.count(column)} times; give each its own name"
        )
    return header.index(column)
