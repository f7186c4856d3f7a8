"""What `train.recompute` saves and costs: memory that a forward pass keeps, and time of a training step.

python benchmarks/recompute.py [benchmarks/results/recompute.json]

Ten layers, unique or a first, two that recur four times and a last; width 256, 4 x 512 tokens, fp32. All ways take
turns, round by round; medians, ratios to `nothing` within a round. Layers that do not recur are one recursion, which
saves nothing when it is computed again as a whole.
"""

import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import morex
from morex.model.lm import LanguageModel
from morex.sections.train import TrainConfig
from morex.study.bench import write_json
from morex.train.memory import keep_freed_memory
from morex.train.parallel import parallelise
from morex.train.ranks import ALONE

ROUNDS, BATCH, LENGTH = 7, 4, 512
WAYS = "nothing", "steps", "recursions", "selective"
SHAPES = {
    "vanilla": "{layers: 10}",
    "recursive": "{sharing: middle_cycle, layers: 10, recursions: 4}",
    "mor-expert": "{sharing: middle_cycle, layers: 10, recursions: 4}",
    "mor-token": "{sharing: middle_cycle, layers: 10, recursions: 4}",
}


def step(model: LanguageModel, tokens: Tensor) -> None:
    out = model(tokens, labels=tokens)
    assert out.loss is not None
    out.loss.backward()
    model.zero_grad(set_to_none=True)


def seconds(model: LanguageModel, tokens: Tensor) -> float:
    start = time.perf_counter()
    step(model, tokens)
    return time.perf_counter() - start


def kept_bytes(model: LanguageModel, tokens: Tensor) -> int:
    """What the forward pass keeps for the backward pass, what the loss needs apart."""
    before = storages(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):  # seen by Python
        out: Any = model(tokens, labels=tokens)
    kept = sum(size for pointer, size in storages(model).items() if pointer not in before)
    out.loss.backward()
    model.zero_grad(set_to_none=True)
    return kept


def storages(model: LanguageModel) -> dict[int, int]:
    """Bytes of all memory that tensors hold, logits apart, by address."""
    gc.collect()
    tensors: list[Tensor] = [thing for thing in gc.get_objects() if type(thing) in (Tensor, Parameter)]
    held = [tensor.untyped_storage() for tensor in tensors if tensor.shape[-1:] != (model.config.vocab_size,)]
    return {storage.data_ptr(): storage.nbytes() for storage in held}


def main(path: str = "benchmarks/results/recompute.json") -> None:
    torch.set_num_threads(2)
    keep_freed_memory()
    tokens = torch.randint(1, 1000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    rows = []
    for preset, schedule in SHAPES.items():
        config = morex.load_config(
            preset,
            [f"model.schedule={schedule}", "model.d_model=256", "model.vocab_size=1024", "model.max_seq_len=512"],
        )
        models = {}
        for what in WAYS:
            models[what] = morex.build_model(config.model).train()
            parallelise(models[what], TrainConfig(recompute=what), ALONE, "cpu")
        kept = {what: kept_bytes(model, tokens) for what, model in models.items()}
        rounds = [{what: seconds(model, tokens) for what, model in models.items()} for _ in range(ROUNDS)]
        for what in WAYS[1:]:
            row = {
                "preset": preset,
                "schedule": schedule,
                "recompute": what,
                "batch": BATCH,
                "tokens": LENGTH,
                "kept_bytes": kept["nothing"],
                "kept_bytes_recomputed": kept[what],
                "kept_ratio": kept[what] / kept["nothing"],
                "seconds": statistics.median(one["nothing"] for one in rounds),
                "time_ratio": statistics.median(one[what] / one["nothing"] for one in rounds),
            }
            print(row)
            rows.append(row)
    write_json(Path(path), rows, ["python", *sys.argv])


if __name__ == "__main__":
    main(*sys.argv[1:])
