"""`analyze`: what the routers of a run do."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from morex.cli.app import AsJson, Depth, Device, Overrides, app, examples
from morex.cli.terminal import check_folder, check_target, console, print_json
from morex.loading import ConfigError

if TYPE_CHECKING:
    from morex.analysis.records import Health

COLOURS = {"ok": "green", "warn": "yellow", "info": "default", "none": "dim"}


@app.command(
    epilog=examples(
        "morex analyze runs/first",
        "morex analyze runs/first --tokens 65536 --out analysis",
        "morex analyze runs/first --depth 2 --trace first.npz",
        "morex analyze first.npz --out first",
    )
)
def analyze(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run folder, one of its checkpoint folders, or a trace file.", show_default=False
        ),
    ],
    tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens to look at, the first ones; default: 16384.")
    ] = None,
    depth: Depth = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of the result; default: analysis/ in the run.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write every token's decisions to this .npz file.")
    ] = None,
    overrides: Overrides = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Look at what the routers of a run do, and whether that is healthy.

    Entropies, gates, depths, expert loads, changes of the state, and how they moved in training; analysis.json and
    figures go to the folder. A trace file, which --trace writes, is analysed as far as it goes.
    """
    from morex.analysis import Missing, analyze_trace, to_dict, write
    from morex.analysis import analyze as analyze_run
    from morex.analysis.analyze import TOKENS, folder_for

    folder = folder_for(run) if out is None else out
    check_folder("--out", folder)
    said = console(stderr=True)
    if run.is_file():
        _refuse_with_trace_file({"--tokens": tokens, "--depth": depth, "--trace": trace, "--set": overrides})
        found = analyze_trace(run)
    else:
        if trace is not None:
            check_target("--trace", trace)
        found = analyze_run(run, TOKENS if tokens is None else tokens, depth, trace, device, overrides or [], said)
    draws = has_matplotlib()
    write(found, folder, figures=draws)
    if as_json:
        print_json(to_dict(found))
    else:
        step = "" if found.step is None else f", step {found.step:,}"
        rows = f"{found.windows:,} {'windows' if isinstance(found.accuracy, Missing) else 'examples'}"
        print(f"{found.source}{step}: {found.tokens:,} tokens in {rows}, depth by {found.policy}\n")
        _print_health(found.health)
    if not draws:
        said.print("No figures: matplotlib is not installed; run pip install 'morex[viz]'", style="dim", markup=False)
    said.print(f"Written: {folder}", style="dim", markup=False)


def has_matplotlib() -> bool:
    """Whether figures can be drawn."""
    try:
        return find_spec("matplotlib") is not None
    except ValueError:  # a module that was put out of the way has no spec
        return False


def _refuse_with_trace_file(options: Mapping[str, Any]) -> None:
    """Options that need the weights of a run."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name} is for a run, and a trace file has no model to run; leave it out")


def _print_health(lines: "Sequence[Health]") -> None:
    """A line for each quantity; those without a value together, by the reason."""
    screen = console()
    reasons: dict[str, list[str]] = {}
    for line in lines:
        if line.status == "none":
            reasons.setdefault(line.reason or "", []).append(line.quantity)
        else:
            screen.print(f"{line.status:<5}{line.text}", style=COLOURS[line.status], markup=False, soft_wrap=True)
    for reason, names in reasons.items():
        screen.print(f"none {', '.join(names)}: {reason}", style=COLOURS["none"], markup=False, soft_wrap=True)
