"""Draws docs/images/schedules.svg: which block runs when under each sharing strategy, read from the schedules.

python docs/figures/schedules.py [FOLDER]
"""

import sys

from matplotlib.axes import Axes
from style import BLUE, GREY, INK, ORANGE, PALE, TEAL, VIOLET, box, new_figure, save

from morex.depth.schedule import Schedule, from_layers

RECURSIONS = 3
SHOWN = (("cycle", 9), ("sequence", 9), ("middle_cycle", 8), ("middle_sequence", 8))
CORE_COLOURS = (BLUE, ORANGE, TEAL, VIOLET)


def main(folder: str | None = None) -> None:
    """Draws the figure into `folder`; default: docs/images."""
    figure, axes = new_figure(9.6, 3.5)
    ax = axes(0.0, 0.0, 1.0, 1.0)
    ax.set_xlim(-3.1, 11.9)
    ax.set_ylim(-0.75, 4.5)
    for row, (sharing, layers) in enumerate(SHOWN):
        draw(ax, 3.35 - 1.1 * row, sharing, from_layers(sharing, layers, RECURSIONS))
    ax.text(-2.95, 4.15, f"R = {RECURSIONS} recursions; steps run to the right", fontsize=9, color=GREY, va="center")
    ax.text(9.3, 4.15, "stored blocks", fontsize=9, color=GREY, va="center")
    save(figure, "schedules.svg", folder)


def draw(ax: Axes, y: float, sharing: str, schedule: Schedule) -> None:
    """One strategy: a box for each step, the same letter and colour for the same block."""
    ax.text(-2.95, y, sharing, fontsize=11, color=INK, weight="bold", va="center", family="DejaVu Sans Mono")
    for place, step in enumerate(schedule.steps):
        core = step.block - schedule.prelude
        shared = 0 <= core < schedule.core
        fill = CORE_COLOURS[core % len(CORE_COLOURS)] if shared else PALE
        box(ax, (place - 0.45, y - 0.36), 0.9, 0.72, fill, radius=0.12)
        letter, ink = chr(ord("A") + step.block), "white" if shared else INK
        ax.text(place, y + 0.06, letter, ha="center", va="center", fontsize=12, color=ink, weight="bold")
        ax.text(
            place,
            y - 0.22,
            f"r = {step.recursion}" if shared else "",
            ha="center",
            va="center",
            fontsize=6.5,
            color=ink,
        )
    ax.text(9.3, y, f"{schedule.num_blocks} of {schedule.unrolled_depth}", fontsize=11, color=INK, va="center")


if __name__ == "__main__":
    main(*sys.argv[1:])
