"""What commands print: tables, numbers and JSON on stdout, progress and hints on stderr."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morex.loading import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 200
"""Columns of output that goes to a file or a pipe, so that no cell is cut."""


def console(stderr: bool = False) -> "Console":
    """A rich console on stdout or stderr."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else WIDE, highlight=False, soft_wrap=False)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: the first column to the left, the others, numbers, to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console().print(table)


def print_json(content: Any) -> None:
    """Prints an object as indented JSON, and nothing else."""
    print(json.dumps(content, indent=2))


def number(value: Any, short: bool = False) -> str:
    """A value for a table: whole numbers with separators, fractions to four digits; `short` as 1.23 M."""
    from morex.study.units import human

    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if short:
        return human(float(value))
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def check_counts(*options: tuple[str, *tuple[int | None, ...]]) -> None:
    """Raises ConfigError where an option has a number below 1; None is no number."""
    for name, *values in options:
        for value in values:
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value} must be 1 or more")


def check_choice(option: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises ConfigError where an option has a name that is not known."""
    for name in given:
        if name not in known:
            raise ConfigError(f"{option} '{name}' is unknown; use {', '.join(known)}")


def check_folder(option: str, path: Path) -> None:
    """Refuses a folder that cannot be made or written, which is better known before the work than after it."""
    known = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not known.is_dir():
        raise ConfigError(f"{option} '{path}' cannot be a folder: '{known}' is a file; name another")
    if not os.access(known, os.W_OK):
        raise ConfigError(f"{option} '{path}' cannot be written: folder '{known}' is read-only")


def check_target(option: str, path: Path) -> None:
    """Refuses a file that cannot be written, which is better known before the work than after it."""
    if path.is_dir():
        raise ConfigError(f"{option} '{path}' is a folder; name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} '{path}' cannot be written: there is no folder '{path.parent}'")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{option} '{path}' cannot be written: folder '{path.parent}' is read-only")
