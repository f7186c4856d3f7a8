"""What this machine's processor can do, measured in a few seconds with the matrix sizes of a config."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from morex.config import Config
from morex.loading import ConfigError
from morex.model.count import block_costs
from morex.scaling.activations import Format
from morex.scaling.devices import CPU, Device
from morex.scaling.memory import units_of

SECONDS = 0.5
"""That each quantity is measured for, at least."""
MOST_TOKENS, MOST_EXCHANGED = 4096, 2**26
"""Rows of the matrices, and bytes of an exchange, at most."""
RATES = 4
"""Numbers that a rank measures."""


def this_processor(config: Config, ranks: int, precision: Format) -> Device:
    """This machine's processor as `ranks` processes share it, measured while all of them work.

    Args:
        config: whose sizes the matrix products and exchanges have.
        precision: of the products.

    Raises:
        ConfigError: there are fewer cores than ranks.
    """
    cores = os.cpu_count() or 1
    if ranks > cores:
        raise ConfigError(f"--gpus {ranks} is more than the {cores} cores of this machine; use 1 to {cores}")
    rows = max(1, config.train.batch_size // config.train.accumulation // ranks)
    tokens = min(MOST_TOKENS, rows * config.train.seq_len)
    width = config.model.d_model
    hidden = max(width, round(block_costs(config.model).per_token / 2 / width / 4))
    size = min(MOST_EXCHANGED, 4 * units_of(config.model).core)
    shape = (tokens, width, hidden, size)
    if ranks == 1:
        rates = _rates(shape, precision, 1)
    else:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_rank, (ranks, folder, shape, precision), nprocs=ranks)
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


def _rank(rank: int, ranks: int, folder: str, shape: tuple[int, int, int, int], precision: Format) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    slowest = torch.tensor(_rates(shape, precision, ranks), dtype=torch.float64)
    dist.all_reduce(slowest)
    if rank == 0:
        (Path(folder) / "rates").write_text(" ".join(str(float(number) / ranks) for number in slowest))
    dist.destroy_process_group()


def _rates(shape: tuple[int, int, int, int], precision: Format, ranks: int) -> list[float]:
    """FLOP/s, bytes a second of memory and between ranks, seconds of an exchange of next to nothing."""
    tokens, width, hidden, size = shape
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[precision]
    x, weight, grad = (torch.randn(*sizes).to(dtype) for sizes in ((tokens, width), (hidden, width), (tokens, hidden)))

    def products() -> None:  # of a linear map: forward, and both of the backward pass
        x @ weight.t()
        grad @ weight
        grad.t() @ x

    flops = 6.0 * tokens * width * hidden / _seconds(products)
    a, b = torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    bandwidth = 12.0 * tokens * hidden / _seconds(lambda: torch.add(a, b))
    if ranks == 1:
        return [flops, bandwidth, bandwidth, 0.0]
    latency = _exchange_seconds(1, ranks)
    seconds = max(1e-9, _exchange_seconds(size // 4 // ranks, ranks) - latency)
    return [flops, bandwidth, size * (ranks - 1) / ranks / seconds, latency]


def _exchange_seconds(values: int, ranks: int) -> float:
    part, whole = torch.zeros(values), [torch.empty(values) for _ in range(ranks)]

    def gather() -> None:
        dist.all_gather(whole, part)

    return _seconds(gather, rounds=5)


def _seconds(run: Callable[[], Tensor | None], rounds: int | None = None) -> float:
    """Median of one call."""
    run()
    taken: list[float] = []
    while len(taken) < rounds if rounds is not None else sum(taken) < SECONDS or len(taken) < 3:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]
