"""Draws docs/images/experts.svg: what recurs in each kind of expert layer.

python docs/figures/experts.py [FOLDER]
"""

import sys

from matplotlib.axes import Axes
from style import BLUE, GREY, INK, ORANGE, PALE, TEAL, VIOLET, arrow, box, new_figure, save

LEFT, RIGHT, MIDDLE = 1.0, 7.6, 4.3
EXPERTS, CHOSEN = 4, (1, 3)
HEIGHT = 0.8
"""Of a box."""


def main(folder: str | None = None) -> None:
    """Draws the figure into `folder`; default: docs/images."""
    figure, axes = new_figure(13.2, 5.4)
    panels = [axes(0.004 + 0.199 * place, 0.0, 0.195, 1.0) for place in range(5)]
    for panel, draw in zip(panels, (moe, recursive, huginn, shared_recurrent, layer_recurrent), strict=True):
        panel.set_xlim(0, 9.6)
        panel.set_ylim(0.8, 16)
        draw(panel)
    save(figure, "experts.svg", folder)


def moe(ax: Axes) -> None:
    """Experts that are feed-forward nets."""
    heading(ax, "moe", "nothing recurs")
    entrance(ax)
    experts(ax, 9.4, "net")
    leave(ax, 9.4, 2.4)


def recursive(ax: Axes) -> None:
    """Experts that loop."""
    heading(ax, "recursive", "each expert loops, its weights shared\nover its steps")
    entrance(ax)
    experts(ax, 9.4, "")
    inside(ax, 9.4, ("+ step embedding", "+ attention", "+ swiglu"))
    loop(ax, 7.0, 4.0, "S times")
    leave(ax, 3.6, 2.4)


def huginn(ax: Axes) -> None:
    """Experts whose latent state meets their input at every step."""
    heading(ax, "huginn", "a latent state s of each expert meets\nits input x again at every step")
    entrance(ax)
    experts(ax, 9.4, "")
    inside(ax, 9.4, ("adapter [s; x]", "+ attention", "+ swiglu"))
    loop(ax, 7.0, 4.0, "S times")
    leave(ax, 3.6, 2.4)


def shared_recurrent(ax: Axes) -> None:
    """Light experts before one recurrent block."""
    heading(ax, "shared_recurrent", "light experts, mixed into u; then one\nrecurrent block for all tokens")
    entrance(ax)
    experts(ax, 9.4, "net")
    row(ax, 7.6, "weighted sum u", PALE, INK)
    flow(ax, 9.4, 8.4)
    stack(ax, 5.9, ("adapter [s; u]", "+ attention", "+ swiglu"))
    flow(ax, 7.6, 6.7)
    loop(ax, 6.3, 3.3, "S times")
    flow(ax, 2.9, 1.9)
    ax.text(MIDDLE, 1.45, "y", ha="center", va="center", fontsize=11, color=INK, style="italic")


def layer_recurrent(ax: Axes) -> None:
    """The layer recurs, its router included."""
    heading(ax, "layer_recurrent", "the whole layer recurs on its own\noutput s, and routes anew each time")
    entrance(ax, "s, at first x")
    experts(ax, 9.4, "net")
    row(ax, 6.4, "s + weighted sum", PALE, INK)
    flow(ax, 9.4, 7.2)
    loop(ax, 11.9, 6.8, "S times")
    flow(ax, 6.4, 1.9)
    ax.text(MIDDLE, 1.45, "y = s - x", ha="center", va="center", fontsize=11, color=INK, style="italic")


def heading(ax: Axes, name: str, what: str) -> None:
    """Name of a kind and what recurs in it."""
    ax.text(0.2, 15.4, name, fontsize=11, color=INK, weight="bold", va="center", family="DejaVu Sans Mono")
    ax.text(0.2, 14.9, what, fontsize=7.6, color=GREY, va="top", linespacing=1.3)


def entrance(ax: Axes, state: str = "x") -> None:
    """The tokens and the router."""
    ax.text(MIDDLE, 13.2, state, ha="center", va="center", fontsize=11, color=INK, style="italic")
    flow(ax, 12.85, 12.3)
    row(ax, 11.5, f"router: {len(CHOSEN)} of {EXPERTS}", VIOLET, "white")


def experts(ax: Axes, y: float, label: str) -> None:
    """The experts; those that this token visits are coloured."""
    for place in range(EXPERTS):
        x = centre(place)
        chosen = place in CHOSEN
        box(ax, (x - 0.72, y), 1.44, HEIGHT + 0.2, ORANGE if chosen else PALE, radius=0.15)
        ax.text(
            x, y + 0.5, label or str(place + 1), ha="center", va="center", fontsize=8, color="white" if chosen else GREY
        )
        if chosen:
            arrow(ax, (MIDDLE, 11.45), (x, y + 1.08), GREY)


def inside(ax: Axes, y: float, parts: tuple[str, ...]) -> None:
    """A frame below the experts that shows one of them."""
    top = y - 1.4
    box(ax, (LEFT - 0.3, 3.2), RIGHT - LEFT + 1.9, top - 3.1, "white", radius=0.2, edge=ORANGE)
    for side in (-0.7, 0.7):
        ax.plot((centre(CHOSEN[0]) + side, MIDDLE + 4 * side), (y - 0.02, top), color=ORANGE, linewidth=0.7, alpha=0.6)
    ax.text(LEFT, top - 0.42, "one expert", fontsize=7.2, color=ORANGE, va="center")
    stack(ax, top - 1.5, parts)


def stack(ax: Axes, y: float, parts: tuple[str, ...]) -> None:
    """Boxes one below the other, the first with its lower edge at y."""
    for place, part in enumerate(parts):
        low = y - 1.3 * place
        row(ax, low, part, BLUE if place else TEAL, "white")
        if place:
            flow(ax, low + 1.3, low + HEIGHT)


def row(ax: Axes, y: float, text: str, fill: str, ink: str) -> None:
    """A wide box with a text."""
    box(ax, (LEFT, y), RIGHT - LEFT, HEIGHT, fill, radius=0.15)
    ax.text(MIDDLE, y + HEIGHT / 2, text, ha="center", va="center", fontsize=8.5, color=ink)


def loop(ax: Axes, top: float, bottom: float, text: str) -> None:
    """A way back on the right, from the lowest part to the first."""
    x = RIGHT + 0.75
    ax.plot((RIGHT, x, x), (bottom, bottom, top), color=INK, linewidth=1.1, alpha=0.85)
    arrow(ax, (x, top), (RIGHT + 0.02, top), INK)
    ax.text(x + 0.25, (top + bottom) / 2, text, rotation=270, ha="left", va="center", fontsize=8, color=INK)


def leave(ax: Axes, start: float, y: float) -> None:
    """From the experts to their weighted sum."""
    row(ax, y - 0.9, "weighted sum", PALE, INK)
    flow(ax, start, y - 0.1)


def flow(ax: Axes, start: float, end: float) -> None:
    """An arrow down the middle."""
    arrow(ax, (MIDDLE, start), (MIDDLE, end), GREY)


def centre(place: int) -> float:
    """Middle of an expert."""
    return LEFT + 0.72 + place * (RIGHT - LEFT - 1.44) / (EXPERTS - 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
