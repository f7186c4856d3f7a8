"""What every PNG has in common: fonts, colours, resolution."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morex.loading import ConfigError
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


def write_figures(drawings: Mapping[str, Callable[[], "Figure | None"]], folder: Path) -> list[Path]:
    """Writes each drawing to `folder`/NAME.png; where it comes to nothing, a picture of that name is removed.

    Raises ConfigError where matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        raise ConfigError("the PNGs need matplotlib, which is not installed; run pip install 'morex[viz]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with rc_context(settings()), warnings.catch_warnings():
        # Texts may hold characters of any script; those that the font lacks become boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for name, draw in drawings.items():
            figure, path = draw(), folder / f"{name}.png"
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            figure.savefig(path, dpi=DPI, facecolor="white")
            written.append(path)
    return written
