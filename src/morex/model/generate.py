"""The plain decoding loop: prefill once, then token by token against the KV cache. The reference for any engine."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from morex.depth.policy import Depth
from morex.model.checks import check_decodes
from morex.model.sampling import Sampling, check_sampling, generator_of, is_integer, sample

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
    own = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    check_options(max_new_tokens, own, seed, depth)
    check_room(model, max(map(len, prompts)), max_new_tokens)
    device = model.embedding.weight.device
    draws = [generator_of(seed, row) for row in range(len(prompts))]
    options = [own] * len(prompts)
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
            new = sample(logits, options, draws)[:, None]
            check_tokens(new)
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


def check_options(max_new_tokens: int, sampling: Sampling, seed: int | None, depth: Depth) -> None:
    """Raises ValueError for options of `generate` that are out of range or without effect."""
    if not is_integer(max_new_tokens) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be an integer of 0 or more")
    check_sampling(sampling)
    if seed is not None and not (is_integer(seed) and 0 <= seed < LARGEST_SEED):
        raise ValueError(f"seed {seed} must be an integer between 0 and {LARGEST_SEED - 1}")
    if depth == "oracle":
        raise ValueError("depth 'oracle' sees later tokens, so it cannot decode; leave depth out or give a fixed one")


def check_tokens(tokens: Tensor) -> None:
    """Raises ValueError where a row has no next token."""
    for row in (tokens < 0).flatten().nonzero():
        raise ValueError(
            f"the logits of row {int(row)} are not finite, so there is no next token; look for weights that are not "
            "finite, or use a wider precision"
        )
