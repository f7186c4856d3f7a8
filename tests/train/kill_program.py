"""Trains one run in processes that are killed at random, again and again, and once to its end.

Its argument is a JSON file: config, folder, ranks, kills, seed. Processes are forked, so that torch is imported once.
"""

import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from morex.config import Config
from morex.loading import validate
from morex.train.runs import RunFolder
from morex.train.trainer import train


def start(job: dict[str, Any], rank: int, attempt: int) -> int:
    """Forks a rank and returns its process."""
    process = os.fork()
    if process:
        return process
    try:
        if job["ranks"] > 1:
            meeting = Path(job["folder"]).with_suffix(f".meeting-{attempt}")
            dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=job["ranks"])
        run = RunFolder(Path(job["folder"]))
        resume = run.is_run() if attempt else False
        train(validate(Config, job["config"]), run.path, resume=resume, console=Console(quiet=True))
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def last_step(run: RunFolder) -> int:
    return max((line["step"] for line in run.metrics("train")), default=0)


def begun(run: RunFolder) -> int:
    """How often the training has begun or gone on."""
    environment = run.environment()
    return 0 if environment is None else 1 + len(environment.get("resumed", []))


def kill_within(job: dict[str, Any], processes: list[int], before: int, draw: random.Random) -> None:
    """Kills one of the ranks at a random moment, of five kills one before it trains, and waits for the end of all."""
    run = RunFolder(Path(job["folder"]))
    if draw.random() < 0.8:
        while begun(run) == before:
            time.sleep(0.002)
        # Short of the end, behind which nobody is left to take steps.
        goal = min(last_step(run) + draw.randint(0, 6), job["config"]["train"]["steps"] - 10)
        while last_step(run) < goal:
            time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.05))
    victim = draw.choice(processes)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    patience = time.monotonic() + 20
    for process in processes:
        while process != victim and os.waitpid(process, os.WNOHANG)[0] == 0:
            if time.monotonic() > patience:
                os.kill(process, signal.SIGKILL)
            time.sleep(0.01)


def main(path: Path) -> None:
    torch.set_num_threads(1)
    job = json.loads(path.read_text(encoding="utf-8"))
    draw = random.Random(job["seed"])
    for attempt in range(job["kills"]):
        before = begun(RunFolder(Path(job["folder"])))
        processes = [start(job, rank, attempt) for rank in range(job["ranks"])]
        kill_within(job, processes, before, draw)
    processes = [start(job, rank, job["kills"]) for rank in range(job["ranks"])]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(max(map(abs, codes)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
