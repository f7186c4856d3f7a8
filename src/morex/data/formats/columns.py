"""Picking the text out of a record: the checks and sentences that all formats with columns share."""

from collections.abc import Iterable

from morex.data.errors import DataError

# A file without a header would have its first document for a list of columns.
SHOWN_CHARACTERS = 200


def missing_column(where: str, column: str, there: Iterable[str]) -> DataError:
    """The fault of a record, or of a whole table, without the column; names those that are there."""
    names = " ".join((", ".join(f"'{name}'" for name in there) or "none").split())
    if len(names) > SHOWN_CHARACTERS:
        names = f"{names[:SHOWN_CHARACTERS]} and more"
    return DataError(f"{where}: there is no column '{column}'; set data.column to one of those there are: {names}")


def not_text(where: str, column: str, what: str) -> DataError:
    """The fault of a column that holds something other than text."""
    return DataError(f"{where}: column '{column}' holds {what}; data.column must name a column of text")
