"""`compare`: trains the cells of a study and writes what they say.

study.yaml   runs/   results.json   table.csv   report.html   figures/*.png
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from morex.data.source import num_windows, prepare_source
from morex.data.tasks.prepared import PreparedTask
from morex.files import write_json, write_whole
from morex.loading import ConfigError
from morex.study.executor import Executor
from morex.study.findings import findings
from morex.study.local import Local
from morex.study.pictures import write_pictures
from morex.study.plan import Plan, plan
from morex.study.records import Results
from morex.study.report import report_html
from morex.study.results import collect, read_study
from morex.study.runner import run_cells, unfinished
from morex.study.spec import StudyConfig, load_study, studies
from morex.study.table import csv_text, terminal_tables
from morex.train.checkpoint import differences
from morex.train.errors import disk_full_explained
from morex.train.runs import RunFolder

PIPE_WIDTH = 140


def compare(
    study: StudyConfig | str | Path,
    out_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
    output: Console | None = None,
    executor: Executor | None = None,
) -> Results:
    """Runs a study, or what is left of it, and writes its report.

    Args:
        study: a study, the name of a shipped one, or the path of a YAML file.
        out_dir: folder of the study; default `studies/<name>`. The same study goes on there; another is refused.
        overrides: `a.b=value` changes of the study or, with `model.`, `data.`, `train.`, `eval.`, of every variant.
        console: where progress goes; default stderr.
        output: where the table and the findings go; default stdout.
        executor: where cells run and how many at a time; default one at a time on this machine. Where several share a
            machine, their times are those of a shared machine, and the report says so.

    Raises:
        ConfigError: the study, its data, the folder or the executor cannot be used; nothing has been overwritten.
        Interrupted: a signal asked to stop; the same call goes on.
    """
    loaded = study if isinstance(study, StudyConfig) else load_study(study, overrides)
    folder = Path(out_dir) if out_dir is not None else Path("studies") / loaded.name
    console = console or Console(stderr=True)
    executor = executor or Local()
    command = command_of(study, folder, overrides, executor)
    planned = plan(loaded)
    executor.check(loaded, unfinished(folder, planned))
    _require_drawing()
    _refuse_other_use(folder, loaded)
    space = disk_full_explained(f"study folder '{folder}'", lambda: f"go on with `{command}`")
    with space, RunFolder(folder).locked():
        check_data(loaded, planned)
        _claim(folder, loaded)
        run_cells(folder, planned, console, command, executor)
        results = write_report(folder, command)
    print_results(results, folder, output or Console(width=None if Console().is_terminal else PIPE_WIDTH))
    return results


def write_report(folder: Path, command: str = "") -> Results:
    """Reads the cells of a study folder and writes results.json, table.csv, report.html and the figures."""
    results = collect(folder, command)
    results = results.model_copy(update={"findings": findings(results)})
    # Training curves stay in the run folders: results.json is for reading.
    write_json(folder / "results.json", results.model_dump(mode="json", exclude={"cells": {"__all__": {"training"}}}))
    write_whole(folder / "table.csv", csv_text(results))
    write_pictures(results, folder / "figures")
    write_whole(folder / "report.html", report_html(results))
    return results


def print_results(results: Results, folder: Path, output: Console) -> None:
    """Prints the table, the findings and where the report is."""
    for table in terminal_tables(results, output.width):
        output.print(table)
        output.print()
    for sentence in results.findings:
        output.print(f"• {sentence.replace('`', '')}", highlight=False, markup=False)
    output.print(f"\nReport: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def command_of(
    study: StudyConfig | str | Path, folder: Path, overrides: Sequence[str], executor: Executor | None = None
) -> str:
    """The command line that runs or continues the study."""
    source = str(study)
    if isinstance(study, StudyConfig):
        shipped = study.name in studies() and load_study(study.name) == study
        # Whatever it was made from, it stands resolved in its folder.
        source = study.name if shipped else str(folder / "study.yaml")
    words = ["morex", "compare", source, "--out", str(folder)]
    for override in overrides:
        words += ["--set", override]
    return shlex.join(words + (executor.words if executor is not None else []))


def check_data(study: StudyConfig, planned: Plan) -> None:
    """Prepares the data once, so that a fault of data or prompt shows before anything is trained."""
    config = planned.cells[0].config
    data = prepare_source(config)
    if study.learning_rates is not None and num_windows(data.val, config.train.seq_len) < 2:
        more = f"data.val_fraction {config.data.val_fraction:g}"
        if isinstance(data, PreparedTask):
            more = f"data.task.held_out {len(data.val.examples)}"
        raise ConfigError(
            "learning_rates are chosen on the first half of the held-out set, but that is one window or example alone; "
            f"raise {more}"
        )
    if isinstance(data, PreparedTask):
        return
    texts = {"sample.prompt": study.sample.prompt, "report.map_text": study.report.map_text}
    for option, text in texts.items():
        if text is not None and not len(data.tokenizer.encode(text)):
            raise ConfigError(f"{option} '{text}' has no tokens; give at least one character")


def _require_drawing() -> None:
    """Missing packages are better noticed before hours of training than after."""
    from importlib.util import find_spec

    for package in ("plotly", "matplotlib"):
        if find_spec(package) is None:
            raise ConfigError(f"the report needs {package}, which is not installed; run pip install 'morex[viz]'")


def _refuse_other_use(folder: Path, study: StudyConfig) -> None:
    """Raises ConfigError where the folder holds something else; a study of which nothing has run is nothing."""
    if folder.is_file():
        raise ConfigError(f"study folder '{folder}' is a file; name a folder with --out")
    if (folder / "study.yaml").is_file():
        if (folder / "runs").is_dir():
            _refuse_other_study(folder, read_study(folder).to_dict(), study.to_dict())
    elif folder.is_dir() and any(entry.name != ".lock" for entry in folder.iterdir()):
        raise ConfigError(f"folder '{folder}' is not empty and holds no study; name another folder with --out")


def _refuse_other_study(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, there, here in differences(before, now):
        raise ConfigError(
            f"study folder '{folder}' holds another study: its {key} is {there!r} there and {here!r} here; nothing was "
            f"overwritten, name another folder with --out"
        )


def _claim(folder: Path, study: StudyConfig) -> None:
    """Makes the folder this study's."""
    write_whole(folder / "study.yaml", yaml.safe_dump(study.to_dict(), sort_keys=False, allow_unicode=True))
