"""Fills the tables of docs/scaling.md from the closed forms that `morex plan` reads.

    python docs/generate_scaling.py

Every table stands between marks; nothing outside of them is touched.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import morex
from morex.config import Config
from morex.loading import ConfigError
from morex.scaling.devices import DEVICES, Device
from morex.scaling.layouts import Plan, plan
from morex.scaling.memory import units_of
from morex.study.units import human

PAGE = Path(__file__).with_name("scaling.md")
FILL: Any = runpy.run_path(str(PAGE.with_name("update_pages.py")))["fill"]
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
BATCH, LENGTH = 1024, 2048
TARGET = {"medium": 300e9, "large": 2e12}
"""Tokens that days are counted for."""


def recipe(size: str) -> Config:
    """`mor-llm-SIZE` with the batch of the tables: two million tokens."""
    batch = [f"train.batch_size={BATCH}", "train.accumulation=1", f"train.seq_len={LENGTH}"]
    return morex.load_config(f"mor-llm-{size}", batch)


def sections() -> dict[str, str]:
    """Every table by the name of its marks."""
    return {
        "devices": devices(),
        "medium": plans(recipe("medium"), TARGET["medium"], DEVICES["h100"]),
        "large": plans(recipe("large"), TARGET["large"], DEVICES["h100"]),
        "large-h200": plans(recipe("large"), TARGET["large"], DEVICES["h200"]),
        "core": core(),
    }


def devices() -> str:
    """What the makers say, and where."""
    head = ["device", "bf16", "fp32", "memory", "its bandwidth", "links", "network", "a machine has", "source"]
    rows = []
    for one in DEVICES.values():
        flops = [human(value, "FLOP/s") for value in (one.flops_bf16, one.flops_fp32)]
        rates = [human(value, "B/s") for value in (one.bandwidth, one.link, one.network)]
        rows.append([f"`{one.name}`", *flops, human(one.memory, "B"), *rates, str(one.per_node), one.source])
    return table(head, rows)


def plans(config: Config, target: float, device: Device) -> str:
    """The best layout for each number of devices."""
    head = [
        "GPUs",
        "shards x copies",
        "microbatches",
        "recompute",
        "core units",
        "memory",
        "of it gathered",
        "of it passing",
        "step",
    ]
    head += ["exchange exposed", "FLOP utilisation", "tokens a day", "days", "bound by"]
    rows = []
    for ranks in RANKS:
        try:
            rows.append(row(plan(config, ranks, device, "bf16"), target))
        except ConfigError as error:
            said = str(error).partition(": ")[2].partition(",")[0]
            rows.append([f"{ranks:,}", "does not fit", "", "", "", said, *[""] * (len(head) - 6)])
    return table(head, rows)


def row(one: Plan, target: float) -> list[str]:
    held, took, layout = one.memory, one.time, one.layout
    return [
        f"{layout.ranks:,}",
        f"{layout.shards} x {layout.copies}",
        str(layout.accumulation),
        layout.recompute,
        "blocks" if layout.has_block_units else "core",
        *(human(size, "B") for size in (held.peak, held.gathered, held.passing)),
        f"{took.seconds:.3g} s",
        f"{took.exposed / took.seconds:.0%}",
        f"{one.utilisation:.0%}",
        human(one.tokens_per_day),
        days(target / one.tokens_per_day),
        took.bound,
    ]


def days(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def core() -> str:
    """What the core costs as one unit, and with a unit for each block."""
    head = ["", "`mor-llm-medium`", "`mor-llm-large`"]
    rows: dict[str, list[str]] = {}

    def put(name: str, value: str) -> None:
        rows.setdefault(name, [name]).append(value)

    for size in ("medium", "large"):
        config = recipe(size)
        units, recursions = units_of(config.model), config.model.schedule.recursions
        weights = 4 * units.core
        put("parameters of the core", human(units.core))
        put("its weights and gradients in fp32, gathered", human(2 * weights, "B"))
        put("its weights in bf16, cast once a pass", human(weights / 2, "B"))
        put("received for its weights in a microbatch", human(2 * weights, "B"))
        put("the same with blocks as units", human(weights + 2 * weights / units.inner, "B"))
        put("received for them in a microbatch", human(2 * recursions * weights, "B"))
    return table(head, list(rows.values()))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    for name, text in sections().items():
        FILL(PAGE, name, text)
