"""The processes of a training, ranks: how they find each other, what they agree on, and how they fail together.

`torchrun` starts as many as it is told to and says so in the environment; alone, a training is its only rank.
"""

import hashlib
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from morex.loading import ConfigError
from morex.nn import ranks as together
from morex.nn.signals import RouterStats
from morex.train.errors import TrainingError
from morex.train.meeting import answers

BACKENDS = "cpu:gloo,cuda:nccl"
MEETS = 300
"""Seconds in which ranks have to find each other."""
LATEST = timedelta(minutes=30)
"""How long ranks wait for one that prepares something for them all."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a training."""

    rank: int = 0
    size: int = 1
    background: dist.ProcessGroup | None = None
    """What a thread beside the training exchanges over; None where this is the only rank."""

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def most(self, *values: float) -> list[float]:
        """The largest over all ranks, of each value."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def from_first(self, value: Any) -> Any:
        """The first rank's value."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """An error of one rank inside becomes the error of all at the end of the block: none waits for it forever.

        There must be no exchange between ranks inside. All raise what the first of those that failed raised.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as own:
            error = own
            if self.size == 1:
                raise
        if self.size == 1:
            return
        failed = [other for other in together.gathered(_sendable(error)) if other is not None]
        if failed:
            raise failed[0]

    def joined(self, stats: RouterStats) -> RouterStats:
        """Statistics of all ranks: sums of sums, and lists of samples one after another."""
        if self.size == 1:
            return stats
        sums = {(name, key): value for name, fields in stats.items() for key, value in fields.items()}
        samples = {key: value for key, value in sums.items() if key[1].startswith("samples")}
        sums = {key: value for key, value in sorted(sums.items()) if key not in samples}
        if not self._are_alike({key: tuple(value.shape) for key, value in sums.items()}):
            # A rank whose tokens have all left before has nothing to report of some router.
            found = RouterStats()
            for part in together.gathered(RouterStats({name: dict(fields) for name, fields in stats.items()})):
                found = found + part
            return found
        found = RouterStats()
        flat = [value.double().flatten() for value in sums.values()]
        everyone = together.summed(torch.cat(flat)) if flat else torch.zeros(0)
        for (key, own), total in zip(sums.items(), everyone.split([len(part) for part in flat]), strict=True):
            found.include(key[0], {key[1]: total.view(own.shape).to(own.dtype)})
        if self.most(len(samples))[0]:
            for part in together.gathered(samples):
                for (name, key), value in part.items():
                    found.include(name, {key: value})
        return found

    def _are_alike(self, structure: Any) -> bool:
        """Whether all ranks have the same."""
        digest = int.from_bytes(hashlib.sha256(repr(structure).encode()).digest()[:6], "big")
        high, low = self.most(digest, -digest)
        return high == -low


ALONE = Ranks()


def _sendable(error: Exception | None) -> Exception | None:
    """An error as other ranks can take it: in the class that it has, or where that does not travel, by its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def started(device: str) -> Iterator[Ranks]:
    """Joins the ranks that `torchrun` has started, for as long as the block takes; a group that there is stays.

    What a user did wrong is said by the first rank alone: on the others the error is marked with `said_by_first`.

    Args:
        device: `train.device`.

    Raises:
        ConfigError: the device names one for all ranks, or they do not find each other.
    """
    is_new = not (dist.is_available() and dist.is_initialized())
    if is_new and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if is_new:
        _join(device)
    own = Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))
    try:
        with together.together(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nobody writes to
            if not own.is_first:
                warnings.simplefilter("ignore")
            yield own
    except (ConfigError, TrainingError) as error:
        error.said_by_first = not own.is_first
        raise
    finally:
        if is_new:
            dist.destroy_process_group()


def _join(device: str) -> None:
    size, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.startswith("cuda:"):
        error = ConfigError(f"train.device '{device}' is one device for {size} ranks; use cuda, and each takes its own")
        error.said_by_first = os.environ["RANK"] != "0"
        raise error
    has_cuda = device != "cpu" and torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(local % torch.cuda.device_count())
    store = _meeting_place(size)
    backends = BACKENDS if has_cuda else "gloo"
    dist.init_process_group(backends, store=store, rank=int(os.environ["RANK"]), world_size=size)


def _meeting_place(size: int) -> "dist.Store":
    """Where the ranks find each other. Raises ConfigError where they have not within minutes."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    apart = ConfigError(
        f"the {size} ranks of this training have not found each other at MASTER_ADDR:MASTER_PORT '{host}:{port}' in "
        f"{MEETS} seconds; start all of them, and the first on the machine of that address"
    )
    if os.environ["RANK"] != "0" and not (port.isdecimal() and answers(host, int(port), MEETS)):
        raise apart
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=MEETS)))
    except (dist.DistError, ValueError) as error:
        raise apart from error
    store.set_timeout(LATEST)
    return dist.PrefixStore("ranks", store)
