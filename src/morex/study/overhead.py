"""How much of an engine's step is neither arithmetic nor memory traffic: Python and the scheduler.

Measured over some steps in which every request decodes: one minus the share of our own kernels, by the clock, and the
share of torch's operators, by its profiler in as many steps after; of several such measurements the median counts.
Between kernels and operators runs Python. The profiler writes down every operator, the inner ones too, which makes the
time inside longer than it is and hides some of the overhead; entering an operator from Python counts as overhead.
`profiler_slowdown` says how much slower the steps were with the profiler. On a GPU, where operators only launch
kernels, the share says nothing.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence

from torch.profiler import ProfilerActivity, profile

from morex.infer.engine import Engine
from morex.infer.request import Params
from morex.nn import fast

STEPS, PROBES = 12, 7
OWN = "morex::"
"""How the names of kernels of our own begin."""


def measure_overhead(
    engine: Engine, prompts: Sequence[Sequence[int]], params: Params, steps: int = STEPS
) -> dict[str, float]:
    """Share of the time outside operators, and what a token takes in the cache meanwhile.

    Args:
        engine: without requests.
        prompts: as many as are to decode at a time.
        params: of each; who ends begins again, so that with few new tokens prompts are among the steps.

    Returns:
        overhead_share, profiler_slowdown and kv_bytes_per_token.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says on the terminal when it starts and stops
    going = {engine.add(prompt, params): prompt for prompt in prompts}
    drawn, waited_for = dict.fromkeys(going, 0), set(going)

    def step() -> None:
        for event in engine.step():
            drawn[event.number] += 1
            waited_for.discard(event.number)
            if event.reason is not None:
                engine.take(event.number)
                del drawn[event.number]
                prompt = going.pop(event.number)
                number = engine.add(prompt, params)
                going[number], drawn[number] = prompt, 0

    while waited_for:
        step()
    # The token drawn last is on its way into the cache.
    stored = sum(len(going[number]) + count - 1 for number, count in drawn.items() if count)
    kv_bytes = engine.store.bytes() / max(1, stored)
    found = [_probe(step, steps) for _ in range(PROBES)]
    for number in list(drawn):
        engine.cancel(number)
        engine.take(number)
    share, slowdown = (statistics.median(values) for values in zip(*found, strict=True))
    return {"overhead_share": share, "profiler_slowdown": slowdown, "kv_bytes_per_token": kv_bytes}


def _probe(step: Callable[[], None], steps: int) -> tuple[float, float]:
    """Share of the time outside kernels and operators in so many steps, and how much slower the profiler makes them."""
    with fast.kernel_seconds() as spent:
        plain = _timed(step, steps)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        wall = _timed(step, steps)
    events = [event for event in profiler.events() or () if "::" in event.name]
    spans = [(event.time_range.start, event.time_range.end) for event in events if not event.name.startswith(OWN)]
    return 1 - sum(spent) / plain - covered(spans) / 1e6 / wall, wall / plain


def _timed(step: Callable[[], None], steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - start


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of what some spans cover together; those inside others, or beside them in another thread, count once."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
