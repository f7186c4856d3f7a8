"""Several processes, ranks, for one command, here and on other machines: what `torchrun` does, without its words.

A rank is this very command once more, with its number in the environment.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any
from uuid import uuid4

from morex.loading import ConfigError

JOINS = 300
"""Seconds in which the machines of a training have to find each other."""
SECONDS_TO_SAVE = 600
"""How long ranks may take to end once a signal has asked them to."""


@dataclass(frozen=True)
class Nodes:
    """The machines of a training, of which this is one."""

    count: int = 1
    number: int = 0
    """This one's, from 0, which is the one at `head`."""
    head: str | None = None
    """HOST:PORT where they find each other."""

    @classmethod
    def asked(cls, count: int | None, number: int | None, head: str | None) -> "Nodes":
        """From `--nodes`, `--node` and `--head`. Raises ConfigError where they do not fit together."""
        given = {"--nodes": count, "--node": number, "--head": head}
        missing = [option for option, value in given.items() if value is None]
        if len(missing) == 3:
            return cls()
        if count is None or number is None or head is None:
            raise ConfigError(f"--nodes, --node and --head go together; {' and '.join(missing)} missing")
        if number >= count:
            raise ConfigError(f"--node {number} must be below --nodes {count}: the machines are 0 to {count - 1}")
        host, _, port = head.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ConfigError(f"--head '{head}' must be HOST:PORT, such as one:29500")
        return cls(count, number, head)

    @property
    def rendezvous(self) -> dict[str, Any]:
        """How torch's launcher brings them together."""
        if self.count == 1:
            return {"run_id": uuid4().hex, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
        configs = {"rank": self.number, "timeout": JOINS}
        return {"run_id": "morex", "rdzv_backend": "static", "rdzv_endpoint": self.head, "rdzv_configs": configs}


THIS_ALONE = Nodes()


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


def launch(ranks: int, words: Sequence[str], has_saved: Callable[[], bool], nodes: Nodes = THIS_ALONE) -> int:
    """Runs `morex` with these words on so many ranks of this machine and returns its exit code.

    Where one of them dies, the others end too. A signal goes to all of them.

    Args:
        ranks: of this machine.
        words: the command line.
        has_saved: whether they have saved what they did, asked after a signal has ended them.
        nodes: the machines of the training.

    Raises:
        ConfigError: the machines do not find each other.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from morex.train.meeting import answers

    logging.disable()  # the first rank says what there is to say
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    config = LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=ranks,
        max_restarts=0,
        **nodes.rendezvous,
        **_patience(LaunchConfig),
    )
    if nodes.head is not None and nodes.number > 0:
        host, _, port = nodes.head.rpartition(":")
        if not answers(host, int(port), JOINS):
            raise _apart(nodes)
    try:
        elastic_launch(config, sys.executable)("-m", "morex", *words)
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)
    except SignalException as error:
        return 0 if has_saved() else 128 + error.sigval
    except (DistError, ConnectionError) as error:
        if nodes.count == 1:
            raise
        raise _apart(nodes) from error
    return 0


def _apart(nodes: Nodes) -> ConfigError:
    return ConfigError(
        f"--head '{nodes.head}': the {nodes.count} machines have not found each other there in {JOINS} seconds, or "
        f"have lost it; start the same command on each of them, with --node 0 on that of the address"
    )


def _patience(config: type) -> dict[str, Any]:
    """Time to save after a signal, where this version of torch can be asked for it; else it gives half a minute."""
    known = {field.name for field in fields(config)}
    return {"shutdown_timeout": SECONDS_TO_SAVE} if "shutdown_timeout" in known else {}
