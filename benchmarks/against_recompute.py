"""Our decoding of `more` beside a plain program that keeps nothing, with the same weights, in turns in one process.

python benchmarks/against_recompute.py [benchmarks/results/decode-recompute.json]

The program is written here from the published formulas of a mixture of recursive experts: for every new token it
computes the whole text again; inside an expert, each token is a sequence of length one with attention and rotary
positions of its own; experts take their tokens one after another. Greedy, fp32, one thread, 7 tokens of prompt and 100
new ones. Both must continue the prompt with the same tokens.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import morex
from morex.config import ModelConfig
from morex.model.lm import LanguageModel
from morex.study.bench import write_json

PROMPT, NEW, ROUNDS = 7, 100, 7


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.d_model
        self.heads, self.dim = config.attention.heads, width // config.attention.heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        speeds = config.attention.rope_base ** -(torch.arange(0, self.dim, 2) / self.dim)
        angles = torch.outer(torch.arange(config.max_seq_len), speeds).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotated(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        length = x.shape[-2]
        return x * self.cos[:length] + torch.cat((-second, first), -1) * self.sin[:length]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Expert(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, d_ff, eps = config.d_model, config.mixer.d_ff, config.norm_eps
        self.step_embedding = nn.Parameter(torch.zeros(config.mixer.steps, width))
        self.norm_attention, self.norm_mixer, self.norm_out = (nn.RMSNorm(width, eps) for _ in range(3))
        self.attention = Attention(config)
        self.gate, self.up = nn.Linear(width, d_ff, bias=False), nn.Linear(width, d_ff, bias=False)
        self.down = nn.Linear(d_ff, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.step_embedding:
            x = x + step
            x = x + self.attention(self.norm_attention(x))
            h = self.norm_mixer(x)
            x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.norm_out(x)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        router = config.mixer.router
        self.norm1, self.norm2 = (nn.RMSNorm(config.d_model, config.norm_eps) for _ in range(2))
        self.attention = Attention(config)
        self.router = nn.Linear(config.d_model, router.experts, bias=False)
        self.experts = nn.ModuleList(Expert(config) for _ in range(router.experts))
        self.top_k = router.top_k

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x).flatten(0, 1)
        shares, chosen = self.router(h).softmax(-1).topk(self.top_k)
        shares = shares / shares.sum(-1, keepdim=True)
        y = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            if rows.numel():
                y[rows] += shares[rows, places, None] * expert(h[rows, None])[:, 0]
        return x + y.view_as(x)


class Program(nn.Module):
    """The whole of it; its weights are those of our model."""

    def __init__(self, ours: LanguageModel) -> None:
        super().__init__()
        config = ours.config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.schedule.layers))
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.load_state_dict(_renamed(ours.state_dict(), config.mixer.router.experts))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)

    @torch.no_grad()
    def generate(self, tokens: Tensor, new: int) -> Tensor:
        for _ in range(new):
            tokens = torch.cat((tokens, self(tokens)[:, -1:].argmax(-1)), 1)
        return tokens


def _renamed(state: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """Weights by the names of the program: one module for each expert, where ours are stacked."""
    found = {}
    for name, weight in state.items():
        before, mixer, own = name.removeprefix("stack.core.").partition(".mixer.")
        if not mixer or own == "router.weight":
            found[f"{before}.{own}" if mixer else before] = weight
        elif own != "router.bias":
            inside = own if own in ("step_embedding", "gate", "up", "down") or "norm" in own else f"attention.{own}"
            ending = "" if own == "step_embedding" else ".weight"
            for number in range(experts):
                found[f"{before}.experts.{number}.{inside}{ending}"] = weight[number]
    return found


def race(sides: dict[str, Callable[[], Tensor]]) -> dict[str, list[float]]:
    """New tokens a second of each side in each round, after one that warms up and compares their tokens."""
    found = [run() for run in sides.values()]
    assert all(tokens.equal(found[0]) for tokens in found), "the sides do not continue with the same tokens"
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            rates[name].append(NEW / (time.perf_counter() - start))
    return rates


def main(path: str = "benchmarks/results/decode-recompute.json") -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = morex.load_config("more").model
    ours = morex.build_model(config).eval()
    for weight in ours.parameters():  # initial weights say hardly more than which token came last
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.2)
    program = Program(ours).eval()
    prompt = torch.arange(1, 1 + PROMPT)[None]
    rates = race(
        {
            "theirs": lambda: program.generate(prompt, NEW),
            "eager": lambda: ours.generate(prompt, max_new_tokens=NEW),
            "compiled": lambda: ours.generate(prompt, max_new_tokens=NEW, compile=True),
        }
    )
    rows = []
    for side in ("eager", "compiled"):
        ratios = [a / b for a, b in zip(rates[side], rates["theirs"], strict=True)]
        rows.append(
            {
                **{"preset": "more", "side": side, "threads": 1, "prompt_tokens": PROMPT, "new_tokens": NEW},
                "ours_tokens_per_s": statistics.median(rates[side]),
                "theirs_tokens_per_s": statistics.median(rates["theirs"]),
                "ratio": statistics.median(ratios),
                "lowest_ratio": min(ratios),
            }
        )
        print(rows[-1])
    write_json(Path(path), rows, ["python", *sys.argv])


if __name__ == "__main__":
    main(*sys.argv[1:])
