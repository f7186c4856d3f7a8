"""The plain decoding loop: prefill once, then token by token against the KV cache. The reference for any engine."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morex.depth.policy import Depth

if TYPE_CHECKING:
    from morex.model.lm import LanguageModel


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
        ValueError: an empty prompt, options out of range, or a model without a causal rule.
    """
    prompts = tokens.tolist() if isinstance(tokens, Tensor) else [list(prompt) for prompt in tokens]
    _check(prompts, max_new_tokens, temperature, top_k, top_p, depth)
    device = model.embedding.weight.device
    draws = [torch.Generator().manual_seed((0 if seed is None else seed) * 1_000_003 + b) for b in range(len(prompts))]
    if seed is None and temperature > 0:
        for draw in draws:
            draw.seed()
    was_training = model.training
    model.eval()
    try:
        cache = model.new_cache(len(prompts)) if use_cache else None
        texts, fresh = [list(prompt) for prompt in prompts], [list(prompt) for prompt in prompts]
        going = list(range(len(prompts)))
        for _ in range(max_new_tokens):
            if not going:
                break
            batch, lengths = _right_pad(fresh if use_cache else texts, device)
            logits = model(batch, lengths=lengths, cache=cache, depth=depth, logits_to_keep=1).logits[:, -1]
            fresh = [[] for _ in prompts]
            for row in list(going):
                token = sample(logits[row], temperature, top_k, top_p, draws[row])
                texts[row].append(token)
                fresh[row] = [token]
                if token == eos_id:
                    going.remove(row)
                    fresh[row] = []
    finally:
        model.train(was_training)
    same = len({len(text) for text in texts}) == 1
    return torch.tensor(texts, device=device) if isinstance(tokens, Tensor) and same else texts


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """One token id from logits [V]; temperature 0 takes the likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    scores = logits.double().cpu() / temperature
    if top_k is not None and top_k < scores.shape[0]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    if top_p is not None and top_p < 1:
        probabilities, order = scores.softmax(-1).sort(descending=True, stable=True)
        # A token is dropped where those before it already reach p; the likeliest always stays.
        dropped = order[probabilities.cumsum(0) - probabilities >= top_p]
        scores[dropped] = -torch.inf
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))


def _right_pad(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows], device=device)
    width = max(1, int(lengths.max()))
    padded = [row + [0] * (width - len(row)) for row in rows]
    return torch.tensor(padded, device=device), lengths


def _check(
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    depth: Depth,
) -> None:
    if not prompts or any(not prompt for prompt in prompts):
        raise ValueError("generate needs prompts of at least one token each")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be 0 or more")
    if temperature < 0:
        raise ValueError(f"temperature {temperature} must be 0 (likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} must be 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must be above 0 and at most 1")
    if depth == "oracle":
        raise ValueError("depth 'oracle' sees later tokens, so it cannot decode; leave depth out")
