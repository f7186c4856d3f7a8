"""The cells of a study as benchmark rows: losses, which any machine can repeat, and no times.

python benchmarks/study.py STUDY_FOLDER benchmarks/results/NAME.json
"""

import argparse
import json
import sys
from pathlib import Path

from morex.study.results import cell_folder, collect
from morex.train.runs import RunFolder

MACHINE = ("versions", "platform", "device", "cpu", "cores", "threads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    folder, target = options.study, options.target
    results = collect(folder)
    rows, commits = [], set()
    for cell in results.cells:
        if cell.summary is None:
            continue
        rows.append(
            {"cell": cell.name, "variant": cell.variant, "seed": cell.seed, "lr": cell.lr}
            | cell.summary.model_dump(
                include={"val_loss", "val_accuracy", "val_accuracy_oracle", "steps", "tokens", "parameters"},
                exclude_none=True,
            )
            | cell.measures.model_dump(include={"val_loss_first_half", "val_loss_second_half"})
        )
        commits.add((RunFolder(cell_folder(folder, cell.name)).environment() or {}).get("commit"))
    machine = {key: results.environment[key] for key in MACHINE if key in results.environment}
    machine |= {"commits": sorted(filter(None, commits)), "cells_at_a_time": results.jobs}
    machine["command"] = f"morex compare {results.study.name}; python benchmarks/study.py STUDY_FOLDER {target}"
    target.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {target}: {len(rows)} of {len(results.cells)} cells")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
