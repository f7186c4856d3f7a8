"""Training speed of presets beside their dense twins: interleaved steps in one process, medians of paired rounds.

"Explained" is the FLOP ratio over the time ratio of a preset to its twin: 1.0 means that all of the difference is
arithmetic. FLOPs come from closed forms without padding, with the shares of active tokens that were measured. The twin
of a model with recursions is its unrolled dense form, of one with experts the same model with the mixer `swiglu`; a
depth-routed model is also set against the same model without its router.
"""

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from morex import files
from morex.config import Config, ModelConfig
from morex.loading import ConfigError, load_config
from morex.model.count import count
from morex.sections.mixers import FeedForwardConfig
from morex.study.contender import WARM_UP, Contender, Shape, random_batches
from morex.study.twins import bench_twin, unrouted
from morex.train.memory import PeakMemory
from morex.train.precision import resolve_device, resolve_precision
from morex.train.runs import environment
from morex.train.setup import cpu_threads

LARGEST_BATCH = 32
"""A preset's own microbatch is measured up to this size; a larger one is taken as 8."""
MEMORY_STEPS = 3
Row = dict[str, Any]


@dataclass
class Match:
    """A preset, its twin and its unrouted form, where it has them, with the seconds of each round."""

    preset: str
    contenders: dict[str, Contender]
    seconds: dict[str, list[float]] = field(default_factory=dict)


def bench_train(
    names: Sequence[str],
    batch_size: int | None = None,
    seq_len: int | None = None,
    steps: int = 2,
    rounds: int = 7,
    threads: int = 1,
    precision: str | Sequence[str] = "fp32",
    twins: bool = True,
    overrides: Sequence[str] = (),
    memory: bool = True,
    loads: Sequence[float] | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> list[Row]:
    """Measures training steps of presets and their twins.

    Args:
        names: presets or YAML files.
        batch_size: sequences of a step; default: the preset's own microbatch, or 8 where that is more than 32.
        seq_len: tokens of a sequence; default: the preset's own.
        steps: optimizer steps of each model in a round.
        rounds: rounds; each model goes once in each, and ratios are taken within a round.
        threads: CPU threads.
        precision: `fp32`, `bf16`, `fp64`, `auto`, or several of them.
        twins: also run the dense twin and, for routed models, the unrouted form.
        overrides: `a.b=value` changes of every preset.
        memory: also measure peak memory, in a process of its own per preset.
        loads: share of the work of each expert; default: even.

    Returns:
        One row per preset and precision, see `_row`.

    Raises:
        ConfigError: an unknown preset, key, device or precision, or loads that no router could have.
    """
    place = resolve_device(device)
    wanted = [precision] if isinstance(precision, str) else list(precision)
    configs = {name: load_config(name, overrides) for name in names}
    for name, config in configs.items():
        check_loads(name, config.model, loads)
    if loads and all(given_loads(config.model, loads) is None for config in configs.values()):
        raise ConfigError(f"expert loads {list(loads)} go with presets that have experts, not {', '.join(configs)}")
    rows = []
    console = console or Console(quiet=True)
    with cpu_threads(threads):
        for name, config in configs.items():
            for kind in wanted:
                shape = _shape(config, batch_size, seq_len, resolve_precision(kind, place, config.model.d_model), place)
                console.print(
                    f"{name}: {shape.batch_size} x {shape.seq_len} tokens, {shape.precision}", highlight=False
                )
                match = _race(name, config, shape, steps, rounds, twins, loads)
                row = _row(match, shape, threads, steps) | {"expert_loads": given_loads(config.model, loads)}
                del match
                row["peak_bytes"] = _peak_bytes(name, overrides, shape, threads, loads) if memory else None
                rows.append(row)
            _compare_precisions(rows[-len(wanted) :])
    return rows


def machine(device: str = "auto") -> dict[str, Any]:
    """What the figures were measured on."""
    return environment(resolve_device(device))


def write_json(path: str | Path, rows: Sequence[Row], command: Sequence[str] | None = None) -> None:
    """Writes {"machine": ..., "rows": ...} with the command that measured them."""
    words = ["morex", *sys.argv[1:]] if command is None else list(command)
    files.write_json(Path(path), {"machine": {**machine(), "command": shlex.join(words)}, "rows": list(rows)})


def _shape(config: Config, batch_size: int | None, seq_len: int | None, precision: str, device: torch.device) -> Shape:
    own = config.train.batch_size // config.train.accumulation
    return Shape(batch_size or (own if own <= LARGEST_BATCH else 8), seq_len or config.train.seq_len, precision, device)


def _race(
    name: str, config: Config, shape: Shape, steps: int, rounds: int, twins: bool, loads: Sequence[float] | None
) -> Match:
    """Rounds in which each model takes its steps once, in an order that turns from round to round."""
    models: dict[str, ModelConfig | None] = {"preset": config.model}
    if twins:
        models |= {"twin": bench_twin(config.model), "unrouted": unrouted(config.model)}
    contenders = {
        role: Contender(config.model_copy(update={"model": model}), shape, loads)
        for role, model in models.items()
        if model is not None
    }
    match = Match(name, contenders, {role: [] for role in contenders})
    batches = random_batches(config.model.vocab_size, shape, WARM_UP + rounds * steps)
    for contender in contenders.values():
        for batch in batches[:WARM_UP]:
            contender.step(batch)
    order = list(contenders)
    for number in range(rounds):
        first = WARM_UP + number * steps
        for role in order[number % len(order) :] + order[: number % len(order)]:
            match.seconds[role].append(contenders[role].timed(batches[first : first + steps]))
    return match


def given_loads(model: ModelConfig, loads: Sequence[float] | None) -> list[float] | None:
    """Loads that the experts of a model are measured under; None without experts."""
    if isinstance(model.mixer, FeedForwardConfig):
        return None
    experts = model.mixer.router.experts
    return list(loads) if loads else [1 / experts] * experts


def check_loads(name: str, model: ModelConfig, loads: Sequence[float] | None) -> None:
    """Raises ConfigError where a model's experts cannot have these loads."""
    given = given_loads(model, loads)
    if given is None:
        return
    assert not isinstance(model.mixer, FeedForwardConfig)
    router = model.mixer.router
    if len(given) != router.experts:
        raise ConfigError(f"expert loads {given} name {len(given)} experts, but '{name}' has {router.experts}")
    if not (abs(sum(given) - 1) <= 1e-6 and min(given) >= 0 and max(given) <= 1 / router.top_k + 1e-9):
        raise ConfigError(
            f"expert loads {given} must be 0 or more and sum to 1, each at most 1/{router.top_k}: a token of '{name}' "
            f"visits {router.top_k} different experts"
        )


def _row(match: Match, shape: Shape, threads: int, steps: int) -> Row:
    """The figures of one preset.

    preset, twin (its name, or that of a dense preset itself), precision, threads, batch_size, seq_len, parameters,
    tokens_per_s, twin_tokens_per_s, time_ratio and flop_ratio to the twin, explained, unrouted_time_ratio (to the model
    without its router; below 1 is faster), active_shares, and peak_bytes above the start of the process.
    """
    preset = match.contenders["preset"]
    tokens = shape.batch_size * shape.seq_len * steps
    row: Row = {
        "preset": match.preset,
        "twin": match.preset,
        "precision": shape.precision,
        "threads": threads,
        "batch_size": shape.batch_size,
        "seq_len": shape.seq_len,
        "parameters": count(preset.config.model).parameters,
        "tokens_per_s": tokens / preset.typical(match.seconds["preset"]),
        "twin_tokens_per_s": None,
        "time_ratio": 1.0,
        "flop_ratio": 1.0,
        "explained": 1.0,
        "unrouted_time_ratio": None,
        "active_shares": preset.shares(),
        "peak_bytes": None,
    }
    if "twin" in match.contenders:
        twin = match.contenders["twin"]
        flop_ratio = preset.flops_per_token() / twin.flops_per_token()
        time_ratio = _time_ratio(match, "twin")
        row |= {
            "twin": twin_name(preset.config.model, twin.config.model),
            "twin_tokens_per_s": tokens / preset.typical(match.seconds["twin"]),
            "time_ratio": time_ratio,
            "flop_ratio": flop_ratio,
            "explained": flop_ratio / time_ratio,
        }
    elif bench_twin(preset.config.model) is not None:
        row |= {"twin": None, "time_ratio": None, "flop_ratio": None, "explained": None}
    if "unrouted" in match.contenders:
        row["unrouted_time_ratio"] = _time_ratio(match, "unrouted")
    return row


def _compare_precisions(rows: Sequence[Row]) -> None:
    """Adds `fp32_speedup` to the rows of one preset: tokens/s over those in fp32, where both were measured."""
    plain = next((row["tokens_per_s"] for row in rows if row["precision"] == "fp32"), None)
    for row in rows:
        compared = plain is not None and row["precision"] != "fp32"
        row["fp32_speedup"] = row["tokens_per_s"] / plain if compared else None


def _time_ratio(match: Match, other: str) -> float:
    """Of the preset to another contender."""
    preset, own, others = match.contenders["preset"], match.seconds["preset"], match.seconds[other]
    return preset.typical(own) / preset.typical(others) if preset.draws else paired_ratio(own, others)


def paired_ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round, which a machine that slows down leaves alone."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def twin_name(model: ModelConfig, twin: ModelConfig) -> str:
    """What the twin is, in a few words: `unrolled`, `swiglu`, or both."""
    parts = []
    if twin.schedule != model.schedule:
        parts.append("unrolled")
    if twin.mixer != model.mixer:
        parts.append("swiglu")
    return " ".join(parts)


def _peak_bytes(name: str, overrides: Sequence[str], shape: Shape, threads: int, loads: Sequence[float] | None) -> int:
    """Peak memory of a few steps above the start, in a process of its own so that nothing else adds to it."""
    request = {
        "preset": name,
        "overrides": list(overrides),
        "batch_size": shape.batch_size,
        "seq_len": shape.seq_len,
        "precision": shape.precision,
        "device": str(shape.device),
        "threads": threads,
        "loads": loads,
    }
    done = subprocess.run(
        [sys.executable, "-m", "morex.study.bench", json.dumps(request)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the memory of {name} could not be measured:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def _measure_peak(request: dict[str, Any]) -> int:
    config = load_config(request["preset"], request["overrides"])
    device = torch.device(request["device"])
    shape = Shape(request["batch_size"], request["seq_len"], request["precision"], device)
    with cpu_threads(request["threads"]):
        batches = random_batches(config.model.vocab_size, shape, MEMORY_STEPS)
        memory = PeakMemory(device)
        contender = Contender(config, shape, request["loads"])
        for batch in batches:
            contender.step(batch)
        return memory.bytes()


if __name__ == "__main__":
    print(_measure_peak(json.loads(sys.argv[1])))
