"""JSON lines, one document an object, and JSON files with one array of such objects."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from morex.data.errors import DataError
from morex.data.formats.columns import missing_column, not_text
from morex.data.formats.files import decoded, decoded_lines

NO_SPACE = re.compile(r"\S")


def read_jsonl(path: Path, column: str) -> Iterator[str]:
    """The texts in field `column` of a file of JSON lines; blank lines and empty texts are passed over.

    Raises:
        DataError: the file is empty, binary or not UTF-8, or a line is not a JSON object with text in that column.
    """
    for number, line in enumerate(decoded_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{number}: the line is not JSON ({_reason(error)}); a .jsonl file has one JSON object a line"
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f"{path}:{number}: the line holds {_kind(record)}; a .jsonl file has one JSON object a line"
            )
        text = record.get(column)
        if not (isinstance(text, str) and text.isascii()):
            text = _field(record, column, f"{path}:{number}")
        if text:
            yield text


def read_json(path: Path, column: str) -> Iterator[str]:
    """The texts in field `column` of an array of objects; a file that begins with none is read as JSON lines.

    Raises:
        DataError: as `read_jsonl`; an element is named by its number, from 1.
    """
    scanner = _Scanner(decoded(path))
    if scanner.next_mark() != "[":
        yield from read_jsonl(path, column)
        return
    scanner.skip()
    number, mark = 0, scanner.next_mark()
    while mark != "]":
        number += 1
        where = f"{path}: element {number}"
        try:
            record = scanner.value()
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON ({_reason(error)}); a .json file has one array of objects") from None
        if not isinstance(record, dict):
            raise DataError(f"{where} is {_kind(record)}; a .json file has one array of objects")
        text = _field(record, column, where)
        if text:
            yield text
        mark = scanner.next_mark()
        if mark == ",":
            scanner.skip()
        elif mark != "]":
            found = f"'{mark}'" if mark else "the end of the file"
            raise DataError(
                f"{where} is followed by {found}; a .json file has one array of objects, with commas between"
            )
    scanner.skip()
    if mark := scanner.next_mark():
        raise DataError(f"file '{path}' goes on with '{mark}' after its array; a .json file has one array of objects")


class _Scanner:
    """JSON values one after another out of pieces of text; what is used is forgotten."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self._text = ""
        self._at = 0
        self._decoder = json.JSONDecoder()

    def next_mark(self) -> str:
        """The next character that is no space, which stays where it is; "" at the end."""
        while not (found := NO_SPACE.search(self._text, self._at)):
            self._at = len(self._text)
            if not self._more():
                return ""
        self._at = found.start()
        return found.group()

    def skip(self) -> None:
        """Leaves the character behind that `next_mark` has found."""
        self._at += 1

    def value(self) -> Any:
        """The value that starts at the next mark. Raises ValueError or RecursionError where there is none."""
        self.next_mark()
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
                return value
            except json.JSONDecodeError:
                # The value may go on in the next piece.
                if not self._more():
                    raise

    def _more(self) -> bool:
        """Reads at least as much again as is unused, so that a long value is not parsed again for every piece."""
        parts = [self._text[self._at :]]
        wanted, read = len(parts[0]), 0
        for piece in self._pieces:
            parts.append(piece)
            read += len(piece)
            if read >= wanted:
                break
        self._text, self._at = "".join(parts), 0
        return read > 0


def _field(record: dict[str, Any], column: str, where: str) -> str:
    if column not in record:
        raise missing_column(where, column, record)
    text = record[column]
    if not isinstance(text, str):
        raise not_text(where, column, _kind(text))
    try:
        # An escape can bring half of a surrogate pair in, although the bytes are valid UTF-8.
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"{where}: column '{column}' holds {half}, half a surrogate pair") from None
    return text


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "it is nested too deeply" if isinstance(error, RecursionError) else "it has a number that is too long"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
