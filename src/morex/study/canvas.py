"""What every PNG has in common: fonts, colours, resolution."""

from typing import TYPE_CHECKING, Any

from morex.study.series import FAINT, GRID, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 160


def settings() -> Any:
    """Settings for matplotlib's `rc_context`."""
    return {
        "font.family": ["DejaVu Sans"],
        "font.size": 9.5,
        "text.color": INK,
        "axes.labelcolor": FAINT,
        "axes.edgecolor": "#c4cbd4",
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 8.0,
        "xtick.color": "#5b6673",
        "ytick.color": "#5b6673",
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.w_pad": 0.1,
        "figure.constrained_layout.h_pad": 0.08,
    }


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple["Figure", Any]:
    """A figure that no window manager knows, so that nothing is kept after it is written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)
