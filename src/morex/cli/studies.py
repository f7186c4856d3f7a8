"""`compare` and `bench`: several models side by side."""

from pathlib import Path
from typing import Annotated, Any

import typer

from morex.cli.app import Device, Overrides, app, bench, examples
from morex.cli.terminal import check_choice, check_counts, check_target, console, number, print_table
from morex.loading import ConfigError

PRECISIONS = ("fp32", "bf16", "fp64", "auto")
BENCH_COLUMNS = {
    "preset": "preset",
    "twin": "twin",
    "precision": "precision",
    "tokens_per_s": "tokens/s",
    "flop_ratio": "FLOP ratio\nto twin",
    "time_ratio": "time ratio\nto twin",
    "explained": "explained",
    "unrouted_time_ratio": "time ratio\nto unrouted",
    "fp32_speedup": "times as fast\nas fp32",
    "peak_bytes": "peak memory",
}


@app.command(
    epilog=examples(
        "morex compare demo --out studies/demo",
        "morex compare iso-flop --out studies/iso-flop --set seeds=[0]",
        "morex compare my-study.yaml --out studies/mine --set train.threads=2",
        "morex compare seed-more --out studies/seed-more --jobs 4",
        "morex compare seed-more --out /shared/studies/seed-more --on ray --ray-address HOST:6379",
    )
)
def compare(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study's name, or the path of a YAML file.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of the study; default: studies/<name>.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="Change the study, or a value of every variant; repeatable."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Cells trained at a time; those that share a machine have times that compare less well. Default: one, "
            "on a cluster as many as there is room for."
        ),
    ] = None,
    on: Annotated[
        str, typer.Option(metavar="WHERE", help="Where cells run: local, or ray for a Ray cluster.")
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="HOST:PORT or ray://HOST:PORT of the cluster; default: $RAY_ADDRESS, the Ray that runs here, or a new "
            "one of this machine.",
        ),
    ] = None,
    cell_cpus: Annotated[
        int | None,
        typer.Option(help="CPUs of each cell on a cluster; default: train.threads, or this machine's threads."),
    ] = None,
    retries: Annotated[
        int | None,
        typer.Option(min=0, help="Further tries of a cell whose process or machine fails; default: 0, on a cluster 2."),
    ] = None,
) -> None:
    """Train the models of a study and compare them in a report.

    Cells that are finished are kept, so that an interrupted study goes on where it stopped. The folder then holds
    report.html, table.csv, results.json and the figures. The exit code is 1 where a cell failed.

    On a cluster, put the folder of the study on a file system that all machines share. From machines that do not see
    it, the files of a cell come back as they change.
    """
    check_choice("--on", [on], ("local", "ray"))
    if on == "local":
        for option, value in (("--ray-address", ray_address), ("--cell-cpus", cell_cpus)):
            if value is not None:
                raise ConfigError(f"{option} {value} is for cells on a cluster; add --on ray")
    from morex.study.cluster import Cluster
    from morex.study.compare import compare as run_study
    from morex.study.local import Local

    executor = (
        Local(1 if jobs is None else jobs, retries or 0)
        if on == "local"
        else Cluster(ray_address, cell_cpus, jobs, 2 if retries is None else retries)
    )
    results = run_study(study, out, overrides or [], console=console(stderr=True), executor=executor)
    if any(row.failed for row in results.rows):
        raise typer.Exit(1)


@bench.command(
    name="train",
    epilog=examples(
        "morex bench train more mor-expert",
        "morex bench train more more-tuned --threads 1 --precision fp32 --json speed.json",
        "morex bench train more-tuned --expert-loads 0.4,0.4,0.1,0.1",
        "morex bench train vanilla --threads 2 --precision fp32 --precision bf16 --no-twins",
    ),
)
def bench_train(
    presets: Annotated[list[str], typer.Argument(metavar="PRESET...", help="Presets, or paths of YAML files.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write machine and rows to this file.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences of a step; default: the preset's.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a sequence; default: the preset's.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each model in a round.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds; ratios are taken within a round.")] = 7,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    precision: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="fp32, bf16, fp64 or auto; may be repeated.")
    ] = None,
    twins: Annotated[bool, typer.Option("--twins/--no-twins", help="Also run the dense twins.")] = True,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Also measure peak memory.")] = True,
    loads: Annotated[
        str | None,
        typer.Option("--expert-loads", metavar="A,B,...", help="Share of the work of each expert; default: even."),
    ] = None,
    overrides: Overrides = None,
    device: Device = "auto",
) -> None:
    """Measure training speed beside the dense twins.

    Models take turns in one process, and rows are medians: the FLOP ratio and the time ratio to the twin, how much of
    the time the FLOPs explain, the time ratio to the same model without its router, and peak memory.
    """
    check_counts(("--batch-size", batch_size), ("--seq-len", seq_len), ("--steps", steps), ("--rounds", rounds))
    check_counts(("--threads", threads))
    check_choice("--precision", precision or [], PRECISIONS)
    if json_file is not None:
        check_target("--json", json_file)
    from morex.study.bench import bench_train as measure
    from morex.study.bench import write_json

    rows = measure(
        presets,
        batch_size=batch_size,
        seq_len=seq_len,
        steps=steps,
        rounds=rounds,
        threads=threads,
        precision=precision or ["fp32"],
        twins=twins,
        overrides=overrides or [],
        memory=memory,
        loads=_shares(loads) if loads else None,
        device=device,
        console=console(stderr=True),
    )
    print_table(list(BENCH_COLUMNS.values()), [[_cell(row, key) for key in BENCH_COLUMNS] for row in rows])
    if json_file is not None:
        write_json(json_file, rows)
        console(stderr=True).print(f"wrote {json_file}", style="dim")


def _shares(text: str) -> list[float]:
    """Numbers with commas between."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--expert-loads '{text}' must be numbers with commas between, such as 0.4,0.4,0.1,0.1"
        ) from None


def _cell(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if value is None:
        return "–"
    if key.endswith("ratio") or key in ("explained", "fp32_speedup"):
        return f"{value:.2f}"
    return number(value, short=key == "peak_bytes") if not isinstance(value, str) else value
