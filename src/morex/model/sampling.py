"""How the next token is chosen from the logits: one place for the plain loop and for the engine.

All rows of a batch are done together, each with options of its own; what a row draws depends on nothing but its logits,
its options and its generator.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from morex.nn import fast

BLOCK = 128
"""Tokens of a block: likeliest tokens and draws are looked for among blocks first, then inside one."""
SMALL = 2048
"""Tokens of a vocabulary in which blocks save nothing."""
FIRST_LOOK = 64
"""Likeliest tokens that are sorted at first, where only some may be drawn; most often these are enough."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a row chooses: the likeliest token at temperature 0, else a draw.

    Filters come in the order repetition_penalty, temperature, top_k, top_p, min_p, as in transformers.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    @property
    def narrows(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k is not None or (self.top_p or 1) < 1 or bool(self.min_p)


def is_integer(value: object) -> bool:
    """Whether a value is a whole number; a truth value is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether a value is a number, and a finite one."""
    largest = sys.float_info.max
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and bool(-largest <= value <= largest)


def check_sampling(own: Sampling) -> None:
    """Raises ValueError for options out of range, or without effect."""
    if not is_finite(own.temperature) or own.temperature < 0:
        raise ValueError(f"temperature {own.temperature} must be 0 (likeliest token) or more, and finite")
    if own.top_k is not None and (not is_integer(own.top_k) or own.top_k < 1):
        raise ValueError(f"top_k {own.top_k} must be an integer of 1 or more")
    if own.top_p is not None and not (is_finite(own.top_p) and 0 < own.top_p <= 1):
        raise ValueError(f"top_p {own.top_p} must be above 0 and at most 1")
    if own.min_p is not None and not (is_finite(own.min_p) and 0 <= own.min_p <= 1):
        raise ValueError(f"min_p {own.min_p} must lie between 0 and 1")
    if not is_finite(own.repetition_penalty) or own.repetition_penalty <= 0:
        raise ValueError(f"repetition_penalty {own.repetition_penalty} must be above 0 (1 changes nothing), and finite")
    for name in ("top_k", "top_p", "min_p"):
        if getattr(own, name) is not None and own.temperature == 0:
            value = getattr(own, name)
            raise ValueError(f"{name} {value} has no effect at temperature 0, the likeliest token; set both")


def generator_of(seed: int | None, row: int) -> torch.Generator:
    """What one row draws from, on the CPU; without a seed, never the same twice."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed * 1_000_003 + row)


def rewind(generator: torch.Generator, draws: int) -> None:
    """Takes a generator back to where it was after so many draws."""
    generator.manual_seed(generator.initial_seed())
    for _ in range(draws):
        _uniform(generator)


def sample(
    logits: Tensor,
    options: Sequence[Sampling],
    generators: Sequence[torch.Generator],
    texts: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Chooses a token for each row.

    Args:
        logits: [B, V].
        options: of each row.
        generators: of each row; one that draws takes one number from its own.
        texts: tokens of each row so far; needed where a row has a repetition penalty.

    Returns:
        Token ids [B] on the CPU; -1 where the logits leave nothing to choose: one is not a number or infinite, or all
        are minus infinity.
    """
    logits = _penalised(logits, options, texts)
    tokens, top = likeliest(logits)
    for narrows, rows in _drawing(options):
        choose = _draw_narrowed if narrows else _draw
        own = [options[row] for row in rows]
        uniform = uniforms([generators[row] for row in rows])[:, None].to(logits.device)
        everyone = len(rows) == len(options)
        if everyone:
            tokens = choose(logits, top, own, uniform)
        else:
            tokens[rows] = choose(logits[rows], top[rows], own, uniform)
    # Not `isfinite`, which takes five operations for this.
    return torch.where(top.abs() < torch.inf, tokens, -1).squeeze(1).cpu()


def distribution(logits: Tensor, options: Sequence[Sampling], texts: Sequence[Sequence[int]] = ()) -> Tensor:
    """The probabilities by which `sample` chooses, as they are after penalty, temperature and filters.

    Args:
        logits, options, texts: as of `sample`.

    Returns:
        Probabilities [B, V] in float64; at temperature 0 the likeliest token has all of it. A row has zeros where its
        logits leave nothing to choose.
    """
    logits = _penalised(logits, options, texts)
    tokens, top = likeliest(logits)
    weights = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device).scatter_(1, tokens, 1)
    for narrows, rows in _drawing(options):
        own, part, highest = [options[row] for row in rows], logits[rows], top[rows]
        if narrows:
            left, ids = _narrowed(part, highest, own)
            weights[rows] = torch.zeros_like(weights[rows]).scatter_(1, ids, left)
        else:
            weights[rows] = _weights(part, highest, own).double()
    return torch.where(top.isfinite(), weights / weights.sum(-1, keepdim=True), 0)


def draw(weights: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """A token of each row by its weight in [B, V] -> [B] on the CPU; -1 where there is no weight above 0.

    Each row takes one number from its generator.
    """
    sums = weights.double().cumsum(-1)
    uniform = uniforms(generators)[:, None].to(sums.device)
    return torch.where(sums[:, -1:] > 0, _first_above(sums, uniform * sums[:, -1:]), -1).squeeze(1).cpu()


def uniforms(generators: Sequence[torch.Generator]) -> Tensor:
    """One number between 0 and 1 from each generator, in float64 on the CPU."""
    return torch.cat([_uniform(generator) for generator in generators])


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the likeliest tokens of each row, and its logit, [B, 1] each; not a number where any logit is not.

    The same as `argmax`, which takes many times longer on a CPU: the largest block is looked for first.
    """
    if fast.takes_logits(logits):
        return fast.likeliest(logits)
    if logits.shape[-1] <= SMALL:
        top, tokens = logits.max(-1, keepdim=True)
        return tokens, top
    block = _of_blocks(logits, torch.amax).argmax(-1, keepdim=True)
    values, ids = _inside(logits, block, -torch.inf)
    place = values.argmax(-1, keepdim=True)
    return ids.gather(-1, place), values.gather(-1, place)


def log_probabilities(logits: Tensor, tokens: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the distribution that the logits [B, V] stand for, as they are.

    Returns:
        Log probability of the tokens [B], and those of the likeliest ones with their ids, from the likeliest on
        [B, most], all on the CPU.
    """
    wide = _wide(logits)
    whole = wide.logsumexp(-1, keepdim=True)
    values, ids = wide.topk(most)
    chosen = wide.gather(-1, tokens[:, None].to(wide.device)) - whole
    return chosen.squeeze(1).cpu(), (values - whole).cpu(), ids.cpu()


def _uniform(generator: torch.Generator) -> Tensor:
    """One draw between 0 and 1 [1]."""
    return torch.rand(1, generator=generator, dtype=torch.float64)


def _drawing(options: Sequence[Sampling]) -> list[tuple[bool, list[int]]]:
    """The rows that draw, those from all tokens and those from some of them: whether they are narrowed, and which."""
    drawing = [row for row, own in enumerate(options) if own.temperature > 0]
    parts = [(narrows, [row for row in drawing if options[row].narrows == narrows]) for narrows in (False, True)]
    return [(narrows, rows) for narrows, rows in parts if rows]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _penalised(logits: Tensor, options: Sequence[Sampling], texts: Sequence[Sequence[int]]) -> Tensor:
    """Logits in which tokens that a text has already are less likely, by the penalty of its row."""
    rows = [row for row, own in enumerate(options) if own.repetition_penalty != 1]
    if not rows:
        return logits
    counts = torch.tensor([len(texts[row]) for row in rows])
    row = torch.tensor(rows).repeat_interleave(counts)
    penalty = torch.tensor([options[row].repetition_penalty for row in rows], dtype=torch.float64)
    token = torch.tensor([token for row in rows for token in texts[row]])
    row, token, penalty = (part.to(logits.device) for part in (row, token, penalty.repeat_interleave(counts)))
    old = logits[row, token].double()
    return logits.index_put((row, token), torch.where(old < 0, old * penalty, old / penalty).to(logits.dtype))


def _weights(logits: Tensor, top: Tensor, options: Sequence[Sampling]) -> Tensor:
    """Probabilities up to a factor [B, ...]: 1 for the likeliest token, so that no temperature is too small."""
    wide, top = _wide(logits), _wide(top)
    limits = torch.finfo(wide.dtype)
    temperature = torch.tensor([[own.temperature] for own in options], dtype=torch.float64)
    temperature = temperature.clamp(limits.tiny, limits.max).to(top)
    return (wide - top).div_(temperature).exp_()


def _draw(logits: Tensor, top: Tensor, options: Sequence[Sampling], uniform: Tensor) -> Tensor:
    """A token of each row [B, 1], from all of them: a block by its weight, then a token of this block."""
    weights = _weights(logits, top, options)
    sums = _of_blocks(weights, torch.sum).double().cumsum(-1)
    aim = uniform * sums[:, -1:]
    block = _first_above(sums, aim)
    before = torch.where(block > 0, sums.gather(-1, (block - 1).clamp(min=0)), 0)
    inside, ids = _inside(weights, block, 0)
    return ids.gather(-1, _first_above(inside.double().cumsum(-1), aim - before))


def _draw_narrowed(logits: Tensor, top: Tensor, options: Sequence[Sampling], uniform: Tensor) -> Tensor:
    """A token of each row [B, 1], from those that its filters leave."""
    weights, ids = _narrowed(logits, top, options)
    sums = weights.cumsum(-1)
    return ids.gather(-1, _first_above(sums, uniform * sums[:, -1:]))


def _narrowed(logits: Tensor, top: Tensor, options: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """Some of the likeliest tokens of each row: their weights, 0 where a filter drops them, and their ids.

    As many of the likeliest are sorted as it takes to see where the filters of all rows end.
    """
    size = logits.shape[-1]
    top_k, top_p, min_p = (
        torch.tensor([[value] for value in values], dtype=torch.float64, device=logits.device)
        for values in (
            [min(own.top_k or size, size) for own in options],
            [torch.inf if own.top_p in (None, 1) else own.top_p for own in options],
            [own.min_p or 0.0 for own in options],
        )
    )
    by_count = top_k < size
    whole = _totals(logits, top, options)
    look = min(size, max(FIRST_LOOK, 1 + max(own.top_k or 0 for own in options)))
    while True:
        values, ids = _sorted(logits, look)
        weights = _weights(values, top, options).double()
        edge = values.gather(-1, top_k.long().clamp(max=look) - 1)
        # Tokens as likely as the last of the top k stay too.
        left = torch.where(by_count, values >= edge, True)
        weights = weights * left
        total = torch.where(by_count, weights.sum(-1, keepdim=True), whole)
        # A token is dropped where those before it already reach p; the likeliest always stays.
        left &= (weights.cumsum(-1) - weights < top_p * total) & (weights >= min_p)
        last = torch.where(left, values, torch.inf).amin(-1, keepdim=True)
        # Among equals the first come first, so all of them must have been seen.
        if look == size or not (values[:, -1:] >= last).any():
            break
        look = min(size, 8 * look)
    return weights * left, ids


def _totals(logits: Tensor, top: Tensor, options: Sequence[Sampling]) -> Tensor:
    """Sum of all weights of each row [B, 1], where top_p is about all of them; else 1."""
    size = logits.shape[-1]
    rows = [row for row, own in enumerate(options) if (own.top_k or size) >= size and own.top_p is not None]
    totals = torch.ones(len(options), 1, dtype=torch.float64, device=logits.device)
    if rows:
        weights = _weights(logits[rows], top[rows], [options[row] for row in rows])
        totals[rows] = _of_blocks(weights, torch.sum).double().sum(-1, keepdim=True)
    return totals


def _sorted(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row in their order, equals by their ids: logits and ids [B, count]."""
    values, ids = logits.topk(count, sorted=False)
    ids, order = ids.sort(-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _of_blocks(x: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """What the entries of each block add up to, or their largest [B, blocks]; the last block may be shorter."""
    end = x.shape[-1] // BLOCK * BLOCK
    parts = [x[:, :end].unflatten(-1, (-1, BLOCK))] if end else []
    if end < x.shape[-1]:
        parts.append(x[:, None, end:])
    return torch.cat([reduce(part, -1) for part in parts], -1)


def _inside(x: Tensor, block: Tensor, beyond: float) -> tuple[Tensor, Tensor]:
    """Entries of one block of each row [B, 1] and their ids [B, BLOCK]; beyond the last one there is this."""
    ids = block * BLOCK + torch.arange(BLOCK, device=x.device)
    size = x.shape[-1]
    values = x.gather(-1, ids.clamp(max=size - 1))
    return values.masked_fill_(ids >= size, beyond), ids


def _first_above(sums: Tensor, aim: Tensor) -> Tensor:
    """The first place [B, 1] whose running sum is above the aim; rounding never leads to one that adds nothing."""
    aim = torch.minimum(aim, torch.nextafter(sums[:, -1:], torch.zeros_like(aim)))
    return torch.searchsorted(sums, aim, right=True).clamp(max=sums.shape[-1] - 1)
