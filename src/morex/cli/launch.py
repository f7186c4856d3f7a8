"""Several processes on this machine, ranks, for one command: what `torchrun` does, without its words.

A rank is this very command once more, with its number in the environment.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any
from uuid import uuid4

SECONDS_TO_SAVE = 600
"""How long ranks may take to end once a signal has asked them to."""


def ranks_to_start(asked: int | None, device: str) -> int:
    """Ranks that a command starts: those asked for, else one for each GPU; 1 where it is one of several itself.

    Args:
        device: `train.device`.
    """
    if "WORLD_SIZE" in os.environ:
        return 1
    if asked is not None:
        return asked
    if device not in ("auto", "cuda"):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def launch(ranks: int, words: Sequence[str], has_saved: Callable[[], bool]) -> int:
    """Runs `morex` with these words on so many ranks and returns its exit code.

    Where one of them dies, the others end too. A signal goes to all of them.

    Args:
        has_saved: whether they have saved what they did, asked after a signal has ended them.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # the first rank says what there is to say
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        **_patience(LaunchConfig),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "morex", *words)
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)
    except SignalException as error:
        return 0 if has_saved() else 128 + error.sigval
    return 0


def _patience(config: type) -> dict[str, Any]:
    """Time to save after a signal, where this version of torch can be asked for it; else it gives half a minute."""
    known = {field.name for field in fields(config)}
    return {"shutdown_timeout": SECONDS_TO_SAVE} if "shutdown_timeout" in known else {}
