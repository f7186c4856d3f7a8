"""What the routers of a study's models do: every quantity of `morex analyze`, its mean over layers and recursions.

    python benchmarks/routing.py STUDY_FOLDER benchmarks/results/NAME-routing.json

Models without a router are left out.
"""

import argparse
import json
import sys
from pathlib import Path

from morex.analysis import Analysis, analyze
from morex.analysis.health import QUANTITIES
from morex.analysis.records import Missing
from morex.study.results import cell_folder, collect
from morex.train.runs import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    results, rows, commits = collect(options.study), [], set()
    for cell in results.cells:
        if cell.summary is None:
            continue
        run = cell_folder(options.study, cell.name)
        found = analyze(run)
        if found.model["depth"]["kind"] == "fixed" and not found.layers:
            continue
        row = {"variant": cell.variant, "seed": cell.seed, "lr": cell.lr, "tokens": found.tokens}
        rows.append(row | {"policy": found.policy, "quantities": quantities(found)})
        commits.add((RunFolder(run).environment() or {}).get("commit"))
        print(cell.name)
    machine = {key: results.environment[key] for key in ("versions", "platform", "cpu") if key in results.environment}
    machine |= {"commits": sorted(filter(None, commits)), "study": results.study.name}
    machine["command"] = f"python benchmarks/routing.py STUDY_FOLDER {options.target}"
    options.target.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def quantities(analysis: Analysis) -> dict[str, dict[str, float]]:
    """Mean, lowest and highest of each quantity over its layers, recursions or classes."""
    found = {}
    for quantity in QUANTITIES:
        values = [value for value in quantity.values(analysis).values() if not isinstance(value, Missing)]
        if values:
            mean = sum(values) / len(values)
            found[quantity.name] = {"mean": mean, "low": min(values), "high": max(values), "places": len(values)}
    return found


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
