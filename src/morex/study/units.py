"""Numbers for people: one unit for a whole column, three or four significant digits."""

from collections.abc import Sequence

SCALES = (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12), ("P", 1e15), ("E", 1e18))


def scale_for(values: Sequence[float | None]) -> tuple[str, float]:
    """SI prefix and divisor that suit a column: its median is at least 1 and the largest has at most four digits."""
    present = sorted(abs(value) for value in values if value)
    if not present:
        return SCALES[0]
    middle, largest = present[(len(present) - 1) // 2], present[-1]
    fitting = [scale for scale in SCALES if middle >= scale[1]] or [SCALES[0]]
    best = fitting[-1]
    for scale in SCALES:
        if scale[1] >= best[1] and largest / scale[1] < 10_000:
            return scale
    return best


def digits(value: float, significant: int = 3) -> str:
    """`value` with about so many significant digits and thousands separators, without an exponent."""
    if value == 0:
        return "0"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:,.{max(0, significant - whole) if whole else significant}f}"


def human(value: float, unit: str = "", significant: int = 3) -> str:
    """`1234567` as `1.23 M` followed by the unit."""
    prefix, divisor = scale_for([value])
    return f"{digits(value / divisor, significant)} {prefix}{unit}".rstrip()


def duration(seconds: float) -> str:
    """`3723` as `1 h 02 min`, `83` as `1 min 23 s`, `7.25` as `7.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
