"""Trains one run after another; `torchrun` starts it on several ranks. Its argument is a JSON file of jobs."""

import gc
import importlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from morex.config import Config
from morex.loading import validate
from morex.train.trainer import train


def main(jobs: Path) -> None:
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")
    gc.freeze()  # each training collects garbage, which need not go through all of torch
    dist.init_process_group("gloo")
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        config = validate(Config, job["config"])
        train(config, job["folder"], resume=job["resume"], console=Console(quiet=True))
    dist.destroy_process_group()
    os._exit(0)  # threads of the group may outlive the interpreter, which then aborts


if __name__ == "__main__":
    main(Path(sys.argv[1]))
