"""What `train.compile` gains: time of a training step, compiled and not, and where the time of both goes.

python benchmarks/compiled.py [benchmarks/results/compiled.json [PRESET ...]]

On a CPU with two threads, on a GPU where there is one. Both forms take steps in turn, round by round: medians, ratios
within a round. A profile of one step of each says which share of it is matrix products, which nothing can fuse away:
were all else free, the plain form would be 1 / share times as fast. `compile_seconds` is the first step's time over a
usual one's, with an empty cache of compiled graphs.
"""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters

import morex
from morex.config import Config
from morex.study.bench import Row, paired_ratio, write_json
from morex.study.contender import WARM_UP, Contender, Shape, random_batches
from morex.train.parallel import parallelise
from morex.train.precision import resolve_device
from morex.train.ranks import ALONE

ROUNDS, THREADS, TOP = 7, 2, 8
SHAPES = {"vanilla": (16, 256), "mor-expert": (16, 256), "mor-token": (16, 256), "smollm2-135m": (2, 1024)}
"""Sequences and tokens of a step."""
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")
FUSED = ("_flash_attention", "_efficient_attention", "_scaled_dot_product")
"""Attention whose products are not seen one by one."""


def contender(config: Config, shape: Shape, compiles: bool) -> Contender:
    """A model that takes steps, plain or compiled."""
    found = Contender(config, shape)
    parallelise(found.model, config.train.model_copy(update={"compile": compiles}), ALONE, shape.device.type)
    return found


def profile(model: Contender, batch: torch.Tensor) -> tuple[float, dict[str, float]]:
    """The share of a step that matrix products take, and the shares of what takes most."""
    on_gpu = model.shape.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        model.timed([batch])
    times: dict[str, float] = {}
    for event in found.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name = "compiled graphs" if "CompiledFxGraph" in event.key else event.key.removeprefix("aten::")
        times[name] = times.get(name, 0.0) + spent
    total = sum(times.values())
    products = sum(spent for name, spent in times.items() if name in PRODUCTS or name.startswith(FUSED))
    largest = sorted(times, key=lambda name: -times[name])[:TOP]
    return products / total, {name: times[name] / total for name in largest}


def measure(preset: str, precision: str, device: torch.device) -> Row:
    """The figures of one preset in one number format."""
    config = morex.load_config(preset)
    batch_size, seq_len = SHAPES[preset]
    shape = Shape(batch_size, seq_len, precision, device)
    batches = random_batches(config.model.vocab_size, shape, WARM_UP + ROUNDS)
    torch._dynamo.reset()
    counters.clear()
    models = {"plain": contender(config, shape, False), "compiled": contender(config, shape, True)}
    first = {name: model.timed(batches[:1]) for name, model in models.items()}
    for model in models.values():
        model.timed(batches[1:WARM_UP])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(ROUNDS):
        order = list(models) if number % 2 else list(models)[::-1]
        for name in order:
            seconds[name].append(models[name].timed([batches[WARM_UP + number]]))
    graphs = counters["stats"]["unique_graphs"]
    shares = {name: profile(model, batches[-1]) for name, model in models.items()}
    usual = {name: statistics.median(own) for name, own in seconds.items()}
    return {
        "preset": preset,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "seq_len": seq_len,
        "tokens_per_s": batch_size * seq_len / usual["compiled"],
        "plain_tokens_per_s": batch_size * seq_len / usual["plain"],
        "speedup": paired_ratio(seconds["plain"], seconds["compiled"]),
        "most_speedup": 1 / shares["plain"][0],
        "compile_seconds": first["compiled"] - usual["compiled"],
        "graphs": graphs,
        "plain_profile": shares["plain"][1],
        "compiled_profile": shares["compiled"][1],
    }


def main(path: str = "benchmarks/results/compiled.json", *presets: str) -> None:
    torch.set_num_threads(THREADS)
    rows: list[dict[str, Any]] = []
    for preset in presets or SHAPES:
        for precision in ("fp32", "bf16"):
            with tempfile.TemporaryDirectory() as empty, patch.dict("os.environ", TORCHINDUCTOR_CACHE_DIR=empty):
                rows.append(measure(preset, precision, resolve_device("auto")))
            print(rows[-1])
    write_json(Path(path), rows, ["python", *sys.argv])


if __name__ == "__main__":
    main(*sys.argv[1:])
