"""What a training makes of a loss or a gradient norm that is not finite, or far above what it was."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from morex.sections.train import AnomalyConfig

LEAST_DEVIATION = 1e-3
"""Of a mean: the least standard deviation that is believed, so that a loss which hardly moves has no spikes."""


@dataclass
class Running:
    """Exponential mean and variance of a value."""

    number: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def include(self, value: float, window: int) -> None:
        """Counts a value; until there are `window` of them all weigh the same."""
        self.number += 1
        share = 1 / min(self.number, window)
        away = value - self.mean
        self.mean += share * away
        self.variance = (1 - share) * (self.variance + share * away * away)

    def deviations(self, value: float) -> float:
        """Standard deviations that a value lies above the mean."""
        deviation = max(math.sqrt(self.variance), LEAST_DEVIATION * abs(self.mean))
        return (value - self.mean) / deviation if deviation else 0.0


@dataclass
class Guard:
    """What was seen until now; part of a checkpoint."""

    loss: Running = field(default_factory=Running)
    grad_norm: Running = field(default_factory=Running)
    anomalies: int = 0
    """Of the whole training."""
    in_row: int = 0
    """Those since a step beyond the last one went well."""
    step: int = 0
    """Of the last anomaly."""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Guard":
        """From what `dataclasses.asdict` made of one."""
        return cls(**{**content, "loss": Running(**content["loss"]), "grad_norm": Running(**content["grad_norm"])})

    def fault(
        self, config: AnomalyConfig, losses: Mapping[str, float], objective: str, grad_norm: float | None
    ) -> str | None:
        """What is wrong with a step before its update, in words; None where nothing is.

        Args:
            losses: by name.
            objective: name of the one that is watched for spikes.
            grad_norm: None where there is nothing to judge.
        """
        values = {f"loss '{name}'": loss for name, loss in losses.items()}
        if grad_norm is not None:
            values["gradient norm"] = grad_norm
        for what, value in values.items():
            if not math.isfinite(value):
                return f"{what} is {value}"
        if config.z_score is None:
            return None
        for what, running in ((f"loss '{objective}'", self.loss), ("gradient norm", self.grad_norm)):
            if what not in values:
                continue
            away = running.deviations(values[what])
            if running.number >= config.window and away > config.z_score:
                mean = f"{away:.1f} standard deviations above its mean of {running.mean:.4g}"
                return f"{what} is {values[what]:.4g}, {mean}"
        return None

    def note(self, step: int) -> None:
        """Counts an anomaly in a step."""
        self.anomalies += 1
        self.in_row += 1
        self.step = max(self.step, step)

    def accept(self, config: AnomalyConfig, step: int, loss: float, grad_norm: float) -> None:
        """Counts a step that went well."""
        if step >= self.step:
            self.in_row = 0
        if config.z_score is not None:
            self.loss.include(loss, config.window)
            self.grad_norm.include(grad_norm, config.window)
