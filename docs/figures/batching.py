"""Draws docs/images/batching.svg: requests in lockstep, and with tokens at all recursions in the same pass.

python docs/figures/batching.py [FOLDER]
"""

import sys
from collections.abc import Sequence

from matplotlib.axes import Axes
from style import BLUE, GREY, INK, ORANGE, PALE, TEAL, VIOLET, box, new_figure, save

DEPTHS = {
    "A": (2, 4, 1, 3, 1, 2),
    "B": (4, 1, 2, 2, 3, 1),
    "C": (1, 3, 1, 4, 2, 2),
    "D": (3, 1, 2, 1, 4, 1),
}
"""Recursions of each request's next tokens."""
COLOURS = {1: BLUE, 2: TEAL, 3: ORANGE, 4: VIOLET}
PASSES = 10


def main(folder: str | None = None) -> None:
    """Draws the figure into `folder`; default: docs/images."""
    figure, axes = new_figure(11.6, 4.6)
    above, below = axes(0.0, 0.5, 1.0, 0.48), axes(0.0, 0.0, 1.0, 0.5)
    panel(above, "lockstep", "whoever leaves early waits\nfor the deepest", in_lockstep())
    panel(below, "depth-wise", "whoever leaves draws the next\ntoken, which enters at once", depth_wise())
    below.text(
        2.0 + PASSES / 2,
        -1.15,
        "passes of the core; the number is the recursion that a token takes, | leads through coda, head and prelude",
        ha="center",
        va="center",
        fontsize=9,
        color=GREY,
    )
    save(figure, "batching.svg", folder)


def in_lockstep() -> list[list[int]]:
    """Of each request and pass, the recursion; 0 where it waits."""
    rows: list[list[int]] = [[] for _ in DEPTHS]
    for depths in zip(*DEPTHS.values(), strict=True):
        for row, depth in zip(rows, depths, strict=True):
            row += [*range(1, depth + 1), *[0] * (max(depths) - depth)]
    return rows


def depth_wise() -> list[list[int]]:
    """Of each request and pass, the recursion."""
    return [[r for depth in depths for r in range(1, depth + 1)] for depths in DEPTHS.values()]


def panel(ax: Axes, title: str, note: str, rows: Sequence[Sequence[int]]) -> None:
    """One way to batch."""
    ax.set_xlim(-2.3, 14.6)
    ax.set_ylim(-1.5, 4.3)
    ax.text(-2.1, 2.2, title, fontsize=13, color=INK, weight="bold", va="center")
    ax.text(-2.1, 1.2, note, fontsize=8.5, color=GREY, va="center")
    done = 0
    for place, (name, row) in enumerate(zip(DEPTHS, rows, strict=True)):
        y = 3.2 - place
        ax.text(1.6, y + 0.4, name, fontsize=10, color=INK, ha="center", va="center")
        for x, recursion in enumerate(row[:PASSES]):
            ends = recursion and (x + 1 == len(row) or row[x + 1] <= 1)
            cell(ax, 2.0 + x, y, recursion)
            if ends:
                done += 1
                ax.plot([2.97 + x] * 2, [y + 0.08, y + 0.74], color=INK, linewidth=2)
    ax.text(2.35 + PASSES, 2.3, f"{done} tokens", fontsize=11, color=INK, weight="bold", va="center")
    ax.text(2.35 + PASSES, 1.6, f"in {PASSES} passes", fontsize=9, color=GREY, va="center")


def cell(ax: Axes, x: float, y: float, recursion: int) -> None:
    """A token in a pass, or an empty place."""
    if not recursion:
        box(ax, (x + 0.06, y + 0.04), 0.84, 0.74, "white", radius=0.1, edge=PALE)
        return
    box(ax, (x + 0.06, y + 0.04), 0.84, 0.74, COLOURS[recursion], radius=0.1)
    ax.text(x + 0.48, y + 0.4, str(recursion), fontsize=9.5, color="white", ha="center", va="center")


if __name__ == "__main__":
    main(*sys.argv[1:])
