"""Accuracy of a study's models by recursions and by difficulty, also beyond what they were trained on.

    python benchmarks/depth.py STUDY_FOLDER benchmarks/results/NAME.json [--deepest 12] [--difficulty 1:8]

Models that take any number of recursions are measured at 1 to `--deepest`, all others at their own depth.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from morex.eval.loss import depths_to_measure
from morex.loading import ConfigError
from morex.model.lm import takes_any_depth
from morex.study.results import cell_folder, collect
from morex.train.opening import evaluate_by, open_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--deepest", type=int, default=12)
    parser.add_argument("--difficulty", metavar="LOW:HIGH", help="default: that of the study's own evaluation")
    options = parser.parse_args()
    results, rows, commits = collect(options.study), [], set()
    overrides = [f"data.task.eval_difficulty=[{options.difficulty.replace(':', ',')}]"] if options.difficulty else []
    for cell in results.cells:
        if cell.summary is None:
            continue
        opened = open_run(cell_folder(options.study, cell.name), overrides)
        model = opened.config.model
        depths = depths_to_measure(model, options.deepest) if takes_any_depth(model) else []
        for depth in depths or [None]:
            found = evaluate_by(opened.config, opened.model, opened.data.val, depth)
            if found.scores is None:
                raise ConfigError(f"'{options.study}' is a study on text, which has no accuracy; give one of a task")
            trained = model.schedule.resolved.recursions
            row = {"variant": cell.variant, "seed": cell.seed, "recursions": depth, "trained_recursions": trained}
            rows.append(row | {"loss": found.loss, **asdict(found.scores)})
        commits.add((opened.run.environment() or {}).get("commit"))
        print(f"{cell.name}: {len(depths) or 1} depths")
    machine = {key: results.environment[key] for key in ("versions", "platform", "cpu") if key in results.environment}
    machine |= {"commits": sorted(filter(None, commits)), "study": results.study.name}
    machine["command"] = f"python benchmarks/depth.py STUDY_FOLDER {options.target} --deepest {options.deepest}"
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = f'{{"machine": {json.dumps(machine, indent=1)},\n"rows": [\n{lines}\n]}}\n'
    options.target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
