"""PNGs made of text: the depth map, with tokens set like type, and what every model writes."""

import textwrap
from typing import TYPE_CHECKING

from morex.study.canvas import new_figure
from morex.study.records import Results, Row
from morex.study.series import FAINT, Style, depth_colour, ink_on, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def depth_map(results: Results, looks: dict[str, Style]) -> "Figure | None":
    """The sample text of every routed variant, tokens set like type and coloured by depth."""
    maps = []
    for row in results.finished:
        routing = results.cells_of(row)[0].measures.routing
        if routing is not None and routing.depth_map is not None:
            maps.append((row, routing))
    if not maps:
        return None
    width, inches = 124, 11.0
    # A character of DejaVu Sans Mono is 0.602 of its size wide; the figure keeps 2 % for its margins.
    font = 72 * 0.98 * inches / width / 0.602
    lines = {row.name: _lines(routing.depth_map.tokens, width) for row, routing in maps if routing.depth_map}
    count = sum(len(found) + 2.2 for found in lines.values())
    figure, grid = new_figure(inches, 0.3 + 0.22 * count)
    axes = grid[0][0]
    axes.axis("off")
    axes.set_xlim(0, width)
    axes.set_ylim(count, 0)
    top = 0.0
    for row, routing in maps:
        assert routing.depth_map is not None
        axes.text(0, top + 0.75, row.name, fontweight="bold", fontsize=10.5, va="center")
        _depth_key(axes, width, top + 0.75, routing.deepest, min(1, *routing.depth_map.depths))
        top += 1.4
        for line in lines[row.name]:
            for column, text, index in line:
                colour = depth_colour(routing.depth_map.depths[index], routing.deepest)
                axes.barh(top + 0.5, len(text), left=column, height=0.86, color=colour, linewidth=0)
                axes.text(
                    column,
                    top + 0.52,
                    text.replace("$", "\\$"),
                    family="monospace",
                    fontsize=font,
                    color=ink_on(colour),
                    va="center",
                )
            top += 1
        top += 0.8
    return figure


def _depth_key(axes: "Axes", right: float, middle: float, deepest: int, lowest: int) -> None:
    levels = range(lowest, deepest + 1)
    start = right - 4 * len(levels)
    axes.text(start - 1, middle, "recursions", ha="right", va="center", color=FAINT, fontsize=9)
    for place, level in enumerate(levels):
        colour = depth_colour(level, deepest)
        axes.barh(middle, 3.6, left=start + 4 * place, height=0.8, color=colour, edgecolor="#9fb0c0", linewidth=0.5)
        axes.text(
            start + 4 * place + 1.8,
            middle + 0.03,
            f"{level}",
            color=ink_on(colour),
            ha="center",
            va="center",
            fontsize=8.6,
        )


def _lines(tokens: tuple[str, ...], width: int) -> list[list[tuple[int, str, int]]]:
    """Tokens on lines of `width` characters: (column, text, index of the token)."""
    lines: list[list[tuple[int, str, int]]] = [[]]
    column = 0
    for index, token in enumerate(tokens):
        text = visible(token).replace("\n", "↵")
        if column + len(text) > width and column:
            lines.append([])
            column = 0
        lines[-1].append((column, text[:width], index))
        column += len(text)
    return lines


def samples(results: Results, looks: dict[str, Style]) -> "Figure | None":
    """What every model writes after the prompt."""
    texts: list[tuple[Row, list[str]]] = []
    for row in results.finished:
        sample = results.cells_of(row)[0].measures.sample
        if sample is not None:
            texts.append((row, textwrap.wrap("… " + _plain(sample.text), 138) or ["…"]))
    if not texts:
        return None
    count = 1.8 + sum(len(lines) + 1.9 for _, lines in texts)
    figure, grid = new_figure(10.5, 0.3 + 0.205 * count)
    axes = grid[0][0]
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(count, 0)
    axes.text(0, 0.5, f"Prompt: {_plain(results.study.sample.prompt)}", va="center", fontsize=9.5, color=FAINT)
    top = 2.3
    for row, lines in texts:
        axes.text(0, top, row.name, color=looks[row.name].colour, fontweight="bold", va="center", fontsize=10.5)
        for number, line in enumerate(lines, start=1):
            axes.text(0, top + number + 0.1, line, va="center", fontsize=9.5)
        top += len(lines) + 1.9
    return figure


def _plain(text: str) -> str:
    """One line, with nothing that matplotlib reads as mathematics."""
    return visible(text).strip().replace("\n", " ↵ ").replace("$", "\\$")
