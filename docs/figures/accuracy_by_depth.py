"""Draws held-out accuracy by recursions and difficulty, one map for each model of a study.

    python docs/figures/accuracy_by_depth.py benchmarks/results/NAME-depths.json

The picture is docs/images/NAME-depths.png. Models that do not recur have one row.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

IMAGES = Path(__file__).parents[1] / "images"
COLUMNS = 3
MOST_TICKS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    source = parser.parse_args().source
    rows = json.loads(source.read_text(encoding="utf-8"))["rows"]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    lines = -(-len(variants) // COLUMNS)
    figure = Figure(figsize=(3.4 * COLUMNS, 3.2 * lines), layout="constrained")
    axes = list(figure.subplots(lines, COLUMNS, squeeze=False).flat)
    image = None
    for axis, variant in zip(axes, variants, strict=False):
        image = draw(axis, variant, [row for row in rows if row["variant"] == variant])
    for axis in axes[len(variants) :]:
        axis.set_visible(False)
    figure.colorbar(image, ax=axes, label="held-out accuracy", shrink=0.6)
    target = IMAGES / f"{source.stem}.png"
    figure.savefig(target, dpi=120)
    print(f"wrote {target}")


def draw(axis: Any, variant: str, rows: list[dict[str, Any]]) -> Any:
    """One map; the means over seeds. A frame holds the recursions of training."""
    difficulties = list(rows[0]["by_difficulty"])
    depths = sorted({row["recursions"] or 0 for row in rows})
    accuracy = np.array(
        [
            [
                np.mean([row["by_difficulty"][d]["accuracy"] for row in rows if (row["recursions"] or 0) == depth])
                for d in difficulties
            ]
            for depth in depths
        ]
    )
    image = axis.imshow(accuracy, vmin=0, vmax=1, origin="lower", cmap="viridis", aspect="auto")
    axis.set_title(variant, fontsize=10)
    recursions = [str(depth) if depth else "own" for depth in depths]
    for set_ticks, names in ((axis.set_xticks, difficulties), (axis.set_yticks, recursions)):
        apart = -(-len(names) // MOST_TICKS)
        set_ticks(range(apart - 1, len(names), apart), names[apart - 1 :: apart], fontsize=7)
    axis.set_xlabel("difficulty", fontsize=8)
    axis.set_ylabel("recursions", fontsize=8)
    if len(difficulties) <= MOST_TICKS:
        for (y, x), value in np.ndenumerate(accuracy):
            axis.text(
                x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color="white" if value < 0.6 else "black"
            )
    if depths != [0]:
        trained = rows[0]["trained_recursions"]
        axis.add_patch(Rectangle((-0.5, -0.5), len(difficulties), trained, fill=False, edgecolor="red", linewidth=1.2))
    return image


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
