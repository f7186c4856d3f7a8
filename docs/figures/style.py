"""What the figures of the documentation share: colours, boxes, arrows, and files that do not change by themselves."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, GREY, PALE = "#1f2933", "#6b7785", "#e8ecf0"
BLUE, ORANGE, TEAL, VIOLET = "#2f6fb5", "#d9772b", "#23877f", "#7a5ba8"
IMAGES = Path(__file__).parents[1] / "images"

# Letters become outlines, so that they look the same everywhere; a fixed salt keeps ids, and so the file, the same.
matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "morex", "font.family": "DejaVu Sans"})


def new_figure(width: float, height: float) -> tuple[Figure, Callable[[float, float, float, float], Axes]]:
    """A white figure in inches, and a function that adds bare axes at (left, bottom, width, height) in shares of it."""
    figure = pyplot.figure(figsize=(width, height), facecolor="white")

    def axes(left: float, bottom: float, share_x: float, share_y: float) -> Axes:
        ax = figure.add_axes((left, bottom, share_x, share_y))
        ax.set_axis_off()
        return ax

    return figure, axes


def box(
    ax: Axes,
    corner: tuple[float, float],
    width: float,
    height: float,
    fill: str,
    radius: float,
    edge: str | None = None,
) -> None:
    """A rounded box from its lower left corner; with `edge`, a dashed outline."""
    style = f"round,pad=0,rounding_size={radius}"
    line = {"edgecolor": edge, "linestyle": (0, (3, 2)), "linewidth": 0.9} if edge else {"linewidth": 0}
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=fill, **line))


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """A thin arrow."""
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=8, color=colour, linewidth=1.1, alpha=0.85)
    )


def save(figure: Figure, name: str, folder: str | None) -> None:
    """Writes the figure into `folder`, default docs/images, and says where."""
    path = Path(folder) / name if folder else IMAGES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # `Date` would make every file differ; PNG has no such field.
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    print(f"wrote {path}")
