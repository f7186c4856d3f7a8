"""Counts the gathers of weights in one forward and backward pass; `torchrun` starts it on two ranks.

Its arguments are a file for the result and configs as JSON.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from morex.config import Config
from morex.loading import validate
from morex.model.lm import build_model
from morex.train.parallel import parallelise
from morex.train.ranks import started


class Exchanges(TorchDispatchMode):
    """Counts what ranks exchange, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def main(result: Path, configs: list[str]) -> None:
    dist.init_process_group("gloo")
    found = []
    with started("cpu") as ranks:
        for text in configs:
            config = validate(Config, json.loads(text))
            model = build_model(config.model).train()
            parallelise(model, config.train, ranks, "cpu")
            tokens = torch.arange(1, 17).view(2, 8)
            with Exchanges() as forward:
                loss = model(tokens, labels=tokens).loss
            assert loss is not None
            with Exchanges() as backward:
                loss.backward()
            found.append([forward.counts, backward.counts])
        if ranks.is_first:
            result.write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
    os._exit(0)  # threads of the group may outlive the interpreter, which then aborts


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
