"""The plain decoding loop: prefill once, then token by token against the KV cache. The reference for any engine."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from morex.depth.policy import Depth
from morex.model.checks import check_decodes

if TYPE_CHECKING:
    from morex.model.lm import LanguageModel

LARGEST_SEED = 2**40
"""Seeds of all rows of a batch must fit into 63 bits."""


@torch.no_grad()
def generate(
    model: "LanguageModel",
    tokens: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    seed: int | None = None,
    depth: Depth = None,
    use_cache: bool = True,
) -> Tensor | list[list[int]]:
    """Continues prompts of any lengths, each as if it were alone.

    Args:
        tokens: prompts, [B, T] or a list of lists of ids.
        max_new_tokens: tokens to add at most.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
        top_k: draw from the k likeliest only.
        top_p: draw from the smallest set of tokens whose probability reaches p.
        eos_id: a sequence ends when it draws this id, which is kept.
        seed: of the draws; row b draws from (seed, b), whoever else is in the batch.
        depth: as in the model's forward.
        use_cache: False recomputes everything for every token.

    Returns:
        Prompts with their continuations: a tensor where a tensor came in and no row ended early, else lists.

    Raises:
        ValueError: an empty prompt, options out of range, a model without a causal rule, or a classifier.
    """
    check_decodes(model.config, depth)
    prompts = _prompts(tokens)
    check_options(max_new_tokens, temperature, top_k, top_p, seed, depth)
    check_room(model, max(map(len, prompts)), max_new_tokens)
    device = model.embedding.weight.device
    draws = [generator_of(seed, row) for row in range(len(prompts))]
    was_training = model.training
    model.eval()
    try:
        cache = model.new_cache(len(prompts)) if use_cache else None
        # Texts and their lengths stay on the CPU: what a step draws is all that it waits for.
        texts, ends = _right_pad(prompts)
        fresh, lengths = texts, ends
        going = torch.ones_like(ends, dtype=torch.bool)
        for _ in range(max_new_tokens):
            batch, real = (part.to(device, non_blocking=True) for part in (fresh, lengths))
            logits = model(batch, lengths=real, cache=cache, depth=depth, logits_to_keep=1).logits[:, -1]
            new = sample(logits, temperature, top_k, top_p, draws)[:, None]
            texts = F.pad(texts, (0, 1)).scatter(1, ends[:, None], new)  # after the end of a row it is padding
            ends = ends + going
            if eos_id is not None:
                going = going & (new[:, 0] != eos_id)
                if not going.any():
                    break
            fresh, lengths = (new, going.long()) if use_cache else (texts, ends)
    finally:
        model.train(was_training)
    if isinstance(tokens, Tensor) and bool((ends == ends[0]).all()):
        return texts[:, : int(ends[0])].to(device)
    return [row[:end] for row, end in zip(texts.tolist(), ends.tolist(), strict=True)]


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Token ids [B] on the CPU from logits [B, V], row b drawn by generator b; temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1).cpu()
    wide = logits.double().cpu()
    # From the likeliest on, so that no temperature is too small to divide by.
    scores = (wide - wide.max(-1, keepdim=True).values) / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        probabilities, order = scores.softmax(-1).sort(descending=True, stable=True)
        # A token is dropped where those before it already reach p; the likeliest always stays.
        dropped = probabilities.cumsum(-1) - probabilities >= top_p
        scores = scores.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    rows = zip(scores.softmax(-1), generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])


def generator_of(seed: int | None, row: int) -> torch.Generator:
    """What one row draws from, on the CPU; without a seed, never the same twice."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed * 1_000_003 + row)


def _right_pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] and lengths [B] of rows of ids, on the CPU."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows]), torch.tensor(lengths)


def _prompts(tokens: Tensor | Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts as lists of ids. Raises ValueError where they are none."""
    prompts = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    if any(isinstance(prompt, str) or not isinstance(prompt, Sequence) for prompt in prompts):
        raise ValueError("generate needs a list of prompts, each a list of token ids, such as [[1, 2, 3]]")
    if not prompts or any(not prompt for prompt in prompts):
        raise ValueError("generate needs prompts of at least one token each")
    return [list(prompt) for prompt in prompts]


def check_room(model: "LanguageModel", longest: int, max_new_tokens: int) -> None:
    """Raises ValueError for texts that outgrow learned positions; the last new token is drawn and not read."""
    room = model.config.max_seq_len + 1 - longest
    if model.config.attention.positions == "learned" and max_new_tokens > room:
        raise ValueError(
            f"max_new_tokens {max_new_tokens} after a prompt of {longest} tokens is more than the "
            f"{model.config.max_seq_len} learned positions (model.max_seq_len) hold; use at most {max(0, room)}"
        )


def check_options(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    depth: Depth,
) -> None:
    """Raises ValueError for options of `generate` that are out of range or without effect."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be 0 or more")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature} must be 0 (likeliest token) or more, and finite")
    if seed is not None and not 0 <= seed < LARGEST_SEED:
        raise ValueError(f"seed {seed} must lie between 0 and {LARGEST_SEED - 1}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} must be 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must be above 0 and at most 1")
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        if value is not None and temperature == 0:
            raise ValueError(f"{name} {value} has no effect at temperature 0, the likeliest token; set both")
    if depth == "oracle":
        raise ValueError("depth 'oracle' sees later tokens, so it cannot decode; leave depth out or give a fixed one")
