"""Several processes on this machine, ranks, for one command: what `torchrun` does, without its words.

A rank is this very command once more, with its number in the environment.
"""

import logging
import os
import sys
from collections.abc import Sequence
from uuid import uuid4


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


def launch(ranks: int, words: Sequence[str]) -> int:
    """Runs `morex` with these words on so many ranks and returns its exit code.

    Where one of them dies, the others end too.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the first rank has said what there is to say
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "morex", *words)
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)
    except SignalException as error:
        return 128 + error.sigval  # the ranks have saved and said how to go on
    return 0
