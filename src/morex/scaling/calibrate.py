"""What this machine's processor can do, measured in a few seconds with blocks of a config."""

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from morex.config import Config, ModelConfig
from morex.loading import ConfigError
from morex.model.count import count
from morex.model.lm import build_model
from morex.scaling.activations import Format
from morex.scaling.devices import CPU, Device
from morex.scaling.memory import units_of
from morex.scaling.speed import passes_of
from morex.sections.head import LanguageModelHeadConfig
from morex.sections.schedule import ScheduleConfig
from morex.study.twins import unrolled
from morex.train.memory import keep_freed_memory

SECONDS = 1.0
"""That each quantity is measured for, at least."""
MOST_FLOPS, MOST_EXCHANGED = 2e11, 2**26
"""Of a pass through the blocks, and bytes of an exchange, at most."""
BLOCKS, VOCABULARY = 2, 64
"""Of the model that is measured: enough of the first to outweigh the second."""
COLD, LEAST_COLD = 2**28, 2**26
"""Bytes that no cache holds, of all ranks together, and of each at least: what a step reads was written long before."""


def this_processor(config: Config, ranks: int, precision: Format) -> Device:
    """This machine's processor as `ranks` processes share it, measured while all of them work.

    Args:
        config: whose blocks are measured, with the sequences of a microbatch and its exchanges.
        precision: `bf16` is autocast over fp32 weights.

    Raises:
        ConfigError: there are fewer cores than ranks.
    """
    cores = os.cpu_count() or 1
    if ranks > cores:
        raise ConfigError(f"--gpus {ranks} is more than the {cores} cores of this machine; use 1 to {cores}")
    if ranks == 1:
        rates = _rates(config, precision, 1)
    else:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_rank, (ranks, folder, config.to_dict(), precision), nprocs=ranks)
            rates = [float(number) for number in (Path(folder) / "rates").read_text().split()]
    flops, bandwidth, link, latency = rates
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks
    return Device(
        name=CPU,
        flops_bf16=flops,
        flops_fp32=flops,
        memory=memory,
        bandwidth=bandwidth,
        link=link,
        network=link,
        per_node=cores,
        source=f"measured on this machine, {max(1, cores // ranks)} threads a rank",
        matmul_share=1.0,
        bandwidth_share=1.0,
        link_share=1.0,
        latency=latency,
        overlaps=False,
        has_fast_paths=True,
    )


def _rank(rank: int, ranks: int, folder: str, config: dict[str, Any], precision: Format) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    slowest = torch.tensor(_rates(Config.model_validate(config), precision, ranks), dtype=torch.float64)
    dist.all_reduce(slowest)
    if rank == 0:
        (Path(folder) / "rates").write_text(" ".join(str(float(number) / ranks) for number in slowest))
    dist.destroy_process_group()


def _rates(config: Config, precision: Format, ranks: int) -> list[float]:
    """FLOP/s, bytes a second of memory and between ranks, seconds of an exchange of next to nothing."""
    keep_freed_memory()
    bandwidth = _bandwidth(ranks)
    flops = _flops(config, precision, ranks, bandwidth)
    if ranks == 1:
        return [flops, bandwidth, bandwidth, 0.0]
    size = min(MOST_EXCHANGED, 4 * units_of(config.model).core)
    latency = _exchange_seconds(1, ranks)
    seconds = max(1e-9, _exchange_seconds(size // 4 // ranks, ranks) - latency)
    return [flops, bandwidth, size * (ranks - 1) / ranks / seconds, latency]


def _bandwidth(ranks: int) -> float:
    """Of elementwise work on what is in no cache."""
    size = 2**21 // ranks
    parts = [[torch.randn(size) for _ in range(3)] for _ in range(max(COLD // ranks, LEAST_COLD) // (12 * size) + 1)]
    turn = cycle(parts)

    def add() -> None:
        a, b, c = next(turn)
        torch.add(a, b, out=c)

    return 12.0 * size / _seconds(add, at_least=len(parts))


def _flops(config: Config, precision: Format, ranks: int, bandwidth: float) -> float:
    """At which blocks of the model take as long as the closed forms say, with this bandwidth."""
    model, length = _sample(config.model), config.train.seq_len
    per_token = count(model, seq_len=length).train_flops_per_token
    most = max(1, int(MOST_FLOPS / per_token))
    rows = config.train.batch_size // config.train.accumulation // ranks
    rows, length = max(1, min(rows, most // length)), min(length, most)
    blocks = build_model(model).train()
    if precision == "fp64":
        blocks.double()
    tokens = torch.randint(VOCABULARY, (rows, length))

    def passes() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = blocks(tokens, labels=tokens).loss
        assert loss is not None
        loss.backward()

    seconds = _seconds(passes)
    flops, size = passes_of(model, rows, length, precision, has_fast_paths=True)
    return flops / max(seconds / 2, seconds - size / bandwidth)


def _sample(model: ModelConfig) -> ModelConfig:
    """A small model of the same blocks, in which every token takes part."""
    own = {"schedule": ScheduleConfig(layers=BLOCKS), "vocab_size": VOCABULARY, "head": LanguageModelHeadConfig()}
    return unrolled(model).model_copy(update=own)


def _exchange_seconds(values: int, ranks: int) -> float:
    """Of an all-gather of so many values of each rank and of the reduction back, on average."""
    part, whole = torch.zeros(values), torch.zeros(values * ranks)

    def gather() -> None:
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, whole)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 gives them other names, which 2.11 does not know
        return _seconds(gather, rounds=15) / 2


def _seconds(run: Callable[[], Tensor | None], rounds: int | None = None, at_least: int = 3) -> float:
    """Median of one call."""
    run()
    taken: list[float] = []
    while len(taken) < rounds if rounds is not None else sum(taken) < SECONDS or len(taken) < at_least:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]
