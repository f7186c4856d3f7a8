"""`runs` and `export`: what there is in run folders, and their weights for others."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from morex.cli.app import AsJson, RunFolder, app, examples
from morex.cli.terminal import number, print_json, print_table

COLUMNS = ("run", "status", "step", "of", "loss", "held-out loss", "tokens/s", "anomalies", "last sign of life")


@app.command(epilog=examples("morex runs", "morex runs /shared/runs --json"))
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where to look, and below.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder: how far they are, and whether they are alive.

    A run is finished, training, stopped (go on with `morex train --resume`), silent (no sign of life: killed, or it
    hangs) or damaged.
    """
    from morex.train.listing import list_runs

    found = list_runs(folder)
    if as_json:
        print_json([asdict(run) for run in found])
        return
    rows = []
    for run in found:
        sign = "" if run.heartbeat_age is None else f"{run.heartbeat_age:,.0f} s ago on {run.host}"
        cells = (run.step, run.steps, run.loss, run.val_loss, run.tokens_per_s, run.anomalies or None)
        rows.append([run.path, run.status, *("" if cell is None else number(cell) for cell in cells), sign])
    print_table(COLUMNS, rows)


@app.command(
    epilog=examples(
        "morex export runs/first --out first.safetensors",
        "morex export runs/first/checkpoints/step-500 --out half.safetensors --format bf16",
    )
)
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the weights go.")],
    number_format: Annotated[
        str | None,
        typer.Option("--format", metavar="NAME", help="fp32, bf16, fp16 or fp64; default: that of the checkpoint."),
    ] = None,
) -> None:
    """Write the weights of a run to one safetensors file.

    Names are those of the model; its config stands in the file's metadata as JSON. A checkpoint of any number of ranks
    becomes one file.
    """
    from morex.train.export import export_weights

    size = export_weights(run, out, number_format)
    print(f"{out}: {size:,} bytes")
