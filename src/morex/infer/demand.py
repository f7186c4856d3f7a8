"""How much of a paged store sequences may need."""

from collections.abc import Iterable
from functools import cache

from morex.config import ModelConfig
from morex.model.count import count
from morex.sections.mixers import FeedForwardConfig


class Demand:
    """Upper bounds, for a token that takes every recursion; routers let many go earlier."""

    def __init__(self, config: ModelConfig, page_size: int) -> None:
        self.config, self.page_size = config, page_size
        self.per_depth = cache(self._per_depth)

    def pages(self, tokens: int, recursions: int) -> int:
        """Pages for so many tokens in a row, wherever the lists that they go to end now."""
        entries, lists = self.per_depth(recursions)
        return int(-(-entries * tokens // self.page_size)) + lists

    def _per_depth(self, recursions: int) -> tuple[float, int]:
        """Entries of a token, and lists that it may be in."""
        config, attention = self.config, self.config.attention
        head_dim = attention.head_dim or config.d_model // attention.heads
        depth = f"uniform:{recursions}"
        held = count(config, depth=depth, bytes_per_value=1).kv_bytes_per_token
        entries = held / (2 * attention.num_kv_heads * head_dim)
        schedule = config.schedule.resolved
        lists = schedule.prelude + schedule.core * recursions + schedule.coda
        if entries > lists and not isinstance(config.mixer, FeedForwardConfig):
            lists += lists * config.mixer.router.experts * config.mixer.num_steps
        return entries, lists


def peak(texts: Iterable[tuple[int, int]]) -> int:
    """The most tokens that texts will ever have together, if each grows by a token at a time and goes when it is done.

    Those that are done early make room for those that go on, which a sum of their last lengths would not see.

    Args:
        texts: tokens of each text, and how many are still to come.
    """
    found, alive, tokens = 0, 0, 0
    for length, more in sorted(texts, key=lambda text: -text[1]):
        alive, tokens = alive + 1, tokens + length
        found = max(found, tokens + alive * more)
    return found
