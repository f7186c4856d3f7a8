"""Reads a study folder and averages its cells into rows. Nothing here trains or measures; folders are all it sees.

study.yaml              the resolved study
runs/CELL/              a run folder, with cell.json beside its summary once the cell is measured
runs/CELL.failed.json   the sentence that a failed cell ended with
jobs.json               how many cells ran at a time on one machine, where it was more than one
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morex.files import write_json
from morex.loading import ConfigError, validate
from morex.study.plan import Plan, PlannedCell, PlannedVariant, plan
from morex.study.records import (
    Cell,
    Evaluation,
    LearningRate,
    Measures,
    Results,
    Row,
    Summary,
    TrainingPoint,
)
from morex.study.spec import STUDIES, StudyConfig
from morex.train.runs import RunFolder, read_json

MEASURES = "cell.json"
JOBS = "jobs.json"
AVERAGED = (
    "parameters",
    "unique_non_embedding",
    "decode_flops_per_token",
    "kv_bytes_per_token",
    "tokens",
    "train_flops",
    "seconds",
    "tokens_per_s",
    "peak_memory_bytes",
    "final_train_loss",
    "val_loss",
    "val_loss_oracle",
    "bits_per_byte",
    "val_accuracy",
    "val_accuracy_oracle",
)


def read_study(folder: Path) -> StudyConfig:
    """The study of a folder. Raises ConfigError where there is none that can be read."""
    path = folder / "study.yaml"
    if not path.is_file():
        raise ConfigError(f"'{folder}' is not a study folder: it has no study.yaml")
    return validate(StudyConfig, STUDIES.read(path))


def cell_folder(folder: Path, name: str) -> Path:
    """Run folder of a cell."""
    return folder / "runs" / name


def failure_path(folder: Path, name: str) -> Path:
    """Where a failed cell's sentence stands."""
    return folder / "runs" / f"{name}.failed.json"


def is_finished(folder: Path, name: str) -> bool:
    """Whether a cell is trained and measured."""
    run = RunFolder(cell_folder(folder, name))
    return run.summary_path.is_file() and (run.path / MEASURES).is_file()


def note_jobs(folder: Path, jobs: int) -> None:
    """Writes down that `jobs` cells ran at a time on one machine: their times are those of a shared one, for good."""
    if jobs > most_jobs(folder):
        write_json(folder / JOBS, {"jobs": jobs})


def most_jobs(folder: Path) -> int:
    """Most cells of the study that ever ran at a time on one machine."""
    path = folder / JOBS
    return int(read_json(path)["jobs"]) if path.is_file() else 1


def collect(folder: Path, command: str = "") -> Results:
    """Reads every cell of a study folder, finished or not."""
    study = read_study(folder)
    planned = plan(study)
    cells = tuple(_read_cell(folder, cell) for cell in planned.cells)
    results = summarise(study, planned, cells, _environment(folder, planned), command)
    return results.model_copy(update={"jobs": most_jobs(folder)})


def summarise(
    study: StudyConfig, planned: Plan, cells: Sequence[Cell], environment: dict[str, Any], command: str = ""
) -> Results:
    """Averages cells into rows, one per variant, in the order of the study."""
    rows = tuple(
        _row(variant, [cell for cell in cells if cell.variant == variant.name]) for variant in planned.variants
    )
    return Results(
        study=study,
        reference=planned.reference,
        rows=rows,
        cells=tuple(cells),
        configs={variant.name: variant.config.to_dict() for variant in planned.variants},
        environment=environment,
        command=command,
    )


def _read_cell(folder: Path, planned: PlannedCell) -> Cell:
    common: dict[str, Any] = {
        "name": planned.name,
        "variant": planned.variant,
        "seed": planned.seed,
        "lr": planned.lr,
    }
    failure = failure_path(folder, planned.name)
    if failure.is_file():
        return Cell(**common, status="failed", error=str(read_json(failure)["error"]))
    if not is_finished(folder, planned.name):
        return Cell(**common, status="missing")
    run = RunFolder(cell_folder(folder, planned.name))
    summary = run.summary()
    assert summary is not None
    known = {key: summary[key] for key in Summary.model_fields if summary.get(key) is not None}
    return Cell(
        **common,
        status="finished",
        summary=Summary(**known),
        measures=validate(Measures, read_json(run.path / MEASURES)),
        evaluations=tuple(_point(Evaluation, line, summary) for line in run.metrics("eval")),
        training=tuple(_point(TrainingPoint, line, summary) for line in run.metrics("train")),
    )


def _point(kind: type[Any], line: dict[str, Any], summary: dict[str, Any]) -> Any:
    """A metrics line as a record; FLOPs follow from the tokens where a line does not have them."""
    flops = {"flops": line["tokens"] * summary["train_flops_per_token"]} | line
    return kind(**{key: flops[key] for key in kind.model_fields if flops.get(key) is not None})


def _row(variant: PlannedVariant, cells: list[Cell]) -> Row:
    finished = [cell for cell in cells if cell.status == "finished"]
    rates = _learning_rates(cells)
    best = min(
        (rate for rate in rates if rate.first_half is not None), key=lambda rate: rate.first_half or 0.0, default=None
    )
    chosen = [cell for cell in finished if best is None or cell.lr == best.lr]
    row: dict[str, Any] = {
        "name": variant.name,
        "kind": variant.kind,
        "twin_of": variant.twin_of,
        "twin": variant.twin,
        "unrouted": variant.unrouted,
        "seeds": len(chosen),
        "failed": sum(cell.status == "failed" for cell in cells),
        "learning_rates": rates,
    }
    if not chosen or (rates and best is None):
        return Row(**row)
    row["lr"] = chosen[0].lr
    summaries = [cell.summary for cell in chosen if cell.summary is not None]
    row |= {key: _mean([getattr(summary, key) for summary in summaries]) for key in AVERAGED}
    row["train_flops_per_token"] = _mean([summary.train_flops / summary.tokens for summary in summaries])
    losses = [summary.val_loss for summary in summaries]
    if best is not None:
        losses = [
            cell.measures.val_loss_second_half or summary.val_loss
            for cell, summary in zip(chosen, summaries, strict=True)
        ]
        # An oracle loss over all windows does not compare with a loss over half of them.
        row |= {"val_loss": _mean(losses), "val_loss_oracle": None, "bits_per_byte": None}
    row["val_loss_spread"] = spread(losses)
    if any(summary.val_loss_is_oracle for summary in summaries):
        # Without a causal rule there is no loss that compares with the others'.
        row |= {"val_loss": None, "val_loss_spread": None, "bits_per_byte": None, "val_accuracy": None}
    row["decode_tokens_per_s"] = _mean([cell.measures.decode_tokens_per_s for cell in chosen])
    row["mean_depth"] = _mean([cell.measures.routing.mean_depth if cell.measures.routing else None for cell in chosen])
    return Row(**row)


def _learning_rates(cells: list[Cell]) -> tuple[LearningRate, ...]:
    """Each learning rate's losses, where the study compares several; empty otherwise."""
    if not any(cell.measures.val_loss_first_half is not None for cell in cells):
        return ()
    rates = []
    for lr in sorted({cell.lr for cell in cells}):
        same = [cell for cell in cells if cell.lr == lr]
        done = all(cell.status == "finished" for cell in same)
        full = [cell.summary.val_loss for cell in same if cell.summary is not None] if done else []
        rates.append(
            LearningRate(
                lr=lr,
                first_half=_mean([cell.measures.val_loss_first_half for cell in same]) if done else None,
                second_half=_mean([cell.measures.val_loss_second_half for cell in same]) if done else None,
                full=_mean(full),
                full_spread=spread(full),
            )
        )
    return tuple(rates)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None where a value is missing."""
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present and len(present) == len(values) else None


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds, or None for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def _environment(folder: Path, planned: Plan) -> dict[str, Any]:
    for cell in planned.cells:
        found = RunFolder(cell_folder(folder, cell.name)).environment()
        if found is not None:
            return found
    return {}
