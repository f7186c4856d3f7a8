"""`bench decode` and `bench kv`: the engine's speed and memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from morex.cli.app import Device, Overrides, Tiny, bench, examples
from morex.cli.studies import PRECISIONS
from morex.cli.terminal import check_choice, check_counts, check_target, console, number, print_table
from morex.loading import ConfigError

MODES = ("depthwise", "lockstep", "uniform", "continuous")
DECODE_COLUMNS = {
    "preset": "preset",
    "mode": "mode",
    "concurrency": "requests\nat a time",
    "tokens_per_s": "tokens/s",
    "ratio_to_vanilla": "ratio to\nvanilla",
    "ceiling": "ceiling",
    "share_of_ceiling": "share of\nceiling",
    "mean_depth": "mean\ndepth",
    "ttft_s": "first token, ms\np50 / p95",
    "tpot_s": "each token, ms\np50 / p95",
    "overhead_share": "overhead",
    "kv_bytes_per_token": "KV bytes\na token",
    "core_share": "time in\ncore",
}
KV_COLUMNS = {
    "preset": "preset",
    "kv": "KV rule",
    "mean_depth": "mean\ndepth",
    "kv_bytes_per_token": "bytes a token,\nmeasured",
    "closed_form": "closed\nform",
    "full": "full",
    "of_full": "of full",
    "core_of_full": "core,\nof full",
    "pages": "pages",
    "page_fill": "of these\nused",
    "requests_that_fit": "requests\nthat fit",
    "requests_at_full_depth": "at full\ndepth",
}
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write machine and rows to this file.")
]
Mix = Annotated[
    str | None,
    typer.Option(
        "--depth-mix",
        metavar="W1,...,WR",
        help="Weights of depths 1 to R, forced on the tokens at random; default: as the preset's router aims at.",
    ),
]


@bench.command(
    name="decode",
    epilog=examples(
        "morex bench decode mor-expert",
        "morex bench decode mor-expert --mode depthwise --mode lockstep --concurrency 8 --concurrency 32",
        "morex bench decode mor-expert --cache-requests 8 --depth-mix 2,1,1 --json decode.json",
        "morex bench decode mor-token --arrivals poisson --rate 5 --requests 100",
    ),
)
def bench_decode(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="A preset, or the path of a YAML file.")],
    json_file: JsonFile = None,
    against: Annotated[
        str, typer.Option(metavar="NAME", help="vanilla (the preset's dense twin), another preset, or none.")
    ] = "vanilla",
    modes: Annotated[
        list[str] | None,
        typer.Option(
            "--mode",
            metavar="NAME",
            help="depthwise; lockstep; uniform, lockstep with every token through all recursions; continuous. May be "
            "repeated.",
        ),
    ] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(help="Requests at a time; may be repeated. Default: 8.")
    ] = None,
    cache_bytes: Annotated[
        int | None, typer.Option(help="Of keys and values; default: enough for all requests at full depth.")
    ] = None,
    cache_requests: Annotated[
        list[int] | None,
        typer.Option(help="Instead: memory for so many of the longest requests of --against; may be repeated."),
    ] = None,
    arrivals: Annotated[str, typer.Option(metavar="NAME", help="closed or poisson.")] = "closed",
    rate: Annotated[float | None, typer.Option(help="Poisson arrivals: requests a second.")] = None,
    requests: Annotated[int | None, typer.Option(help="Of each round; default: four times those at a time.")] = None,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="LOW:HIGH", help="Tokens of a prompt: a number, or a range to draw from.")
    ] = "64:256",
    new_tokens: Annotated[int, typer.Option(help="New tokens of each request.")] = 128,
    depth_mix: Mix = None,
    own_router: Annotated[
        bool, typer.Option("--own-router", help="Leave depths to the preset's own router, untrained as it is.")
    ] = False,
    precision: Annotated[str, typer.Option(metavar="NAME", help="fp32, bf16, fp64 or auto.")] = "fp32",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds; ratios are taken within a round.")] = 3,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    tiny: Tiny = False,
    overrides: Overrides = None,
    device: Device = "auto",
) -> None:
    """Measure decoding speed beside a dense model in the same engine.

    Models take turns in one process on the same random prompts, everything inside the clock. Depths are forced, since
    the weights are untrained. The ceiling is what the costs of passes allow at best.
    """
    if own_router and depth_mix is not None:
        raise ConfigError(f"--own-router and --depth-mix {depth_mix} both say how deep tokens go; give one of them")
    if concurrency and cache_requests:
        raise ConfigError("--concurrency and --cache-requests both say how many run at a time; give one of them")
    check_counts(("--concurrency", *(concurrency or ())), ("--cache-requests", *(cache_requests or ())))
    check_counts(("--cache-bytes", cache_bytes), ("--requests", requests), ("--new-tokens", new_tokens))
    check_counts(("--threads", threads), ("--rounds", rounds))
    check_choice("--mode", modes or (), MODES)
    check_choice("--precision", [precision], PRECISIONS)
    check_choice("--arrivals", [arrivals], ("closed", "poisson"))
    _check_rate(arrivals, rate)
    if seed < 0:
        raise ConfigError(f"--seed {seed} must be 0 or more")
    if json_file is not None:
        check_target("--json", json_file)
    from morex.study.bench_decode import DecodePlan
    from morex.study.bench_decode import bench_decode as measure

    plan = DecodePlan(
        preset,
        overrides=overrides or (),
        tiny=tiny,
        against=None if against == "none" else against,
        modes=modes or MODES[:1],
        concurrencies=concurrency or (8,),
        cache_bytes=cache_bytes,
        cache_requests=cache_requests or (),
        rate=rate,
        requests=requests,
        prompt_tokens=_range(prompt_tokens),
        new_tokens=new_tokens,
        depth_mix=_weights(depth_mix),
        own_router=own_router,
        precision=precision,
        threads=threads,
        rounds=rounds,
        device=device,
        seed=seed,
    )
    _report(measure(plan, console(stderr=True)), DECODE_COLUMNS, json_file)


@bench.command(
    name="kv",
    epilog=examples(
        "morex bench kv mor-expert",
        "morex bench kv mor-expert mor-llm-small --kv per_recursion --kv shared_first --json kv.json",
        "morex bench kv recursive --depth 2 --tokens 512 --cache-bytes 1000000000",
    ),
)
def bench_kv(
    presets: Annotated[list[str], typer.Argument(metavar="PRESET...", help="Presets, or paths of YAML files.")],
    json_file: JsonFile = None,
    rules: Annotated[
        list[str] | None,
        typer.Option("--kv", metavar="RULE", help="per_recursion, shared_first or refresh; default: all three."),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences in the store.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    depth: Annotated[
        str | None, typer.Option(metavar="POLICY", help="A fixed depth, such as 2 or uniform:2, in place of a mix.")
    ] = None,
    depth_mix: Mix = None,
    cache_bytes: Annotated[int, typer.Option(help="In which requests of so many tokens are to fit.")] = 1 << 30,
    page_size: Annotated[int, typer.Option(help="Entries of a page.")] = 16,
    precision: Annotated[str, typer.Option(metavar="NAME", help="fp32, bf16 or fp64.")] = "fp32",
    tiny: Tiny = False,
    overrides: Overrides = None,
) -> None:
    """Measure what keys and values take in memory, by KV rule, beside the closed form."""
    check_counts(("--sequences", sequences), ("--tokens", tokens), ("--cache-bytes", cache_bytes))
    check_counts(("--page-size", page_size))
    check_choice("--precision", [precision], [name for name in PRECISIONS if name != "auto"])
    if json_file is not None:
        check_target("--json", json_file)
    from morex.study.bench_kv import bench_kv as measure

    rows = measure(
        presets,
        rules=rules,
        sequences=sequences,
        tokens=tokens,
        depth=depth,
        depth_mix=_weights(depth_mix),
        cache_bytes=cache_bytes,
        page_size=page_size,
        precision=precision,
        tiny=tiny,
        overrides=overrides or [],
        console=console(stderr=True),
    )
    _report(rows, KV_COLUMNS, json_file)


def _report(measured: Iterator[dict[str, Any]], columns: dict[str, str], json_file: Path | None) -> None:
    """Prints and writes rows; after Ctrl-C those that there are."""
    from morex.study.bench import write_json

    rows: list[dict[str, Any]] = []
    try:
        for row in measured:
            rows.append(row)
    finally:
        if rows:
            print_table(list(columns.values()), [[_cell(row, key) for key in columns] for row in rows])
            if json_file is not None:
                write_json(json_file, rows)
                console(stderr=True).print(f"wrote {json_file}", style="dim")


def _cell(row: dict[str, Any], key: str) -> str:
    if key == "core_share":
        return f"{row['seconds']['core'] / sum(row['seconds'].values()):.0%}"
    value = row[key]
    if value is None:
        return "–"
    if isinstance(value, dict):
        return " / ".join(f"{1000 * seconds:.3g}" for seconds in value.values())
    if key in ("overhead_share", "page_fill", "of_full", "core_of_full"):
        return f"{value:.1%}"
    if isinstance(value, float) and key not in ("tokens_per_s", "kv_bytes_per_token", "closed_form", "full"):
        return f"{value:.2f}"
    return number(value) if not isinstance(value, str) else value


def _check_rate(arrivals: str, rate: float | None) -> None:
    if arrivals == "closed" and rate is not None:
        raise ConfigError(f"--rate {rate:g} goes with --arrivals poisson; a closed loop sends as fast as requests end")
    if arrivals == "poisson" and rate is None:
        raise ConfigError("--arrivals poisson needs --rate, the requests a second, such as --rate 5")
    if rate is not None and not 0 < rate < float("inf"):
        raise ConfigError(f"--rate {rate:g} must be a finite number of requests a second above 0")


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low)):
        raise ConfigError(f"--prompt-tokens '{text}' must be a number or a range from 1 on, such as 64:256")
    return int(low), int(high or low)


def _weights(text: str | None) -> list[float] | None:
    """Numbers with commas between."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--depth-mix '{text}' must be numbers with commas between, such as 1,1,1") from None
