"""The plain decoding loop: prefill once, then token by token against the KV cache. The reference for any engine."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morex.cache.batch import KVCache
from morex.cache.fixed import FixedCache
from morex.depth.policy import Depth
from morex.model.checks import check_decodes
from morex.model.compiled import check_compiles, compiled_step, fixed_cache
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
    compile: bool = False,
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
        compile: makes one graph of the decoding step, which takes up to a minute and pays for many tokens.

    Returns:
        Prompts with their continuations: a tensor where a tensor came in and no row ended early, else lists.

    Raises:
        ValueError: an empty prompt, options out of range, a model without a causal rule or that does not compile, or
            a classifier.
    """
    check_decodes(model.config, depth)
    rows = _prompts(tokens)
    own = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    check_options(max_new_tokens, own, seed, depth)
    longest = max(map(len, rows))
    check_room(model, longest, max_new_tokens)
    if compile:
        check_compiles(model, depth, use_cache)
    device = model.embedding.weight.device
    draws = [generator_of(seed, row) for row in range(len(rows))]
    options = [own] * len(rows)
    was_training = model.training
    model.eval()
    try:
        step = None
        cache: KVCache | FixedCache | None = None
        if compile:
            cache = fixed_cache(model, depth, len(rows), longest + max_new_tokens)
            step = partial(compiled_step(model, depth), cache)
        elif use_cache:
            cache = model.new_cache(len(rows))
        fresh = rows
        going = [True] * len(rows)
        for _ in range(max_new_tokens):
            if step is not None and fresh is not rows:
                ends = torch.tensor([[row[-1], len(row) - 1] for row in rows], device=device)
                logits = step(ends[:, 0], ends[:, 1])
            else:
                batch, lengths = _right_pad(fresh, device)
                logits = model(batch, lengths=lengths, cache=cache, depth=depth, logits_to_keep=1).logits[:, -1]
            new = sample(logits, options, draws).tolist()
            check_tokens(new)
            for row, token, goes in zip(rows, new, going, strict=True):
                if goes:
                    row.append(token)
            going = [goes and token != eos_id for token, goes in zip(new, going, strict=True)]
            if not any(going):
                break
            fresh = [[token] if goes else [] for token, goes in zip(new, going, strict=True)] if use_cache else rows
    finally:
        model.train(was_training)
    if isinstance(tokens, Tensor) and len(set(map(len, rows))) == 1:
        return torch.tensor(rows, device=device)
    return rows


def _right_pad(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, T] of rows of ids, and their lengths [B]; None where all are equally long."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    if min(lengths) == width:
        return torch.tensor(rows, device=device), None
    padded = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    return padded, torch.tensor(lengths, device=device)


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


def check_tokens(tokens: Sequence[int]) -> None:
    """Raises ValueError where a row has no next token."""
    for row, token in enumerate(tokens):
        if token < 0:
            raise ValueError(
                f"the logits of row {row} are not finite, so there is no next token; look for weights that are not "
                "finite, or use a wider precision"
            )
