"""How often the engine in bf16 decides otherwise than a full pass in bf16: greedy tokens and depths, every preset.

python benchmarks/engine_flips.py [benchmarks/results/engine-flips.json]

As `bf16_flips.py`, with the weights themselves in bf16: the engine decodes all rows side by side, twelve at a time, and
the full pass reads what it has written. In fp32 the same rows are the control.
"""

import sys
from typing import Any

import torch

import morex
from bf16_flips import NEW, PROMPT, ROWS, SEEDS, moved_model
from morex.config import ModelConfig
from morex.infer import Engine, Params
from morex.model.checks import check_decodes
from morex.study.bench import write_json

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CACHE_BYTES, AT_A_TIME = 2**28, 12


def decodes(config: ModelConfig) -> bool:
    try:
        check_decodes(config, None)
    except ValueError:
        return False
    return config.head.kind == "lm"


def flips(config: ModelConfig, seed: int, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Kind of decision -> (how many differ, how many there are)."""
    model = moved_model(config, seed).to(dtype)
    prompts = torch.randint(config.vocab_size, (ROWS, PROMPT), generator=torch.Generator().manual_seed(seed))
    engine = Engine(model, cache_bytes=CACHE_BYTES, most_requests=AT_A_TIME)
    done = engine.generate(prompts.tolist(), Params(max_new_tokens=NEW, trace=True))
    tokens = torch.tensor([completion.tokens for completion in done])
    with torch.no_grad():
        out = model(tokens[:, :-1], return_trace=True)
    assert out.trace is not None
    found = {"token": (out.logits[:, PROMPT - 1 :].argmax(-1) != tokens[:, PROMPT:]).flatten().tolist()}
    if out.trace.active:
        depth = sum(torch.stack(masks).sum(0) for masks in out.trace.active.values())
        own = torch.tensor([completion.trace.depth for completion in done if completion.trace is not None])
        found["depth"] = (own != depth).flatten().tolist()
    return {kind: (sum(differ), len(differ)) for kind, differ in found.items()}


def row(preset: str, precision: str) -> dict[str, Any]:
    """Shares of the decisions that differ, over all seeds."""
    config = morex.load_config(preset, tiny=True).model
    found = [flips(config, seed, FORMATS[precision]) for seed in range(SEEDS)]
    result: dict[str, Any] = {"preset": preset, "precision": precision, "seeds": SEEDS}
    for kind in ("token", "depth"):
        counts = [one[kind] for one in found if kind in one]
        total = sum(count for _, count in counts)
        result[f"{kind}s_compared"] = total
        result[f"{kind}_flips"] = sum(differ for differ, _ in counts) / total if total else None
    return result


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for preset in [name for name in morex.presets() if decodes(morex.load_config(name).model)]:
        for precision in FORMATS:
            rows.append(row(preset, precision))
            print(rows[-1], flush=True)
    if len(sys.argv) > 1:
        write_json(sys.argv[1], rows, ["python", *sys.argv])


if __name__ == "__main__":
    main()
