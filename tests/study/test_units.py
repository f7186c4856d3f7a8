"""Numbers for people."""

import pytest

from morex.study.units import digits, duration, human, scale_for


@pytest.mark.parametrize(
    ("values", "prefix"),
    [
        ([5, 7], ""),
        ([1200, 3400], "k"),
        ([90_000, 1_500_000], "k"),
        ([900, 1_500_000], "k"),  # the median says units, but then the largest would have seven digits
        ([2e6, 8e7], "M"),
        ([], ""),
        ([None, 0], ""),
    ],
)
def test_one_scale_for_a_column(values: list[float | None], prefix: str) -> None:
    chosen, divisor = scale_for(values)
    assert chosen == prefix
    assert divisor == {"": 1, "k": 1e3, "M": 1e6}[prefix]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (1234.5, "1,234"), (0.0123, "0.012")],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert digits(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"), [(1_234_567, "", "1.23 M"), (5, "B", "5.00 B"), (2e13, "FLOP", "20.0 TFLOP")]
)
def test_human(value: float, unit: str, text: str) -> None:
    assert human(value, unit) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.25, "7.2 s"), (42, "42 s"), (83, "1 min 23 s"), (3723, "1 h 02 min"), (59.7, "60 s")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
