"""What the engine's tests share."""

import string
from typing import Any

from morex.infer.demand import Demand
from morex.infer.engine import Engine
from parity.helpers import ragged_rows

LENGTHS = [5, 1, 11, 3, 8]
FULL = 2**23
"""Bytes of a cache that never runs out here."""
TEXT = (string.ascii_letters + string.digits + string.punctuation + " \n\t")[:97]
"""A character for each token of a tiny model."""
WORDS = "one two one"


def prompts_of(case: str, lengths: list[int] = LENGTHS) -> list[list[int]]:
    return [row.tolist() for row in ragged_rows(case, lengths)]


def engine_of(model: Any, cache_bytes: int = FULL, **options: Any) -> Engine:
    return Engine(
        model, cache_bytes=cache_bytes, **{"page_size": 3, "most_requests": 3, "chunk": 4, "patience": 1} | options
    )


def assert_nothing_is_left(engine: Engine) -> None:
    engine.store.check()
    assert engine.is_idle and not engine.traffic.flights and not engine.traffic.arrived
    while engine.prefixes.drop_oldest():
        engine.store.check()
    assert engine.store.pool.num_free == engine.store.pool.size


def bytes_of(model: Any, tokens: int) -> int:
    """Bytes that so many tokens need at most, in pages of 3."""
    pages = Demand(model.config, 3).pages(tokens, model.config.schedule.recursions)
    return int(pages * 3 * model.new_store(FULL, 3).entry_bytes)
