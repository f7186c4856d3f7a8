"""`plan`: memory, time and cost of a training on many devices, before any of them is rented."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from morex.cli.app import Overrides, app, examples
from morex.cli.terminal import check_target, console, number, print_table
from morex.loading import ConfigError, load_config

if TYPE_CHECKING:
    from morex.config import Config
    from morex.scaling.activations import Format
    from morex.scaling.devices import Device
    from morex.scaling.layouts import Plan

COLUMNS = (
    "GPUs",
    "shards x\ncopies",
    "micro-\nbatches",
    "recompute",
    "core\nunits",
    "memory\na rank",
    "states",
    "gathered",
    "passing",
    "seconds\na step",
    "bound by",
    "exchange\nexposed",
    "FLOP\nutilisation",
    "tokens\na day",
    "days",
    "GPU hours",
)
DEVICE_COLUMNS = (
    "device",
    "bf16\nFLOP/s",
    "fp32\nFLOP/s",
    "memory",
    "bytes/s",
    "link\nbytes/s",
    "network\nbytes/s",
    "GPUs a\nmachine",
)
SUFFIXES = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


@app.command(
    epilog=examples(
        "morex plan mor-llm-medium --gpus 8..64 --set train.batch_size=512",
        "morex plan mor-llm-large --gpus 64 --device h200 --set train.batch_size=1024 --tokens 1T --price 2.5",
        "morex plan mor-expert --gpus 1,2 --device cpu",
        "morex plan --devices",
    )
)
def plan(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="A preset's name, or the path of a YAML file.")
    ] = None,
    gpus: Annotated[
        str, typer.Option(metavar="N|A..B|A,B", help="Devices: a number, a range by powers of two, or a list.")
    ] = "8",
    device: Annotated[
        str, typer.Option(metavar="NAME", help="A device of `--devices`, or cpu: this machine, measured.")
    ] = "h100",
    overrides: Overrides = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens to train on, such as 300B; default: the config's steps.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Of a device for an hour; adds a column of costs.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the plans to this file.")
    ] = None,
    devices: Annotated[bool, typer.Option("--devices", help="List the known devices and their sources.")] = False,
) -> None:
    """Plan a training on many devices: memory, time, cost, and the layout that suits.

    For each number of devices, the fastest way to divide model and batch that fits: over how many of them a copy of the
    weights is divided (train.shards), in how many microbatches a step is computed (train.accumulation), whether steps
    or recursions are computed again (train.recompute), and what is gathered of the core at a time (train.core_units).
    The batch is that of the config, train.batch_size sequences of train.seq_len tokens a step. All numbers are closed
    forms; docs/scaling.md has them and what they assume.
    """
    if devices:
        _print_devices()
        return
    if config is None:
        raise ConfigError("a config is missing: name a preset or a YAML file, such as `morex plan mor-llm-medium`")
    if json_file is not None:
        check_target("--json", json_file)
    if price is not None and not price >= 0:
        raise ConfigError(f"--price {price} must be 0 or more")
    wanted, target = numbers_of(gpus), None if tokens is None else tokens_of(tokens)
    settings = load_config(config, overrides or [])
    train = settings.train
    if target is None:
        target = float(train.steps * train.batch_size * train.seq_len)
    found, refused = _plans(settings, wanted, device)
    if not found:
        raise ConfigError(refused[wanted[-1]])
    _print_plans(found, refused, target, price)
    _print_model(settings, found[0])
    if json_file is not None:
        _write(json_file, settings, found, refused, target, price)


def numbers_of(text: str) -> list[int]:
    """`8`, `8,16` or `8..64`, by powers of two from the first on. Raises ConfigError for anything else."""
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", text.replace(" ", ""))
    listed = re.fullmatch(r"\d+(,\d+)*", text.replace(" ", ""))
    if ends is None and listed is None:
        raise ConfigError(f"--gpus '{text}' must be a number such as 8, a range such as 8..4096 or a list such as 8,24")
    numbers = [int(part) for part in re.findall(r"\d+", text)]
    if min(numbers) < 1:
        raise ConfigError(f"--gpus '{text}' must be 1 or more")
    if ends is None:
        return sorted(set(numbers))
    first, last = numbers
    if last < first:
        raise ConfigError(f"--gpus '{text}' must not fall; use {last}..{first}")
    found = [first]
    while found[-1] * 2 <= last:
        found.append(found[-1] * 2)
    return found


def tokens_of(text: str) -> float:
    """`300B` as a number. Raises ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kMGBT]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--tokens '{text}' must be a number of tokens, such as 300B or 1.5T")
    return float(match[1]) * SUFFIXES[match[2]]


def _plans(config: "Config", wanted: list[int], name: str) -> tuple[list["Plan"], dict[int, str]]:
    """The best plan for each number of devices, and where there is none, why."""
    from morex.scaling.devices import CPU, find_device
    from morex.scaling.layouts import plan as best
    from morex.scaling.layouts import refuse_uneven

    known = None if name == CPU else find_device(name)
    precision = _precision(config, name == CPU)
    found, refused = [], {}
    for ranks in wanted:
        try:
            refuse_uneven(config, ranks)
            found.append(best(config, ranks, known or _measured(config, ranks, precision), precision))
        except ConfigError as error:
            refused[ranks] = str(error)
    return found, refused


def _precision(config: "Config", on_cpu: bool) -> "Format":
    """Number format of a training on the device; every known GPU has units for bf16, and is as fast in fp16."""
    asked = config.train.precision
    if asked != "auto":
        return "bf16" if asked == "fp16" else asked
    if not on_cpu:
        return "bf16"
    import torch

    from morex.train.precision import resolve_precision

    return cast("Format", resolve_precision("auto", torch.device("cpu"), config.model.d_model))


def _measured(config: "Config", ranks: int, precision: "Format") -> "Device":
    from morex.scaling.calibrate import this_processor

    with console(stderr=True).status(f"measuring this machine for {ranks} ranks"):
        return this_processor(config, ranks, precision)


def _print_plans(found: list["Plan"], refused: dict[int, str], target: float, price: float | None) -> None:
    columns = [*COLUMNS, *(["cost"] if price is not None else [])]
    print_table(columns, [_row(one, target, price) for one in found])
    for ranks, reason in refused.items():
        print(f"{ranks}: {reason}.")


def _row(one: "Plan", target: float, price: float | None) -> list[str]:
    held, took, layout = one.memory, one.time, one.layout
    hours = one.hours(target)
    row = [
        f"{layout.ranks:,}",
        f"{layout.shards} x {layout.copies}",
        str(layout.accumulation),
        layout.recompute,
        "blocks" if layout.has_block_units else "core",
        *(f"{number(size, short=True)}B" for size in (held.peak, held.states, held.gathered, held.passing)),
        f"{took.seconds:.3g}",
        took.bound,
        f"{took.exposed / took.seconds:.0%}",
        f"{one.utilisation:.0%}",
        number(one.tokens_per_day, short=True),
        number(target / one.tokens_per_day),
        number(hours, short=True),
    ]
    return [*row, number(hours * price, short=True)] if price is not None else row


def _print_model(config: "Config", one: "Plan") -> None:
    """A line on the batch, and one on what a served sequence takes."""
    from morex.model.count import count

    train, size = config.train, 4 if one.precision == "fp32" else 2
    counts = count(config.model, seq_len=train.seq_len, bytes_per_value=size)
    print(
        f"Steps of {train.batch_size:,} x {train.seq_len:,} = {one.step_tokens:,} tokens in {one.precision} on "
        f"{one.device.name}."
    )
    if not counts.kv_bytes_per_token:
        return
    length = config.model.max_seq_len
    sequence = counts.kv_bytes_per_token * length
    room = one.device.usable * one.device.memory - size * counts.parameters
    beside = f"{max(0, int(room // sequence)):,} sequences" if room > 0 else "no sequence"
    print(
        f"Inference: a sequence of {length:,} tokens has {number(sequence, short=True)}B of keys and values; beside "
        f"weights of {8 * size} bits {beside} fit one device."
    )


def _print_devices() -> None:
    from morex.scaling.devices import DEVICES

    rows = []
    for one in DEVICES.values():
        numbers = (one.flops_bf16, one.flops_fp32, one.memory, one.bandwidth, one.link, one.network)
        rows.append([one.name, *(number(value, short=True) for value in numbers), str(one.per_node)])
    print_table(DEVICE_COLUMNS, rows)
    for one in DEVICES.values():
        print(f"{one.name}: {one.source}.")
    print("cpu: this machine, measured when it is asked for.")


def _write(
    path: Path, config: "Config", found: list["Plan"], refused: dict[int, str], target: float, price: float | None
) -> None:
    from morex.files import write_json
    from morex.scaling.layouts import as_row

    rows: list[dict[str, Any]] = []
    for one in found:
        row = as_row(one, target)
        rows.append(row if price is None else row | {"cost": row["gpu_hours"] * price})
    plain = config.to_dict()
    write_json(
        path,
        {
            "model": plain["model"],
            "batch_size": config.train.batch_size,
            "seq_len": config.train.seq_len,
            "target_tokens": target,
            "rows": rows,
            "refused": [{"gpus": ranks, "reason": reason} for ranks, reason in refused.items()],
        },
    )
    console(stderr=True).print(f"wrote {path}", style="dim")
