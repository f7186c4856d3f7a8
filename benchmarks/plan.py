"""How well `morex plan` foresees memory and time: predicted over measured, on this machine's processor.

python benchmarks/plan.py [benchmarks/results/plan.json [memory | selective]]

Width 256, fp32, a step of 8 x 256 tokens on 1 and 2 ranks, with and without steps that are computed again. Weights,
gradients and optimizer state are those of the tensors that a rank holds; kept bytes are the storages that a forward
pass saves; the peak is what torch's allocator has held at most in a step. Times are medians, predicted from what the
processor could do before and after; the machine should have nothing else to do. With `memory` none are taken; with
`selective` that way to compute again is compared alone, else all others.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.profiler import ProfilerActivity, profile

import morex
from morex.config import Config
from morex.model.lm import LanguageModel
from morex.nn import ranks as together
from morex.scaling.activations import Recompute
from morex.scaling.calibrate import this_processor
from morex.scaling.devices import DEVICES, Device
from morex.scaling.layouts import Plan, evaluate, ways
from morex.scaling.memory import Layout
from morex.study.bench import write_json
from morex.train.memory import keep_freed_memory
from morex.train.optim import build_optimizer
from morex.train.parallel import exchange_gradients, gradient_norm, parallelise
from morex.train.ranks import Ranks

STEPS, WARM = 9, 3
SIZES = ["model.d_model=256", "model.vocab_size=4096", "model.max_seq_len=256", "train.batch_size=8"]
SIZES += ["train.seq_len=256", "train.precision=fp32"]
MODELS: dict[str, tuple[str, list[str]]] = {
    "vanilla": ("vanilla", []),
    "recursive": ("recursive", []),
    "mor-expert": ("mor-expert", []),
    "mor-expert in 2 microbatches": ("mor-expert", ["train.accumulation=2"]),
    "mor-expert, core by block": ("mor-expert", ["train.core_units=blocks"]),
    "mor-expert, core by block, in 2 microbatches": ("mor-expert", ["train.core_units=blocks", "train.accumulation=2"]),
    "mor-token": ("mor-token", []),
    "moe": ("vanilla", ["model.schedule.layers=4", "model.mixer={kind: moe, router: {experts: 4, top_k: 2}}"]),
    "recursive experts": ("more-tuned", ["model.attention={heads: 4}"]),
}


UNMEASURED = replace(DEVICES["h100"], has_fast_paths=True)
"""Stands for the processor where no times are taken."""


def measure(rank: int, ranks: int, folder: str, preset: str, overrides: list[str], timed: bool) -> None:
    """What one rank holds and how long its steps take, written down by the first."""
    config = morex.load_config(preset, overrides)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    torch.manual_seed(rank)
    keep_freed_memory()
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    with together.together():
        found = measured(config, Ranks(rank, ranks), timed)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    if ranks > 1:
        dist.destroy_process_group()


def measured(config: Config, ranks: Ranks, timed: bool) -> dict[str, float]:
    train = config.train
    model = morex.build_model(config.model).train()
    parallelise(model, train, ranks, "cpu")
    optimizer = build_optimizer(model, train)
    shape = (train.accumulation, train.batch_size // train.accumulation // ranks.size, train.seq_len)
    batches = torch.randint(1, config.model.vocab_size, shape)
    found: dict[str, float] = {}

    def step() -> None:
        for number, tokens in enumerate(batches, start=1):
            exchange_gradients(model, number == train.accumulation)
            out = model(tokens, labels=tokens)  # which holds the logits, as in training
            assert out.loss is not None
            (out.loss / train.accumulation).backward()
        gradient_norm(model, train.clip)
        if not found:
            found["gradients"] = sum(local_bytes(p.grad) for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(WARM):
        step()
    found["parameters"] = sum(map(local_bytes, model.parameters()))
    moments = (value for state in optimizer.state.values() for value in state.values())
    found["optimizer"] = sum(local_bytes(value) for value in moments if value.dim())
    if train.recompute != "selective":  # which keeps results where no hook of autograd sees them
        found["kept"] = kept_bytes(model, batches[0])
    found["peak"] = found["parameters"] + found["optimizer"] + allocated_at_most(step)
    if not timed:
        return found
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return found | {"seconds": statistics.median(seconds)}


def local_bytes(tensor: Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def kept_bytes(model: LanguageModel, tokens: Tensor) -> int:
    """What a forward pass keeps for the backward pass, weights apart."""

    def is_weight(place: int) -> bool:
        """Whether a parameter stands there now: gathered ones come and go."""
        plain = (parameter for parameter in model.parameters() if not isinstance(parameter, DTensor))
        return any(parameter.untyped_storage().data_ptr() == place for parameter in plain)

    storages: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not is_weight(storage.data_ptr()):
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, labels=tokens).loss
    assert loss is not None
    kept = sum(size for size, _ in storages.values())
    storages.clear()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return kept


def allocated_at_most(step: Any) -> int:
    """Most bytes that torch held in a step, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def run(preset: str, overrides: list[str], ranks: int, timed: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (ranks, folder, preset, overrides, timed), nprocs=ranks)
        return dict(json.loads(Path(folder, "found.json").read_text()))


def predicted(plan: Plan) -> dict[str, float]:
    held = plan.memory
    return {
        "parameters": held.parameters,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "kept": held.activations.kept,
        "peak": held.peak,
        "seconds": plan.time.seconds,
    }


def compared(name: str, ranks: int, recompute: Recompute, timed: bool) -> dict[str, Any]:
    """One row: what was foreseen, what was found, and the ratio of the two."""
    preset, own = MODELS[name]
    overrides = [*SIZES, *own, f"train.recompute={recompute}"]
    config = morex.load_config(preset, overrides)
    before = this_processor(config, ranks, "fp32") if timed else UNMEASURED
    by_block = ranks > 1 and config.train.core_units == "blocks"
    layout = Layout(ranks, ranks, config.train.accumulation, recompute, by_block)
    found = run(preset, overrides, ranks, timed)
    device = between(before, this_processor(config, ranks, "fp32")) if timed else UNMEASURED
    foreseen = predicted(evaluate(config, layout, device, "fp32"))
    ratios = {key: foreseen[key] / found[key] for key in found}
    rates = {"flops": device.flops_fp32, "bandwidth": device.bandwidth, "link": device.link}
    row = {"model": name, "ranks": ranks, "recompute": recompute, "ratios": ratios, "predicted": foreseen}
    return row | {"measured": found, "device": rates if timed else None}


def between(before: Device, after: Device) -> Device:
    """The processor as it was meanwhile: others on the machine come and go."""
    names = ("flops_fp32", "bandwidth", "link", "network", "latency")
    return replace(before, **{name: (getattr(before, name) + getattr(after, name)) / 2 for name in names})


def main(path: str = "benchmarks/results/plan.json", what: str = "") -> None:
    rows = []
    for name in MODELS:
        for ranks in (1, 2):
            preset, own = MODELS[name]
            known = ways(morex.load_config(preset, [*SIZES, *own]), DEVICES["h100"])
            for recompute in [way for way in known if (way == "selective") == (what == "selective")]:
                rows.append(compared(name, ranks, recompute, timed=what != "memory"))
                print(name, ranks, recompute, {key: round(ratio, 3) for key, ratio in rows[-1]["ratios"].items()})
    write_json(Path(path), rows, ["python", *sys.argv])


if __name__ == "__main__":
    main(*sys.argv[1:])
