"""How large a cache should be where nobody says so."""

import os
from collections.abc import Iterable

import torch

from morex.infer.demand import Demand
from morex.model.lm import LanguageModel, attention_shape

SHARE = 4
"""A cache takes one part in so many of the memory at most."""
SPARE = 1.5
"""Room beside that of the texts themselves, for what is kept of earlier ones."""
UNKNOWN_MEMORY = 2**34
"""Bytes, where the system does not say how many it has."""


def default_cache_bytes(model: LanguageModel, texts: Iterable[tuple[int, int]], page_size: int = 16) -> int:
    """Bytes of keys and values for texts that are decoded side by side, at most a quarter of the device's memory.

    Texts that do not even fit alone, and will be refused, are left out.

    Args:
        model: on the device where the cache will be.
        texts: tokens of each at last, and the recursions that its tokens take at most.
        page_size: entries of a page.
    """
    demand, size = Demand(model.config, page_size), page_bytes(model, page_size)
    most = max(1, _memory(model.embedding.weight.device) // SHARE // size)
    needed = (demand.pages(tokens, recursions) for tokens, recursions in texts)
    pages = sum(pages for pages in needed if pages <= most)
    return min(most, max(1, int(SPARE * pages))) * size


def page_bytes(model: LanguageModel, page_size: int) -> int:
    """Bytes of a page of keys and values, in the number format of the weights."""
    shape = attention_shape(model.config)
    return page_size * 2 * shape.kv_heads * shape.head_dim * model.embedding.weight.element_size()


def _memory(device: torch.device) -> int:
    """Bytes of a device's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return UNKNOWN_MEMORY
