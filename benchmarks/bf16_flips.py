"""How often cached decoding and full passes disagree in bf16: greedy tokens and routes, every preset with a router.

python benchmarks/bf16_flips.py [benchmarks/results/bf16-flips.json]

Tiny forms, every parameter moved at random, so that routers split the tokens: no trained model, whose margins are
another matter. Both ways read the tokens that decoding chose. In fp32 the same rows are the control.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import morex
from morex.config import ModelConfig
from morex.model.lm import LanguageModel, Trace, build_model
from morex.sections.mixers import ExpertsConfig
from morex.study.bench import write_json

SEEDS = 2
ROWS, PROMPT, NEW = 32, 16, 24
DISTANCE = 0.2
"""Standard deviation of what is added to each parameter."""
FORMATS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}

Decisions = dict[str, list[list[Any]]]
"""What each token of each row did, by routed group or expert layer."""


def decodes_by_routers(config: ModelConfig) -> bool:
    return config.head.kind == "lm" and (config.depth.kind != "fixed" or isinstance(config.mixer, ExpertsConfig))


def moved_model(config: ModelConfig, seed: int) -> LanguageModel:
    model = build_model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(DISTANCE * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def decisions(trace: Trace, num_rows: int, num_tokens: int) -> Decisions:
    """Depths by group, and the experts of each visit by layer."""
    found: Decisions = {}
    for name, masks in trace.active.items():
        found[name] = torch.stack(masks).sum(0).tolist()
    for name, calls in trace.experts.items():
        chosen = torch.stack(calls).sort(-1).values.tolist()
        found[name] = [
            [[call[row][t] for call in chosen if call[row][t][0] >= 0] for t in range(num_tokens)]
            for row in range(num_rows)
        ]
    return found


def decode(model: LanguageModel, prompt: Tensor) -> tuple[Tensor, Decisions]:
    """Greedy continuation [B, PROMPT + NEW], token by token, and the decisions about all tokens but the last."""
    cache = model.new_cache(ROWS)
    fresh, tokens = prompt, prompt
    taken: Decisions = {}
    for _ in range(NEW):
        out = model(fresh, cache=cache, return_trace=True)
        assert out.trace is not None
        for name, rows in decisions(out.trace, ROWS, fresh.shape[1]).items():
            for known, more in zip(taken.setdefault(name, [[] for _ in rows]), rows, strict=True):
                known += more
        fresh = out.logits[:, -1:].argmax(-1)
        tokens = torch.cat((tokens, fresh), 1)
    return tokens, taken


def pairs(one: Decisions, other: Decisions, part: str) -> Iterator[tuple[Any, Any]]:
    """Each token's decision in both passes, for the modules whose path contains `part`."""
    for name, rows in one.items():
        if part in name:
            for row, others in zip(rows, other[name], strict=True):
                yield from zip(row, others, strict=True)


def flips(config: ModelConfig, seed: int, dtype: torch.dtype | None) -> dict[str, tuple[int, int]]:
    """Kind of decision -> (how many differ, how many there are)."""
    model = moved_model(config, seed)
    prompt = torch.randint(config.vocab_size, (ROWS, PROMPT), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        tokens, cached = decode(model, prompt)
        out = model(tokens[:, :-1], return_trace=True)
    assert out.trace is not None
    full = decisions(out.trace, ROWS, tokens.shape[1] - 1)
    compared: dict[str, list[tuple[Any, Any]]] = {
        "token": list(
            zip(
                out.logits[:, PROMPT - 1 :].argmax(-1).flatten().tolist(),
                tokens[:, PROMPT:].flatten().tolist(),
                strict=True,
            )
        )
    }
    if config.depth.kind != "fixed":
        compared["depth"] = list(pairs(cached, full, ".groups."))
    if isinstance(config.mixer, ExpertsConfig):
        compared["expert"] = list(pairs(cached, full, ".mixer."))
    return {kind: (sum(a != b for a, b in both), len(both)) for kind, both in compared.items()}


def row(preset: str, precision: str) -> dict[str, Any]:
    """Shares of the decisions that differ, over all seeds."""
    config = morex.load_config(preset, tiny=True).model
    found = [flips(config, seed, FORMATS[precision]) for seed in range(SEEDS)]
    result: dict[str, Any] = {"preset": preset, "precision": precision, "seeds": SEEDS}
    for kind in ("token", "depth", "expert"):
        counts = [one[kind] for one in found if kind in one]
        total = sum(count for _, count in counts)
        result[f"{kind}s_compared"] = total
        result[f"{kind}_flips"] = sum(different for different, _ in counts) / total if total else None
    return result


def sentence(found: dict[str, Any]) -> str:
    kinds = [kind for kind in ("token", "depth", "expert") if found[f"{kind}s_compared"]]
    shares = "  ".join(f"{kind}s {found[f'{kind}_flips']:.2%}" for kind in kinds)
    return f"{found['preset']:20s} {found['precision']}  {shares}"


def main() -> None:
    torch.set_num_threads(1)
    presets = [name for name in morex.presets() if decodes_by_routers(morex.load_config(name).model)]
    rows = []
    for preset in presets:
        for precision in FORMATS:
            rows.append(row(preset, precision))
            print(sentence(rows[-1]), flush=True)
    if len(sys.argv) > 1:
        write_json(sys.argv[1], rows, ["python", *sys.argv])


if __name__ == "__main__":
    main()
