"""Draws docs/images/routers.svg: who takes recursion r under each depth router.

python docs/figures/routers.py [FOLDER]

The scores are made up; who is active follows from them by each router's rule. The draws of `sampled` are its own.
"""

import sys
from collections.abc import Sequence
from itertools import accumulate

from matplotlib.axes import Axes
from style import BLUE, GREY, INK, ORANGE, PALE, TEAL, box, new_figure, save

from morex.depth.sampled import draw

WORDS = ("The", "river", "rose", "in", "the", "night")
RECURSIONS = 3
CAPACITIES = (1.0, 2 / 3, 1 / 3)
LOGITS = ((0.4, 2.1, 1.7, -0.3, 0.6, 2.4), (-1.2, 0.9, 1.3, -0.8, -0.5, 1.1), (-0.7, -0.2, 0.8, -1.4, -0.9, 0.5))
THRESHOLDS = (-0.1, 0.2, 0.6)
DEPTH_SCORES = ((0.7, 0.2, 0.1, 0.6, 0.3, 0.1), (0.2, 0.3, 0.6, 0.3, 0.5, 0.2), (0.1, 0.5, 0.3, 0.1, 0.2, 0.7))
HALTING = ((1.0, 0.3, 0.2, 0.7, 0.5, 0.1), (0.4, 0.3, 0.9, 0.3, 0.6, 0.2), (0.2, 0.3, 0.4, 0.5, 0.5, 0.3))
EXITS = ((0.8, 0.2, 0.1, 0.6, 0.3, 0.1), (0.5, 0.5, 0.3, 0.7, 0.4, 0.2), (1.0, 1.0, 1.0, 1.0, 1.0, 1.0))
EPSILON, EXIT = 0.01, 0.5
STEPS, SEED, KEPT, SHOWN = 6, 0, 2, 8
"""Training steps of `sampled`, recursions of each with a gradient, and the number of recursions that are shown."""

Mask = list[tuple[bool, ...]]


def main(folder: str | None = None) -> None:
    """Draws the figure into `folder`; default: docs/images."""
    figure, axes = new_figure(12.4, 7.0)
    places = [(0.335 * column, 0.46 - 0.44 * row, 0.33, 0.44) for row in (0, 1) for column in (0, 1, 2)]
    panels = [axes(*place) for place in places]
    draw_key(axes(0.0, 0.9, 1.0, 0.1))
    expert_choice(panels[0])
    token_choice(panels[1])
    threshold(panels[2])
    halting(panels[3])
    exit_gate(panels[4])
    sampled(panels[5])
    save(figure, "routers.svg", folder)


def expert_choice(ax: Axes) -> None:
    """The top share of the candidates, in training."""
    active: Mask = []
    candidates = [True] * len(WORDS)
    for logits, share in zip(LOGITS, CAPACITIES, strict=True):
        of = [logit for logit, candidate in zip(logits, candidates, strict=True) if candidate]
        least = sorted(of)[-max(1, int(share * len(WORDS) + 1e-9))]
        candidates = [c and logit >= least for c, logit in zip(candidates, logits, strict=True)]
        active.append(tuple(candidates))
    title(
        ax,
        "expert_choice",
        "training: the best 6, 4, 2 of the sequence by logit;\ndecoding: candidates with logit at least 0",
    )
    grid(ax, active, LOGITS, candidates_of(active))


def token_choice(ax: Axes) -> None:
    """The depth of the best score, one decision."""
    best = [max(range(RECURSIONS), key=lambda r: DEPTH_SCORES[r][place]) for place in range(len(WORDS))]
    active = [tuple(depth >= r for depth in best) for r in range(RECURSIONS)]
    title(ax, "token_choice", "before recursion 1 a token scores the depths 1, 2, 3\nand takes the best (framed)")
    grid(ax, active, DEPTH_SCORES, [(True,) * len(WORDS)] * RECURSIONS)
    for place, depth in enumerate(best):
        frame(ax, place, depth)


def threshold(ax: Axes) -> None:
    """Candidates above b_r."""
    active: Mask = []
    candidates: Sequence[bool] = [True] * len(WORDS)
    for logits, least in zip(LOGITS, THRESHOLDS, strict=True):
        candidates = tuple(c and logit > least for c, logit in zip(candidates, logits, strict=True))
        active.append(candidates)
    title(
        ax,
        "threshold",
        "candidates with a logit above b, which follows the shares\nover training; the same rule in decoding",
    )
    notes = [f"b = {least:.1f}" for least in THRESHOLDS]
    grid(ax, active, LOGITS, candidates_of(active), notes)


def halting(ax: Axes) -> None:
    """On until the probabilities add up to 1 - epsilon."""
    sums = list(zip(*(accumulate(token) for token in zip(*HALTING, strict=True)), strict=True))
    active = [(True,) * len(WORDS), *(tuple(done < 1 - EPSILON for done in row) for row in sums[:-1])]
    title(ax, "halting", "after a recursion the state gives a probability; a token\nstops where they add up to 1")
    grid(ax, active, HALTING, active)


def exit_gate(ax: Axes) -> None:
    """In inference, on until the exit probabilities reach the threshold."""
    left = [1.0] * len(WORDS)
    sums = []
    for gates in EXITS:
        left = [rest * (1 - gate) for rest, gate in zip(left, gates, strict=True)]
        sums.append(tuple(1 - rest for rest in left))
    active = [(True,) * len(WORDS), *(tuple(done < EXIT for done in row) for row in sums[:-1])]
    title(
        ax,
        "exit_gate",
        "inference: leaves where the exit probabilities so far\nreach 0.5; training: everyone takes all three",
    )
    grid(ax, active, sums, active)


def sampled(ax: Axes) -> None:
    """The depths of a few training steps."""
    depths = [draw(RECURSIONS, 0.5, SEED, step) for step in range(STEPS)]
    title(
        ax,
        "sampled",
        "one column a training step: all its tokens take as many as\n"
        "were drawn; in inference all take R, or as many as one asks for",
    )
    scale = 3.3 / SHOWN
    for r in range(1, SHOWN + 1):
        y = 2.9 - scale * (r - 0.5) + 0.5
        ax.text(-0.75, y, f"r = {r}", ha="right", va="center", fontsize=7, color=INK)
        for place, depth in enumerate(depths):
            fill = PALE if r > depth else BLUE if r > depth - KEPT else TEAL
            box(ax, (place - 0.42, y - scale * 0.42), 0.84, scale * 0.84, fill, radius=0.06)
    for place, depth in enumerate(depths):
        ax.text(place, 3.62, f"step {place}", ha="center", va="center", fontsize=6.6, color=GREY)
        assert depth <= SHOWN, "show more recursions"
    ax.text(5.6, 1.4, f"green: no\ngradient,\nhere all\nbut the\nlast {KEPT}", va="center", fontsize=7, color=TEAL)


def candidates_of(active: Mask) -> Mask:
    """Those active at r - 1, and all at r = 1."""
    return [(True,) * len(WORDS), *active[:-1]]


def title(ax: Axes, name: str, rule: str) -> None:
    """Name and rule of a panel, and its frame."""
    ax.set_xlim(-2.5, 7.2)
    ax.set_ylim(-0.2, 5.3)
    ax.text(-2.2, 4.95, name, fontsize=11, color=INK, weight="bold", va="center", family="DejaVu Sans Mono")
    ax.text(-2.2, 4.68, rule, fontsize=7.6, color=GREY, va="top", linespacing=1.3)


def grid(
    ax: Axes,
    active: Sequence[Sequence[bool]],
    scores: Sequence[Sequence[float]],
    asked: Mask,
    notes: Sequence[str] = (),
) -> None:
    """A row for each recursion, a square for each token: its score where it is asked, dashed where it is not."""
    for place, word in enumerate(WORDS):
        ax.text(place, 3.62, word, ha="center", va="center", fontsize=7.6, color=INK)
    for r in range(RECURSIONS):
        y = 2.9 - 1.1 * r
        ax.text(-0.75, y, f"recursion {r + 1}", ha="right", va="center", fontsize=7.6, color=INK)
        for place in range(len(WORDS)):
            fill = BLUE if active[r][place] else PALE if asked[r][place] else "white"
            edge = None if active[r][place] or asked[r][place] else GREY
            box(ax, (place - 0.42, y - 0.42), 0.84, 0.84, fill, radius=0.1, edge=edge)
            if asked[r][place]:
                ink = "white" if active[r][place] else GREY
                ax.text(place, y, f"{scores[r][place]:.1f}", ha="center", va="center", fontsize=8, color=ink)
        if notes:
            ax.text(5.6, y, notes[r], va="center", fontsize=7.6, color=ORANGE)


def frame(ax: Axes, place: int, r: int) -> None:
    """An orange frame around a square."""
    y = 2.9 - 1.1 * r
    for x, low, width, height in (
        (place - 0.46, y - 0.46, 0.92, 0.07),
        (place - 0.46, y + 0.39, 0.92, 0.07),
        (place - 0.46, y - 0.46, 0.07, 0.92),
        (place + 0.39, y - 0.46, 0.07, 0.92),
    ):
        box(ax, (x, low), width, height, ORANGE, radius=0.02)


def draw_key(ax: Axes) -> None:
    """What the squares mean."""
    ax.set_xlim(0, 12.4)
    ax.set_ylim(0, 0.7)
    for x, fill, edge, text in (
        (0.2, BLUE, None, "active: takes the recursion"),
        (3.2, PALE, None, "does not take it"),
        (5.0, "white", GREY, "stopped before: neither asked nor computed"),
    ):
        box(ax, (x, 0.2), 0.3, 0.3, fill, radius=0.05, edge=edge)
        ax.text(x + 0.42, 0.35, text, va="center", fontsize=8.5, color=INK)
    ax.text(9.2, 0.35, "numbers: made-up scores, by which it is decided", va="center", fontsize=8.5, color=GREY)


if __name__ == "__main__":
    main(*sys.argv[1:])
