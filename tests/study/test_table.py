"""The table: every column that a row must have, whole at the widths that people use."""

import csv
import io

import pytest
from rich.console import Console

from morex.study.records import Results
from morex.study.table import COLUMNS, CSV_KEYS, csv_text, shown_columns, terminal_tables
from study.helpers import family, make_results, variant


def printed(results: Results, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    for table in terminal_tables(results, width):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_every_required_column_is_there() -> None:
    required = {
        "parameters",
        "unique_non_embedding",
        "train_flops_per_token",
        "decode_flops_per_token",
        "tokens",
        "seconds",
        "tokens_per_s",
        "peak_memory_bytes",
        "kv_bytes_per_token",
        "final_train_loss",
        "val_loss",
        "val_loss_oracle",
        "val_loss_spread",
    }
    assert required <= {column.key for column in COLUMNS}
    assert required <= set(CSV_KEYS)
    shown = [column.column.key for column in shown_columns(family())]
    assert shown == [column.key for column in COLUMNS if not column.key.startswith("val_accuracy")]


def test_accuracy_is_shown_where_a_row_has_it() -> None:
    results = family()
    first, *others = results.rows
    answered = results.model_copy(update={"rows": (first.model_copy(update={"val_accuracy": 0.75}), *others)})
    column = next(column for column in shown_columns(answered) if column.column.key == "val_accuracy")
    assert column.texts == ("0.750", "–", "–", "–", "–")


@pytest.mark.parametrize("width", [60, 80, 100, 120, 140, 200])
def test_nothing_is_cut_at_any_width(width: int) -> None:
    results = family()
    text = printed(results, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for row in results.rows:
        assert row.name in text
    for column in shown_columns(results):
        assert all(value in text for value in column.texts)


def test_one_piece_at_120_columns() -> None:
    assert len(terminal_tables(family(), 120)) == 1
    assert len(terminal_tables(family(), 70)) > 1


def test_units_are_one_for_a_column() -> None:
    columns = {column.column.key: column for column in shown_columns(family())}
    assert columns["parameters"].unit == "M"
    assert columns["parameters"].texts == ("2.00", "1.00", "1.00", "1.00", "6.00")
    assert columns["peak_memory_bytes"].unit == "MB"
    assert columns["kv_bytes_per_token"].unit == "kB"
    assert columns["kv_bytes_per_token"].texts[0] == "4.10"
    assert columns["val_loss"].texts == ("2.010", "2.310", "2.210", "2.250", "1.910")
    assert columns["val_loss_oracle"].texts == ("–", "–", "–", "2.100", "–")


def test_the_best_of_a_column_is_marked_where_one_end_is_good() -> None:
    columns = {column.column.key: column for column in shown_columns(family())}
    assert columns["val_loss"].best == 4
    assert columns["tokens_per_s"].best == 1
    assert columns["parameters"].best is None
    assert columns["peak_memory_bytes"].best is None  # all equal


def test_columns_without_numbers_are_left_out() -> None:
    keys = {column.column.key for column in shown_columns(make_results(variant("a", "dense", 2.0)))}
    assert not keys & {"val_loss_oracle", "val_loss_spread"}


def test_csv_has_plain_numbers() -> None:
    lines = list(csv.DictReader(io.StringIO(csv_text(family()))))
    assert [line["name"] for line in lines] == ["dense", "small", "loop", "routed", "experts"]
    assert float(lines[0]["val_loss"]) == pytest.approx(2.01)
    assert float(lines[3]["val_loss_oracle"]) == pytest.approx(2.1)
    assert lines[0]["val_loss_oracle"] == ""
    assert (lines[1]["twin_of"], lines[1]["twin"]) == ("loop", "equal_parameters")
    assert float(lines[0]["peak_memory_bytes"]) == 2e8


def test_failed_cells_show_in_the_row() -> None:
    results = make_results(variant("a", "dense", 2.0))
    row = results.rows[0].model_copy(update={"failed": 2})
    assert "a (2 failed)" in printed(results.model_copy(update={"rows": (row,)}), 120)
