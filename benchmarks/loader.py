"""What a batch costs to draw beside the training step that it is for: from one shard, from many, from a mixture.

python benchmarks/loader.py [benchmarks/results/loader.json]

Shards of random ids with a document every few hundred tokens, in the page cache; with and without the numbers of
documents. The step is that of the preset, fp32, all cores. Loaders and step take turns, round by round; medians.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import morex
from morex.data.characters import ByteTokenizer
from morex.data.loader import EndlessLoader, Loader
from morex.data.mixture import MixtureLoader
from morex.data.prepare import Member, PreparedData
from morex.data.stream import ShardWriter, TokenStream, chained, map_shard
from morex.sections.data import MemberConfig
from morex.study.bench import write_json
from morex.train.memory import keep_freed_memory

ROUNDS, BATCHES = 7, 50
TOKENS, DOCUMENT = 1 << 26, 300
ITEM = np.dtype("<u2")
PRESETS = ("vanilla", "mor-expert")


def stream(folder: Path, shards: int) -> TokenStream:
    """`TOKENS` random ids in so many shards."""
    random, size = np.random.default_rng(0), TOKENS // shards
    parts = []
    for number in range(shards):
        path = folder / f"{shards}-{number}"
        writer = ShardWriter(path, ITEM)
        starts = np.arange(0, size, DOCUMENT)
        writer.add(random.integers(0, 1000, size).astype(ITEM), starts, size)
        writer.finish()
        parts.append(TokenStream(*map_shard(path, size, len(starts), ITEM), size))
    return chained(parts)


def member(whole: TokenStream, weight: float) -> Member:
    data = PreparedData(ByteTokenizer(), whole, whole, "document", 1, "", None)
    return Member(MemberConfig(corpus=f"weight {weight}", weight=weight), data)


def seconds(work: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def main() -> None:
    keep_freed_memory()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        one, many = stream(Path(place), 1), stream(Path(place), 64)
        for preset in PRESETS:
            config = morex.load_config(preset)
            batch, length = config.train.batch_size, config.train.seq_len
            model = morex.build_model(config.model).train()
            loaders: dict[tuple[str, bool], EndlessLoader] = {}
            for documents in (False, True):
                settings = (length, batch)
                loaders["one shard", documents] = Loader(one, *settings, documents=documents)
                loaders["64 shards", documents] = Loader(many, *settings, documents=documents)
                mixture = [member(one, 3), member(many, 1)]
                loaders["mixture of both", documents] = MixtureLoader(mixture, *settings, documents=documents)
            tokens = loaders["one shard", False].next_batch().tokens

            def step(model: torch.nn.Module = model, tokens: torch.Tensor = tokens) -> None:
                model(tokens, labels=tokens).loss.backward()
                model.zero_grad(set_to_none=True)

            step()
            rounds = []
            for _ in range(ROUNDS):
                taken = {key: seconds(loader.next_batch, BATCHES) for key, loader in loaders.items()}
                rounds.append((seconds(step, 1), taken))
            for kind, documents in loaders:
                drawn = statistics.median(taken[kind, documents] for _, taken in rounds)
                rows.append(
                    {
                        "preset": preset,
                        "from": kind,
                        "numbers_of_documents": documents,
                        "batch": batch,
                        "tokens": length,
                        "loader_seconds": drawn,
                        "loader_tokens_per_s": batch * length / drawn,
                        "step_seconds": statistics.median(taken for taken, _ in rounds),
                        "share_of_step": statistics.median(taken[kind, documents] / whole for whole, taken in rounds),
                    }
                )
                print(rows[-1], flush=True)
    if len(sys.argv) > 1:
        write_json(sys.argv[1], rows, ["python", *sys.argv])


if __name__ == "__main__":
    main()
