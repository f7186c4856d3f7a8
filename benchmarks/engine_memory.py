"""Whether an engine's memory stays flat: thousands of requests, some cancelled, in a cache so small that some wait.

python benchmarks/engine_memory.py [benchmarks/results/engine-memory.json] [--requests 10000]

The tiny form of mor-expert. Memory, pages and what the engine remembers are written down every tenth of the way.
"""

import argparse
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

import morex
from morex.infer import Engine, Params
from morex.study.bench import write_json

PAGE, PAGES, RUNNING = 4, 300, 16


def resident_bytes() -> int:
    """Of this process, now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()


def remembered(engine: Engine) -> int:
    """Requests, draws, events and texts that the engine still knows of."""
    return len(engine.requests) + len(engine._draws) + len(engine._events) + len(engine.prefixes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", default="benchmarks/results/engine-memory.json")
    parser.add_argument("--requests", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = morex.build_model(morex.load_config("mor-expert", tiny=True).model)
    entry = model.new_store(2**20, PAGE).entry_bytes
    engine = Engine(model, cache_bytes=PAGES * PAGE * entry, page_size=PAGE, most_requests=RUNNING, prefixes=8)
    returned, preempt = 0, engine.scheduler.preempt

    def noted(request: Any) -> None:
        nonlocal returned
        returned += 1
        preempt(request)

    engine.scheduler.preempt = noted  # type: ignore[method-assign]
    # Nothing is foreseen, so that pages run out and requests are sent back.
    engine.admission._fits = lambda request: engine.store.pool.num_free > PAGES // 3  # type: ignore[method-assign]
    rng = random.Random(0)
    going: list[int] = []
    started = cancelled = tokens = 0
    rows = []
    start = time.perf_counter()
    while started < options.requests or going:
        while len(going) < 2 * RUNNING and started < options.requests:
            prompt = [rng.randrange(1, 97) for _ in range(rng.randint(1, 12))]
            params = Params(max_new_tokens=rng.randint(1, 24), temperature=rng.choice([0.0, 0.9]), seed=started)
            going.append(engine.add(prompt, params))
            started += 1
            if started % (options.requests // 10) == 0:
                row = {"requests": started, "cancelled": cancelled, "sent_back": returned, "new_tokens": tokens}
                row |= {"resident_bytes": resident_bytes(), "remembered": remembered(engine)}
                row |= {"free_pages": engine.store.pool.num_free, "seconds": time.perf_counter() - start}
                engine.store.check()
                print(row)
                rows.append(row)
        if rng.random() < 0.05:
            engine.cancel(rng.choice(going))
            cancelled += 1
        for event in engine.step():
            tokens += event.token is not None
            if event.reason is not None:
                engine.take(event.number)
                going.remove(event.number)
    while engine.prefixes.drop_oldest():
        pass
    assert engine.store.pool.num_free == engine.store.pool.size, "pages are lost"
    write_json(Path(options.file), rows, ["python", *sys.argv])


if __name__ == "__main__":
    main()
