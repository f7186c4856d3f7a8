"""The table of a study: the columns that every row must have, for the terminal, table.csv and the report."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from morex.study.records import Results, Row
from morex.study.units import digits, scale_for


@dataclass(frozen=True)
class Column:
    """A column: its keys, its headings and how a number is shown."""

    key: str
    heading: str
    """Short lines, parted by bars; the unit becomes the last."""
    unit: str
    """With `{}` where an SI prefix goes; empty for a column that is shown as it is."""
    meaning: str
    best: Callable[[Sequence[float]], float] | None = None
    """Which end of the column is the good one."""
    decimals: int | None = None
    """Fixed decimals; otherwise three significant digits in one scale for the column."""


COLUMNS = (
    Column(
        "val_loss",
        "held-|out|loss",
        "",
        "Loss over the whole held-out set, routed as in decoding, in nats per token; mean over seeds",
        min,
        3,
    ),
    Column("val_loss_spread", "over|seeds", "±", "Standard deviation of the held-out loss over seeds", None, 3),
    Column(
        "val_loss_oracle",
        "oracle|loss",
        "",
        "Held-out loss with top-k routing that sees the whole sequence; such routing cannot be decoded",
        None,
        3,
    ),
    Column(
        "val_accuracy",
        "held-out|accuracy",
        "",
        "Share of the task's held-out answers that are right from the first token to the last; mean over seeds",
        max,
        3,
    ),
    Column(
        "val_accuracy_oracle",
        "oracle|accuracy",
        "",
        "Held-out accuracy with top-k routing that sees the whole sequence; such routing cannot be decoded",
        None,
        3,
    ),
    Column(
        "final_train_loss",
        "train|loss",
        "",
        "Loss of the last training step's tokens, not a running mean; mean over seeds",
        None,
        3,
    ),
    Column("parameters", "params", "{}", "Parameters; a shared weight counts once"),
    Column(
        "unique_non_embedding",
        "non-|embed.",
        "{}",
        "Parameters without embeddings and head; a shared weight counts once",
    ),
    Column(
        "train_flops_per_token",
        "train|FLOP/t",
        "{}",
        "Training FLOPs per token, forward and backward: closed form on the tokens that were active",
    ),
    Column(
        "decode_flops_per_token",
        "decode|FLOP/t",
        "{}",
        "FLOPs to decode one token: closed form on the shares that the router is set to",
    ),
    Column("tokens", "tokens|seen", "{}", "Tokens seen in training"),
    Column("seconds", "train|time", "s", "Seconds of training, evaluation left out", min),
    Column("tokens_per_s", "train|tok/s", "{}", "Training tokens per second", max),
    Column("decode_tokens_per_s", "decode|tok/s", "{}", "Tokens per second of greedy decoding, one sequence", max),
    Column("peak_memory_bytes", "peak|memory", "{}B", "Peak memory of training", min),
    Column("kv_bytes_per_token", "KV per|token", "{}B", "Bytes that the cache keeps per token", min),
)
MEASURE = Console(width=1000)
CSV_KEYS = (
    *("name", "kind", "twin_of", "twin", "seeds", "failed", "lr"),
    *(column.key for column in COLUMNS),
    *("train_flops", "bits_per_byte", "mean_depth"),
)


@dataclass(frozen=True)
class ShownColumn:
    """A column as it is shown for these results: lines of heading, unit, one text per row, the best row."""

    column: Column
    names: tuple[str, ...]
    unit: str
    texts: tuple[str, ...]
    best: int | None

    @property
    def name(self) -> str:
        """The heading on one line."""
        return " ".join(self.names).replace("- ", "-")


def shown_columns(results: Results) -> list[ShownColumn]:
    """Columns that hold at least one number, each in one unit, texts in the order of the rows."""
    shown = []
    for column in COLUMNS:
        values = [getattr(row, column.key) for row in results.rows]
        present = [value for value in values if value is not None]
        if not present:
            continue
        prefix, divisor = scale_for(present) if "{}" in column.unit else ("", 1.0)
        texts = tuple("–" if value is None else _number(column, value / divisor) for value in values)
        best = None
        if column.best is not None and len(present) > 1 and min(present) < max(present):
            best = values.index(column.best(present))
        names = tuple(column.heading.split("|"))
        shown.append(ShownColumn(column, names, column.unit.format(prefix), texts, best))
    return shown


def _number(column: Column, value: float) -> str:
    return f"{value:.{column.decimals}f}" if column.decimals is not None else digits(value)


def terminal_tables(results: Results, width: int) -> list[Table]:
    """The table in as few pieces, one below the other, as fit the width."""
    columns = shown_columns(results)
    for pieces in range(1, len(columns) + 1):
        size = -(-len(columns) // pieces)
        tables = [_table(results, columns[start : start + size]) for start in range(0, len(columns), size)]
        if all(Measurement.get(MEASURE, MEASURE.options, table).maximum <= width for table in tables):
            return tables
    return [_table(results, [column]) for column in columns]


def _table(results: Results, columns: Sequence[ShownColumn]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), show_edge=False, pad_edge=False, header_style="bold")
    headings = [[*column.names, column.unit] if column.unit else [*column.names] for column in columns]
    height = max(map(len, headings), default=1)
    table.add_column("\n".join([*[""] * (height - 1), "variant"]), no_wrap=True)
    for lines in headings:
        table.add_column("\n".join([*[""] * (height - len(lines)), *lines]), justify="right", no_wrap=True)
    for index, row in enumerate(results.rows):
        cells = [Text(column.texts[index], style="bold green" if column.best == index else "") for column in columns]
        table.add_row(Text(label(row)), *cells, style="dim" if row.kind == "dense" else "")
    return table


def label(row: Row) -> str:
    """The variant's name, with a mark where cells failed."""
    return f"{row.name} ({row.failed} failed)" if row.failed else row.name


def csv_text(results: Results) -> str:
    """table.csv: one line per variant, full precision, plain units (bytes, seconds, FLOPs, nats)."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_KEYS)
    for row in results.rows:
        writer.writerow(["" if (value := getattr(row, key)) is None else value for key in CSV_KEYS])
    return buffer.getvalue()
