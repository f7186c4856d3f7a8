"""Our engine beside transformers, dense: the shape of SmolLM2-135M, the same random weights, greedy, in turns.

python benchmarks/against_transformers.py [benchmarks/results/decode-transformers.json] [--precision fp32] [--threads 2]

`generate` is theirs with a static cache, on prompts of one length so that nothing is padded; `generate_batch` is their
continuous batching, on prompts of 64 to 256 tokens. A round runs each side once; ratios are taken within a round.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import morex
from morex.infer import Engine, Params
from morex.model.lm import LanguageModel
from morex.study.bench import write_json

CACHE = 2**31
NAMES = {
    "model.embed_tokens.": "embedding.",
    "model.norm.": "norm.",
    "model.layers.": "stack.core.blocks.",
    "self_attn.": "attention.",
    "_proj.": ".",
    "mlp.": "mixer.",
    "input_layernorm.": "norm1.",
    "post_attention_layernorm.": "norm2.",
}
Prompts = list[list[int]]


def models(dtype: torch.dtype) -> tuple[LanguageModel, Any]:
    """Ours and theirs with the same weights."""
    config = morex.load_config("smollm2-135m").model
    ours = morex.build_model(config).eval()
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.mixer.d_ff,
            num_hidden_layers=config.schedule.layers,
            num_attention_heads=config.attention.heads,
            num_key_value_heads=config.attention.kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": config.attention.rope_base},
            pad_token_id=0,
            eos_token_id=None,
            bos_token_id=None,
        )
    ).eval()
    weights = {}
    for name, weight in theirs.state_dict().items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        weights[name] = weight
    weights.pop("lm_head.weight")
    ours.load_state_dict(weights)
    tokens = torch.arange(1, 33)[None]
    with torch.no_grad():
        assert torch.allclose(ours(tokens).logits, theirs(tokens).logits, atol=1e-3), "the weights differ"
    return ours.to(dtype), theirs.to(dtype)


def ours_on(model: LanguageModel, prompts: Prompts, new: int) -> Callable[[], int]:
    engine = Engine(model, cache_bytes=CACHE, most_requests=len(prompts), prefixes=0)
    return lambda: sum(len(done.new) for done in engine.generate(prompts, Params(max_new_tokens=new)))


def generate_on(model: Any, prompts: Prompts, new: int) -> Callable[[], int]:
    tokens = torch.tensor(prompts)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "cache_implementation": "static"}

    def run() -> int:
        with torch.no_grad():
            found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return int(found[:, tokens.shape[1] :].numel())

    return run


def generate_batch_on(model: Any, prompts: Prompts, new: int) -> Callable[[], int]:
    options = transformers.GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run() -> int:
        found = model.generate_batch(inputs=prompts, generation_config=options, progress_bar=False)
        return sum(len(done.generated_tokens) for done in found.values())

    return run


def race(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Tokens a second of each side in each round, after one round to warm up."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            tokens = run()
            if number:
                rates[name].append(tokens / (time.perf_counter() - start))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", default="benchmarks/results/decode-transformers.json")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ours, theirs = models({"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision])
    size = ours.config.vocab_size
    rows = []
    for name, other, count, low, high in (
        ("generate", generate_on, 8, 128, 128),
        ("generate_batch", generate_batch_on, 32, 64, 256),
    ):
        lengths = [low + (high - low) * i // max(1, count - 1) for i in range(count)]
        prompts = [torch.randint(1, size, (length,)).tolist() for length in lengths]
        row = {"against": name, "version": transformers.__version__, "precision": options.precision}
        row |= {
            "threads": options.threads,
            "concurrency": count,
            "prompt_tokens": [low, high],
            "new_tokens": options.new,
        }
        try:
            sides = {"ours": ours_on(ours, prompts, options.new), "theirs": other(theirs, prompts, options.new)}
            rates = race(sides, options.rounds)
        except Exception as error:  # their continuous batching may not run on every device
            row |= {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        else:
            ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True))
            medians = {f"{side}_tokens_per_s": statistics.median(found) for side, found in rates.items()}
            row |= {**medians, "ratio": ratio}
        print(row)
        rows.append(row)
    write_json(Path(options.file), rows, ["python", *sys.argv])


if __name__ == "__main__":
    main()
