"""Tokens a second of `model.generate` for one text, greedy, one thread: 7 tokens of prompt and 100 new ones.

python benchmarks/generate_speed.py [benchmarks/results/generate-speed.json]

Presets take turns, round by round; best and median. Compiled where the model's depth is one that no token decides; what
compiling takes is not counted, the prompt is.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

import morex
from morex.model.lm import LanguageModel
from morex.study.bench import write_json

PRESETS = ("more", "more-baseline", "vanilla", "mor-expert", "more-a")
PROMPT, NEW, ROUNDS = 7, 100, 7


def tokens_per_s(model: LanguageModel, compile: bool) -> float:
    prompt = torch.arange(1, 1 + PROMPT)[None]
    start = time.perf_counter()
    model.generate(prompt, max_new_tokens=NEW, compile=compile)
    return NEW / (time.perf_counter() - start)


def main(path: str = "benchmarks/results/generate-speed.json") -> None:
    torch.set_num_threads(1)
    sides: dict[tuple[str, bool], LanguageModel] = {}
    for preset in PRESETS:
        model = morex.build_model(morex.load_config(preset).model)
        for compile in (False, True):
            try:
                tokens_per_s(model, compile)
            except ValueError as refusal:
                print(f"{preset}: {refusal}")
            else:
                sides[preset, compile] = model
    rates: dict[tuple[str, bool], list[float]] = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for (preset, compile), model in sides.items():
            rates[preset, compile].append(tokens_per_s(model, compile))
    rows = [
        {
            "preset": preset,
            "compiled": compile,
            "tokens_per_s": max(found),
            "median_tokens_per_s": statistics.median(found),
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "threads": 1,
        }
        for (preset, compile), found in rates.items()
    ]
    for row in rows:
        print(row)
    write_json(Path(path), rows, ["python", *sys.argv])


if __name__ == "__main__":
    main(*sys.argv[1:])
