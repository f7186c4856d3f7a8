"""Makes a gradient of the second of two ranks overflow and takes a step; `torchrun` starts it.

Its argument is a file for the result.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import morex
from morex.train.loss_scale import LossScale
from morex.train.optim import build_optimizer
from morex.train.parallel import gradient_norm, parallelise, whole
from morex.train.ranks import started


def main(result: Path) -> None:
    dist.init_process_group("gloo")
    found: list[dict[str, Any]] = []
    with started("cpu") as ranks:
        for shards in (2, 1):
            config = morex.load_config("vanilla", [f"train.shards={shards}"], tiny=True)
            model = morex.build_model(config.model).train()
            parallelise(model, config.train, ranks, "cpu")
            optimizer = build_optimizer(model, config.train)
            scale = LossScale("cpu", True)
            before = [whole(parameter.detach()).clone() for parameter in model.parameters()]
            tokens = torch.arange(1, 17).view(2, 8)
            with torch.autocast("cpu", torch.float16):
                loss = model(tokens, labels=tokens).loss
            # Before gradients are exchanged, as an overflow is.
            assert loss is not None
            scale.scaled(loss * (1e30 if ranks.rank else 1.0)).backward()
            scale.unscale(optimizer)
            norm = gradient_norm(model, 1.0)
            scale.step(optimizer)
            after = [whole(parameter.detach()) for parameter in model.parameters()]
            report = {
                "scale": scale.report()["loss_scale"],
                "skipped": scale.skipped,
                "moved": any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)),
                "finite": math.isfinite(norm),
            }
            own: list[Any] = [None, None]
            dist.all_gather_object(own, report)
            found += own
        if ranks.is_first:
            result.write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
    os._exit(0)  # threads of the group may outlive the interpreter, which then aborts


if __name__ == "__main__":
    main(Path(sys.argv[1]))
