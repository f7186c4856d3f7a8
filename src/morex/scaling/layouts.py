"""The best layout: of all ways to divide a batch and a model over so many ranks, the fastest that fits."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, get_args

from morex.config import Config
from morex.loading import ConfigError
from morex.model.count import count
from morex.scaling.activations import Activations, Format, Recompute
from morex.scaling.devices import DEVICES, Device
from morex.scaling.memory import Layout, Memory, held, kept, units_of
from morex.scaling.speed import StepTime, step_time
from morex.sections.mixers import ExpertsConfig

DAY = 86_400
AS_FAST = 0.01
"""Difference in time that no closed form can tell."""
MOST_RANKS = 2**16
"""Where the search for a number of ranks that fits ends."""


@dataclass(frozen=True)
class Plan:
    """A layout on a device, what it holds and how long a step takes."""

    device: Device
    layout: Layout
    precision: Format
    memory: Memory
    time: StepTime
    step_tokens: int
    train_flops: float
    """Of a step, without what is computed again."""

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.device.usable * self.device.memory

    @property
    def tokens_per_second(self) -> float:
        return self.step_tokens / self.time.seconds

    @property
    def tokens_per_day(self) -> float:
        return DAY * self.tokens_per_second

    @property
    def utilisation(self) -> float:
        """FLOPs of the model a second, of all that the devices' makers promise (Chowdhery et al. 2022, appendix B)."""
        device = self.device
        peak = device.flops_bf16 if self.precision == "bf16" else device.flops_fp32
        return self.train_flops / self.time.seconds / peak / self.layout.ranks

    def hours(self, tokens: float) -> float:
        """Of all devices together, for so many tokens."""
        return tokens / self.tokens_per_second / 3600 * self.layout.ranks


class Estimates:
    """Plans for layouts of one config on one device. What layouts have in common is counted once."""

    def __init__(self, config: Config, device: Device, precision: Format) -> None:
        self.config, self.device, self.precision = config, device, precision
        self.counts = count(config.model, seq_len=config.train.seq_len)
        self.units = units_of(config.model)
        self._kept: dict[tuple[int, Recompute], Activations] = {}
        """By size of a microbatch and by what is computed again."""

    def __call__(self, layout: Layout) -> Plan:
        """What a layout holds and how long a step of it takes."""
        config, device, precision = self.config, self.device, self.precision
        key = layout.ranks * layout.accumulation, layout.recompute
        if key not in self._kept:
            self._kept[key] = kept(config, layout, precision, device.has_fast_paths)
        found = held(config, layout, precision, self._kept[key], self.units)
        time = step_time(config, layout, device, precision, found, self.counts, self.units)
        tokens = config.train.batch_size * config.train.seq_len
        return Plan(device, layout, precision, found, time, tokens, tokens * self.counts.train_flops_per_token)


def evaluate(config: Config, layout: Layout, device: Device, precision: Format) -> Plan:
    """What a layout holds and how long a step of it takes."""
    return Estimates(config, device, precision)(layout)


def layouts(config: Config, ranks: int, device: Device) -> Iterator[Layout]:
    """All layouts of a config over so many ranks of a kind; none where its batch does not divide."""
    batch = config.train.batch_size
    if batch % ranks:
        return
    kinds = {"core": (False,), "blocks": (True,), "auto": (False, True)}[config.train.core_units]
    for shards in _divisors(ranks):
        for accumulation in _divisors(batch // ranks):
            for recompute, by_block in product(ways(config, device), kinds if ranks > 1 else (False,)):
                yield Layout(ranks, shards, accumulation, recompute, by_block)


def ways(config: Config, device: Device) -> tuple[Recompute, ...]:
    """What may be computed again, as far as it can be planned."""
    if config.model.kv == "refresh":
        return ("nothing",)
    known: tuple[Recompute, ...] = get_args(Recompute)
    if device.has_fast_paths or config.train.compile or isinstance(config.model.mixer, ExpertsConfig):
        # On a CPU torch's own work for it takes longer than operators do. Blocks are compiled whole; and which products
        # of experts are kept depends on how a device makes them.
        return tuple(way for way in known if way != "selective")
    return known


def plan(config: Config, ranks: int, device: Device, precision: Format) -> Plan:
    """Of the layouts that fit and are within 1 % of the fastest of them, the one that needs least memory.

    Raises:
        ConfigError: the batch does not divide over the ranks, or no layout fits.
    """
    refuse_uneven(config, ranks)
    found = list(map(Estimates(config, device, precision), layouts(config, ranks, device)))
    fitting = [one for one in found if one.fits]
    if not fitting:
        least = min(found, key=lambda one: one.memory.peak)
        raise ConfigError(_too_large(config, least))
    fastest = min(one.time.seconds for one in fitting)
    alike = [one for one in fitting if one.time.seconds <= (1 + AS_FAST) * fastest]
    return min(alike, key=lambda one: (one.memory.peak, one.time.seconds))


def as_row(one: Plan, target_tokens: float) -> dict[str, Any]:
    """A plan in plain data: bytes, seconds, and hours of all devices together for so many tokens."""
    held, took, layout = one.memory, one.time, one.layout
    return {
        "gpus": layout.ranks,
        "device": one.device.name,
        "precision": one.precision,
        "shards": layout.shards,
        "copies": layout.copies,
        "accumulation": layout.accumulation,
        "recompute": layout.recompute,
        "core_units": "blocks" if layout.has_block_units else "core",
        "memory": {
            "peak": held.peak,
            "moment": held.moment,
            "parameters": held.parameters,
            "gradients": held.gradients,
            "optimizer": held.optimizer,
            "gathered": held.gathered,
            "passing": held.passing,
        },
        "activations": asdict(held.activations) | {"kept": held.activations.kept},
        "step": asdict(took) | {"seconds": took.seconds, "bound": took.bound},
        "utilisation": one.utilisation,
        "tokens_per_s": one.tokens_per_second,
        "tokens_per_day": one.tokens_per_day,
        "days": target_tokens / one.tokens_per_day,
        "gpu_hours": one.hours(target_tokens),
    }


def refuse_uneven(config: Config, ranks: int) -> None:
    """Raises ConfigError where a step's sequences do not divide over the ranks."""
    batch = config.train.batch_size
    if batch % ranks:
        near = max(ranks, round(batch / ranks) * ranks)
        raise ConfigError(f"train.batch_size {batch} does not divide over {ranks} ranks; use train.batch_size={near}")


def _too_large(config: Config, least: Plan) -> str:
    """Why nothing fits, and what would."""
    device, ranks = least.device, least.layout.ranks
    usable, needed = device.usable * device.memory / 1e9, least.memory.peak / 1e9
    said = (
        f"no layout fits {ranks} x {device.name}: at least {needed:,.1f} GB a rank, and {usable:,.1f} GB of its memory "
        "are for tensors"
    )
    more = ranks * 2
    while more <= MOST_RANKS:
        grown = config.model_copy(
            update={"train": config.train.model_copy(update={"batch_size": max(config.train.batch_size, more)})}
        )
        estimates = Estimates(grown, device, least.precision)
        if any(estimates(layout).fits for layout in layouts(grown, more, device)):
            return f"{said}; {more} of them would do{_with_batch(config, more)}"
        more *= 2
    larger = [other for other in DEVICES.values() if least.memory.peak <= other.usable * other.memory]
    if larger:
        return f"{said}; it would fit on {min(larger, key=lambda other: other.memory).name}"
    return f"{said}; use a smaller model, or shorter sequences (train.seq_len {config.train.seq_len})"


def _with_batch(config: Config, ranks: int) -> str:
    return "" if config.train.batch_size >= ranks else f", with train.batch_size={ranks}"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
