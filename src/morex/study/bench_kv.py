"""What keys and values take: bytes of a token by KV rule, measured in a paged store, beside the closed form.

A store is filled by the model itself, a sequence at a time, on random tokens. Bytes are those of the entries stored;
pages held are more, since the last page of every list is partly empty.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console

from morex.cache.batch import KVCache
from morex.cache.paged import pages_within
from morex.config import ModelConfig
from morex.loading import ConfigError, load_config
from morex.model.checks import refuse_decoding
from morex.model.count import count
from morex.model.lm import LanguageModel, attention_shape, build_model
from morex.study.ceiling import PAGE_SIZE, cache_bytes_for
from morex.study.depth_mix import with_depths

Row = dict[str, Any]
RULES = ("per_recursion", "shared_first", "refresh")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""Of weights, keys and values, by precision."""


def bench_kv(
    names: Sequence[str],
    rules: Sequence[str] | None = None,
    sequences: int = 4,
    tokens: int = 256,
    depth: str | None = None,
    depth_mix: Sequence[float] | None = None,
    cache_bytes: int = 1 << 30,
    page_size: int = PAGE_SIZE,
    precision: str = "fp32",
    tiny: bool = False,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> Iterator[Row]:
    """Fills stores and looks at what is in them.

    Args:
        names: presets or YAML files.
        rules: KV rules; default: all that a model with recursions can have, and the only one of a dense model.
        sequences: in the store.
        tokens: of each sequence.
        depth: a fixed depth, as in the model's forward; default: the router `random` in the mix.
        depth_mix: weights of depths 1..R; default: the shares that the preset's own router aims at.
        cache_bytes: in which requests of so many tokens are to fit.
        page_size: entries of a page.
        precision: of keys and values.

    Yields:
        One row per preset and rule, see `kv_row`.

    Raises:
        ConfigError: an unknown preset, rule or precision, or a mix that does not fit.
    """
    if depth is not None and depth_mix is not None:
        raise ConfigError(f"--depth {depth} and --depth-mix both say how deep tokens go; give one of them")
    console = console or Console(quiet=True)
    for name in names:
        base = load_config(name, overrides, tiny).model
        for rule in rules or (RULES if base.schedule.recursions > 1 else (base.kv,)):
            own = [*overrides, f"model.kv={rule}"]
            if depth is None:
                config, own = with_depths(name, own, tiny, depth_mix, (tokens, tokens), 1)
            else:
                config = load_config(name, own, tiny)
            refuse_decoding(config.model, "a KV cache")
            console.print(f"{name}: {sequences} sequences of {tokens} tokens, {rule}", highlight=False)
            model = build_model(config.model, dtype=DTYPES[precision]).eval()
            yield kv_row(name, model, sequences, tokens, depth, cache_bytes, page_size, precision) | {
                "overrides": own,
                "tiny": tiny,
            }


@torch.no_grad()
def kv_row(
    name: str,
    model: LanguageModel,
    sequences: int,
    tokens: int,
    depth: str | None,
    cache_bytes: int,
    page_size: int,
    precision: str,
) -> Row:
    """The figures of one model.

    preset, kv (the rule), depth, shares (of the tokens, expected at recursion r = 1..R), mean_depth (measured), bytes a
    token measured, in closed form at the expected shares and at the measured ones, and of every token at every
    recursion (full); `of_full`; pages held, bytes in them, and the share of these that is stored; requests of so many
    tokens that fit into `cache_bytes`, here and of the same model at full depth.
    """
    config, size = model.config, DTYPES[precision].itemsize
    store = model.new_store(cache_bytes_for(model, sequences, tokens, page_size), page_size)
    draws = torch.Generator().manual_seed(0)
    active = torch.zeros(config.schedule.recursions, dtype=torch.double)
    for _ in range(sequences):
        text = torch.randint(config.vocab_size, (1, tokens), generator=draws)
        cache = KVCache(store, [store.open()], config.schedule.resolved)
        trace = model(text, cache=cache, depth=depth, logits_to_keep=1, return_trace=True).trace
        for masks in trace.active.values():
            shares_of = torch.stack([mask.double().mean() for mask in masks])
            active[: len(masks)] += shares_of / len(trace.active)
    shares = tuple((active / sequences).tolist())
    held, stored = store.pool.size - store.pool.num_free, store.bytes()
    page_bytes = page_size * store.entry_bytes
    full = full_bytes(config, size)
    closed = count(config, seq_len=tokens, depth=depth, bytes_per_value=size)
    room = pages_within(cache_bytes, page_size, store.entry_bytes)
    everyone = (1.0,) * config.schedule.recursions
    unshared = expected_pages(config.model_copy(update={"kv": "per_recursion"}), everyone, tokens, page_size)
    return {
        "preset": name,
        "kv": config.kv,
        "depth": depth or config.depth.kind,
        "sequences": sequences,
        "tokens": tokens,
        "precision": precision,
        "page_size": page_size,
        "cache_bytes": cache_bytes,
        "mean_depth": sum(shares),
        "kv_bytes_per_token": stored / (sequences * tokens),
        "closed_form": closed.kv_bytes_per_token,
        "closed_form_as_measured": count(config, shares=shares, bytes_per_value=size).kv_bytes_per_token,
        "full": full,
        "of_full": stored / (sequences * tokens) / full,
        "core_of_full": core_of_full(config, stored / (sequences * tokens), size),
        "pages": held,
        "page_fill": stored / (held * page_bytes),
        "requests_that_fit": room * sequences // held,
        "requests_at_full_depth": room // unshared,
    }


def full_bytes(config: ModelConfig, bytes_per_value: int) -> float:
    """Bytes of a token whose every recursion keeps its own keys: those of the unrolled model."""
    own = config.model_copy(update={"kv": "per_recursion"})
    everyone = (1.0,) * config.schedule.recursions
    return count(own, shares=everyone, bytes_per_value=bytes_per_value).kv_bytes_per_token


def core_of_full(config: ModelConfig, measured: float, bytes_per_value: int) -> float:
    """What the core takes of its full size, given the bytes of a token in all blocks."""
    schedule, full = config.schedule.resolved, full_bytes(config, bytes_per_value)
    each = full / schedule.unrolled_depth
    ends = each * (schedule.prelude + schedule.coda)
    return (measured - ends) / (full - ends)


def expected_pages(config: ModelConfig, shares: Sequence[float], tokens: int, page_size: int) -> int:
    """Pages that a request of so many tokens takes on average: of each list the last one is half empty."""
    schedule, shape = config.schedule.resolved, attention_shape(config)
    values = count(config, shares=tuple(shares), bytes_per_value=1).kv_bytes_per_token
    entries = values / (2 * shape.kv_heads * shape.head_dim)
    recursions = 1 if config.kv == "shared_first" else schedule.recursions
    lists = schedule.prelude + schedule.coda + schedule.core * recursions
    return -int(-(entries * tokens / page_size + lists / 2) // 1)
