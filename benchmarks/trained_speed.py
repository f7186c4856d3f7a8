"""Seconds that passes of a study's trained models take, in turns, at the depths that they have learned.

    python benchmarks/trained_speed.py STUDY_FOLDER benchmarks/results/NAME.json CELL [CELL ...] [--rounds 5]

A pass in training is forward and backward, one in evaluation forward alone by the rule of decoding; both go over
batches of the training text, and no optimizer step moves the weights. The first cell is what the others are set
against.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from morex.data.loader import Batch
from morex.data.source import training_loader
from morex.model.count import count
from morex.study.results import cell_folder, collect
from morex.train.opening import OpenRun, open_run
from morex.train.runs import environment

PASSES = 4
"""Batches of a round; as many before the first one warm up."""


class Trained:
    """A trained model and what its passes took."""

    def __init__(self, name: str, opened: OpenRun) -> None:
        self.name, self.config, self.model = name, opened.config, opened.model
        self.seconds: dict[str, list[float]] = {"training": [], "evaluation": []}
        self.shares: list[tuple[float, ...]] = []

    def round(self, batches: list[Batch]) -> None:
        """Goes over the batches twice."""
        for mode, seconds in self.seconds.items():
            self.model.train(mode == "training")
            started = time.perf_counter()
            for batch in batches:
                with torch.set_grad_enabled(mode == "training"):
                    out = self.model(batch.tokens, labels=batch.labels)
                if mode == "training":
                    assert out.loss is not None
                    out.loss.backward()
                    self.model.zero_grad(set_to_none=True)
                    if out.stats.active_shares is not None:
                        self.shares.append(out.stats.active_shares)
            seconds.append(time.perf_counter() - started)

    def row(self, first: "Trained") -> dict[str, Any]:
        """Medians over the rounds, and FLOPs by the closed form at the measured shares."""
        means = tuple(map(statistics.fmean, zip(*self.shares, strict=True))) or None
        found = count(self.config.model, seq_len=self.config.train.seq_len, shares=means)
        row: dict[str, Any] = {"cell": self.name, "active_shares": means}
        row["training_flops_per_token"] = found.train_flops_per_token
        for mode, seconds in self.seconds.items():
            row[f"{mode} seconds"] = statistics.median(seconds)
            ratios = [a / b for a, b in zip(seconds, first.seconds[mode], strict=True)]
            row[f"{mode} time ratio"] = statistics.median(ratios)
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("cells", nargs="+", help="names of the folders in STUDY_FOLDER/runs")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} must be 1 or more")
    torch.set_num_threads(1)
    opened = [open_run(cell_folder(options.study, name)) for name in options.cells]
    models = [Trained(name, run) for name, run in zip(options.cells, opened, strict=True)]
    loader = training_loader(opened[0].data, opened[0].config)
    batches = [loader.next_batch() for _ in range(PASSES)]
    for model in models:
        model.round(batches)
        model.seconds, model.shares = {mode: [] for mode in model.seconds}, []
    for done in range(options.rounds):
        for model in models:
            model.round(batches)
        print(f"round {done + 1} of {options.rounds}", flush=True)
    rows = [model.row(models[0]) for model in models]
    for row in rows:
        row["flop ratio"] = row["training_flops_per_token"] / rows[0]["training_flops_per_token"]
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    words = " ".join(["STUDY_FOLDER", str(options.target), *options.cells, f"--rounds {options.rounds}"])
    machine = environment(torch.device("cpu")) | {"study": collect(options.study).study.name, "threads": 1}
    machine["command"] = f"python benchmarks/trained_speed.py {words}"
    options.target.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
