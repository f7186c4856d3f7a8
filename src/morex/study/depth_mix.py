"""Forced depths for weights that nobody trained: how many of the tokens take how many recursions.

The router `random` decides by a hash of a token's position, so all requests share the depths of a position, and a
benchmark meets only some hundred positions. Of a few seeds the one counts whose depths come nearest to the mix there.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from morex.config import Config
from morex.depth.random_choice import uniform_hash
from morex.loading import ConfigError, is_depth_routed, load_config
from morex.model.count import expected_shares

SEEDS = 128


def shares_of(mix: Sequence[float]) -> tuple[float, ...]:
    """Share of the tokens that takes recursion r = 1..R, from the weights of depths 1..R."""
    total = sum(mix)
    return tuple(reversed([min(1.0, part / total) for part in accumulate(reversed(mix))]))


def with_depths(
    name: str,
    overrides: Sequence[str],
    tiny: bool,
    mix: Sequence[float] | None,
    prompt_tokens: tuple[int, int],
    new_tokens: int,
) -> tuple[Config, list[str]]:
    """A config whose tokens take depths in a mix, and all overrides that lead to it.

    Args:
        mix: weights of depths 1..R; None: the shares that the model's own router aims at.

    Raises:
        ConfigError: not one weight for each recursion, or none for the deepest.
    """
    config = load_config(name, overrides, tiny)
    if mix is None:
        shares = expected_shares(config.model, sum(prompt_tokens) // 2 + new_tokens)
        if not is_depth_routed(config.model) or any(later > earlier for earlier, later in pairwise(shares)):
            return config, list(overrides)
    else:
        _check(mix, name, config.model.schedule.recursions)
        shares = shares_of(mix)
    seed = nearest_seed(shares, *weights_of_positions(prompt_tokens, new_tokens))
    forced = [*overrides, f"model.depth={{kind: random, capacities: {list(shares)}, seed: {seed}}}"]
    return load_config(name, forced, tiny), forced


def _check(mix: Sequence[float], name: str, recursions: int) -> None:
    given = ",".join(f"{weight:g}" for weight in mix)
    if recursions == 1:
        raise ConfigError(f"--depth-mix {given} is for models with recursions, and '{name}' has none; leave it out")
    if len(mix) != recursions:
        raise ConfigError(
            f"--depth-mix {given} names {len(mix)} depths, and '{name}' has {recursions} recursions; give "
            f"{recursions} weights, such as {','.join(['1'] * recursions)}"
        )
    if not (min(mix) >= 0 and mix[-1] > 0 and sum(mix) < float("inf")):
        raise ConfigError(f"--depth-mix {given} must be finite weights of 0 or more, and the last above 0")


def weights_of_positions(prompt_tokens: tuple[int, int], new_tokens: int) -> tuple[Tensor, Tensor]:
    """How often a position comes [P] among all tokens that the model reads, and among those that it drew itself.

    Args:
        prompt_tokens: fewest and most tokens of a prompt, every length alike.
    """
    low, high = prompt_tokens
    read, drawn = torch.zeros(high + new_tokens), torch.zeros(high + new_tokens)
    for length in range(low, high + 1):
        read[: length + new_tokens - 1] += 1
        drawn[length : length + new_tokens - 1] += 1
    return read, drawn


def nearest_seed(shares: Sequence[float], *weights: Tensor) -> int:
    """The seed whose depths come nearest to the shares, weighted in each of these ways."""
    used = [own / own.sum() for own in weights if own.sum() > 0]
    positions = torch.arange(len(used[0]))
    keep = [now / before for before, now in pairwise((1.0, *shares))]

    def distance(seed: int) -> float:
        active, worst = torch.ones(len(positions), dtype=torch.bool), 0.0
        for r, (part, share) in enumerate(zip(keep, shares, strict=True), start=1):
            active &= uniform_hash(seed, positions, r) < part
            worst = max(worst, *(abs(float(own[active].sum()) - share) for own in used))
        return worst

    return min(range(SEEDS), key=distance)
