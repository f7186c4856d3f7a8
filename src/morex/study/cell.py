"""One cell: `python -m morex.study.cell FOLDER CELL` trains it, or goes on, and measures it."""

import sys
import traceback
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from morex.files import write_json
from morex.loading import ConfigError
from morex.study.measure import measure
from morex.study.plan import PlannedCell, plan
from morex.study.records import Measures
from morex.study.results import MEASURES, cell_folder, failure_path, is_finished, read_study
from morex.study.spec import StudyConfig
from morex.train.errors import DiskFullError, Interrupted, TrainingError
from morex.train.runs import RunFolder
from morex.train.trainer import train

INTERRUPTED = 130
"""Exit code of a cell that a signal has stopped; what was trained is saved."""
WOULD_FAIL_AGAIN = 2
"""Exit code of a cell that failed for a reason that will be there the next time too."""


def run_cell(folder: Path, study: StudyConfig, cell: PlannedCell, console: Console | None = None) -> Measures:
    """Trains a cell, from its newest checkpoint where there is one, and measures it."""
    run = RunFolder(cell_folder(folder, cell.name))
    run.path.parent.mkdir(parents=True, exist_ok=True)
    train(cell.config, run.path, resume=run.is_run(), max_seconds=cell.max_seconds, console=console)
    measures = measure(run, study)
    write_json(run.path / MEASURES, measures.model_dump(mode="json"))
    return measures


def main(arguments: list[str]) -> int:
    """Trains, measures, and returns an exit code.

    0: finished; 1: failed, the sentence is written down; WOULD_FAIL_AGAIN: the same, and another try is of no use;
    INTERRUPTED: stopped, to go on later.
    """
    folder, name = Path(arguments[0]), arguments[1]
    study = read_study(folder)
    cell = next(cell for cell in plan(study).cells if cell.name == name)
    if is_finished(folder, name):
        return 0
    try:
        run_cell(folder, study, cell, Console(width=120))
    except Interrupted as stop:
        print(stop)
        return INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        with suppress(OSError):  # a full disk may not take this either; then the exit code tells
            write_json(failure_path(folder, name), {"cell": name, "error": _sentence(error, folder)})
        is_final = isinstance(error, ConfigError | TrainingError) and not isinstance(error, DiskFullError)
        return WOULD_FAIL_AGAIN if is_final else 1
    return 0


def _sentence(error: Exception, folder: Path) -> str:
    if isinstance(error, DiskFullError):
        return f"no space left on the disk of study folder '{folder}'; free some space and run the study again"
    if isinstance(error, ConfigError | TrainingError):
        return str(error)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
