"""AdamW with decay where it belongs, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from morex.sections.train import TrainConfig

SPARED_WORDS = ("norm", "embedding")
"""A parameter whose path has one of these words in any part is spared by `decay: matrices`."""
SPARED_MODULES = (nn.LayerNorm, nn.RMSNorm, nn.Embedding)


def build_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over two groups, with weight decay and without."""
    decayed, spared = decay_groups(model, cfg.decay)
    groups = [
        {"params": list(decayed.values()), "weight_decay": cfg.weight_decay},
        {"params": list(spared.values()), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # The fused form takes a third of the time of the plain one on a CPU.
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def decay_groups(model: nn.Module, decay: str) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Parameters by name, (decayed, spared); a shared parameter counts once, under its first name.

    The role of a parameter decides, not its number of dimensions: norms of E experts are stacked to [E, D] and are
    spared nevertheless.
    """
    decayed: dict[str, nn.Parameter] = {}
    spared: dict[str, nn.Parameter] = {}
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        group = spared if decay == "matrices" and _is_spared(name, leaf, owners[owner]) else decayed
        group[name] = parameter
    return decayed, spared


def _is_spared(name: str, leaf: str, owner: nn.Module) -> bool:
    if leaf == "bias" or leaf.endswith("_bias") or isinstance(owner, SPARED_MODULES):
        return True
    return any(word in part for part in name.split(".") for word in SPARED_WORDS)


def learning_rate(cfg: TrainConfig, step: int, steps: int | None = None) -> float:
    """Learning rate of the update that follows `step` completed updates, step = 0..steps-1.

    Warm-up rises linearly and reaches `lr` at its last update; `cosine` and `trapezoid` reach min_lr_ratio * lr at the
    last update of the run.

    Args:
        steps: updates that the run is planned for, where they differ from `cfg.steps` (a budget in seconds).
    """
    steps = cfg.steps if steps is None else steps
    warm = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    last = max(steps - 1, 0)
    fall = 0.0
    if cfg.schedule == "cosine":
        top = max(cfg.warmup_steps - 1, 0)
        share = min(max(step - top, 0) / max(last - top, 1), 1.0)
        fall = 0.5 - 0.5 * math.cos(math.pi * share)
    elif cfg.schedule == "trapezoid":
        cooldown = max(1, round(cfg.cooldown_fraction * steps))
        fall = min(max(step - (last - cooldown), 0) / cooldown, 1.0)
    return cfg.lr * min(warm, 1.0 - (1.0 - cfg.min_lr_ratio) * fall)


def same_path(before: TrainConfig, after: TrainConfig, step: int) -> bool:
    """Whether the first `step` updates have the same learning rates under both plans."""
    return all(learning_rate(before, done) == learning_rate(after, done) for done in range(step))
