"""Draws docs/images/one-idea.svg: pack the active tokens, run a shared piece of network on them, unpack.

python docs/figures/one_idea.py [FOLDER]
"""

import sys
from collections.abc import Collection, Sequence

from matplotlib.axes import Axes
from style import BLUE, GREY, INK, ORANGE, PALE, TEAL, arrow, box, new_figure, save

WORDS = ("The", "river", "rose", "in", "the", "night", "and", "flooded", "the", "town")
ACTIVE = (1, 2, 5, 7, 9)
PADDING = 2


def main(folder: str | None = None) -> None:
    """Draws the figure into `folder`; default: docs/images."""
    figure, axes = new_figure(12.4, 5.6)
    flow, visits = axes(0.01, 0.0, 0.67, 1.0), axes(0.7, 0.0, 0.3, 1.0)
    draw_flow(flow)
    draw_visits(visits)
    save(figure, "one-idea.svg", folder)


def draw_flow(ax: Axes) -> None:
    """The left half: all tokens, the packed row, the network, the packed row again, all tokens."""
    ax.set_xlim(-3.4, 10.3)
    ax.set_ylim(-0.4, 8.9)
    top, packed, network, back, bottom = 7.6, 5.55, 3.75, 2.1, 0.3
    first = (len(WORDS) - len(ACTIVE) - PADDING) / 2
    for place, word in enumerate(WORDS):
        chosen = place in ACTIVE
        token(ax, place, top, word, BLUE if chosen else PALE, "white" if chosen else GREY)
        ax.text(place, top + 0.62, str(place), ha="center", va="center", fontsize=8.5, color=GREY)
        token(ax, place, bottom, word, TEAL if chosen else PALE, "white" if chosen else GREY)
    for rank, place in enumerate(ACTIVE):
        x = first + rank
        token(ax, x, packed, WORDS[place], BLUE, "white")
        ax.text(x, packed - 0.53, f"position {place}", ha="center", va="center", fontsize=6.6, color=GREY)
        token(ax, x, back, WORDS[place], TEAL, "white")
        arrow(ax, (place, top - 0.36), (x, packed + 0.38), BLUE)
        arrow(ax, (x, packed - 0.76), (x, network + 0.46), GREY)
        arrow(ax, (x, network - 0.54), (x, back + 0.34), GREY)
        arrow(ax, (x, back - 0.36), (place, bottom + 0.38), TEAL)
    for rank in range(len(ACTIVE), len(ACTIVE) + PADDING):
        token(ax, first + rank, packed, "", "white", GREY, dashed=True)
    ax.text(
        first + len(ACTIVE) + PADDING - 0.4,
        packed,
        "padding,\nseen by attention only",
        va="center",
        fontsize=7.5,
        color=GREY,
    )
    box(ax, (first - 0.55, network - 0.5), len(ACTIVE) + 0.1, 0.92, ORANGE, radius=0.18)
    centre = first + (len(ACTIVE) - 1) / 2
    ax.text(
        centre,
        network + 0.12,
        "a shared piece of network",
        ha="center",
        va="center",
        fontsize=11.5,
        color="white",
        weight="bold",
    )
    ax.text(
        centre,
        network - 0.24,
        "one recursion of the core, or one expert",
        ha="center",
        va="center",
        fontsize=8.5,
        color="white",
    )
    for height, text, note in (
        (top, "tokens", "all of them, in time order"),
        ((top + packed) / 2, "pack", "active tokens, still in time order,\nwith their true positions"),
        (network, "compute", "for the active tokens alone"),
        ((back + bottom) / 2, "unpack", "each goes back to its place,\nthe others pass by"),
    ):
        ax.text(-3.35, height + 0.14, text, fontsize=11, color=INK, weight="bold", va="bottom")
        ax.text(-3.35, height + 0.04, note, fontsize=7.2, color=GREY, va="top")


def draw_visits(ax: Axes) -> None:
    """The right half: who visits what, for a depth router and for an expert router."""
    ax.set_xlim(-3.2, 10.2)
    ax.set_ylim(-0.4, 8.9)
    ax.text(-3.15, 8.25, "Depth routing", fontsize=12, weight="bold", color=INK)
    ax.text(-3.15, 7.8, "visits of the core, recursion by recursion", fontsize=8, color=GREY)
    depths = [tuple(range(10)), (1, 2, 4, 5, 7, 9), ACTIVE[1:4]]
    grid(ax, 6.9, [f"recursion {r}" for r in (1, 2, 3)], depths, BLUE)
    ax.text(-3.15, 3.55, "Expert routing", fontsize=12, weight="bold", color=INK)
    ax.text(-3.15, 3.1, "visits of the experts, two for each token", fontsize=8, color=GREY)
    experts = [(0, 1, 4, 5, 7, 8), (0, 2, 3, 6, 9), (1, 2, 3, 5, 8), (4, 6, 7, 9)]
    grid(ax, 2.2, [f"expert {e}" for e in (1, 2, 3, 4)], experts, ORANGE)
    ax.text(-3.15, 4.5, "Every row is one pack, one computation, one unpack.", fontsize=8, color=INK, style="italic")


def grid(ax: Axes, top: float, names: Sequence[str], visits: Sequence[Collection[int]], colour: str) -> None:
    """One row for each visited piece of network, one square for each token."""
    for row, (name, visitors) in enumerate(zip(names, visits, strict=True)):
        y = top - 0.72 * row
        ax.text(-0.75, y, name, ha="right", va="center", fontsize=8.5, color=INK)
        for place in range(len(WORDS)):
            fill = colour if place in visitors else PALE
            box(ax, (place - 0.36, y - 0.26), 0.74, 0.54, fill, radius=0.08)


def token(ax: Axes, x: float, y: float, word: str, fill: str, ink: str, dashed: bool = False) -> None:
    """A token as a rounded box."""
    box(ax, (x - 0.45, y - 0.3), 0.9, 0.6, fill, radius=0.12, edge=GREY if dashed else None)
    ax.text(x, y, word, ha="center", va="center", fontsize=8, color=ink)


if __name__ == "__main__":
    main(*sys.argv[1:])
