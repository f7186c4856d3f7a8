"""Losses and gradients that are not finite, or spikes: never in the weights; passed over, or gone back from."""

import json
import math
import random
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from morex.config import Config
from morex.loading import ConfigError
from morex.sections.train import AnomalyConfig
from morex.train import trainer
from morex.train.checkpoint import TrainState
from morex.train.errors import AnomalyError
from morex.train.guard import Guard, Running
from morex.train.runs import RunFolder
from morex.train.setup import Training
from train.helpers import checkpoint_bytes, configure, losses, run, state_of


def poisoned_run(config: Config, folder: Path, bad: dict[int, float], **options: Any) -> RunFolder:
    """A training whose n-th batches, counted from 1 as they are drawn, have a loss of so much."""
    forward_backward = trainer.forward_backward

    def poisoned(t: Training, batch: Any) -> Any:
        found, stats = forward_backward(t, batch)
        drawn = t.loader.state_dict()["drawn"] // config.train.batch_size
        if drawn in bad:
            found = {**found, "lm": bad[drawn]}
            for parameter in t.model.parameters():
                if parameter.grad is not None and not math.isfinite(bad[drawn]):
                    parameter.grad.fill_(bad[drawn])
        return found, stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "forward_backward", poisoned)
        return run(config, folder, **options)


def steps_of(folder: RunFolder) -> list[int]:
    return [line["step"] for line in folder.metrics("train")]


def anomalies_of(folder: RunFolder) -> list[tuple[int, str]]:
    return [(line["at"], line["fault"]) for line in folder.metrics("anomaly")]


@pytest.mark.parametrize("preset", ["vanilla", "mor-threshold"])
def test_a_batch_that_is_not_finite_is_left_out(preset: str, corpus: Path, tmp_path: Path) -> None:
    """The others are trained on as if it had not been there."""
    config = configure(preset, corpus, "train.steps=5")
    done = poisoned_run(config, tmp_path / "run", {3: math.nan})
    assert steps_of(done) == [1, 2, 3, 4, 5] and anomalies_of(done) == [(3, "loss 'lm' is nan")]
    assert "left out" in done.metrics("anomaly")[0]["done"]
    assert state_of(done, 5)["guard"]["anomalies"] == 1 and state_of(done, 5)["loader"]["drawn"] == 6 * 4
    straight = run(configure(preset, corpus, "train.steps=6"), tmp_path / "straight")
    assert losses(done)[:2] == [(step, *rest) for step, *rest in losses(straight)[:2]]
    assert losses(done)[2][1] != losses(straight)[2][1]


def test_what_was_passed_over_is_the_same_after_a_crash(corpus: Path, tmp_path: Path) -> None:
    config = configure("vanilla", corpus, "train.steps=8", "train.anomaly.z_score=4", "train.anomaly.window=2")
    bad = {2: math.inf, 5: 1e9}
    straight = poisoned_run(config, tmp_path / "straight", bad)
    assert [at for at, _ in anomalies_of(straight)] == [2, 4]
    crashed = RunFolder(tmp_path / "run")
    with pytest.raises(RuntimeError):
        poisoned_crash(config, crashed.path, bad, step=5)
    resumed = poisoned_run(config, crashed.path, bad, resume=True)
    assert losses(resumed) == losses(straight) and anomalies_of(resumed) == anomalies_of(straight)
    assert checkpoint_bytes(resumed, 8) == checkpoint_bytes(straight, 8)


def poisoned_crash(config: Config, folder: Path, bad: dict[int, float], step: int) -> None:
    """`poisoned_run` that dies after the update of a step."""
    accept = Guard.accept

    def die(self: Guard, config: AnomalyConfig, at: int, *values: float) -> None:
        if at == step:
            raise RuntimeError("the power went out")
        accept(self, config, at, *values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "accept", die)
        poisoned_run(config, folder, bad)


def test_rolling_back_takes_the_checkpoint_and_later_batches(corpus: Path, tmp_path: Path) -> None:
    """Steps 4 and 5 are done again, on the batches after the bad one."""
    constant = ("train.steps=8", "train.schedule=constant")
    config = configure("mor-threshold", corpus, *constant, "train.anomaly.action=roll_back")
    done = poisoned_run(config, tmp_path / "run", {6: math.nan})
    assert steps_of(done) == [1, 2, 3, 4, 5, 6, 7, 8]
    [line] = done.metrics("anomaly")
    assert (line["at"], line["step"]) == (6, 4) and "back to the checkpoint of step 3" in line["done"]
    state = state_of(done, 8)
    assert state["loader"]["drawn"] == (8 + 3) * 4 and state["tokens"] == 8 * 64 and state["guard"]["in_row"] == 0

    # The same by hand: three steps, then five on the batches from the seventh on.
    by_hand = run(configure("mor-threshold", corpus, "train.steps=3", "train.schedule=constant"), tmp_path / "hand")
    with pytest.MonkeyPatch.context() as patch:
        of = TrainState.of.__func__  # type: ignore[attr-defined]

        def moved(cls: type[TrainState], content: dict[str, Any]) -> TrainState:
            found: TrainState = of(cls, content)
            found.loader = {**found.loader, "drawn": 6 * 4}
            return found

        patch.setattr(TrainState, "of", classmethod(moved))
        run(configure("mor-threshold", corpus, *constant), by_hand.path, resume=True)
    assert losses(done) == losses(by_hand)
    assert checkpoint_bytes(done, 8) == checkpoint_bytes(by_hand, 8)


def test_without_a_checkpoint_a_rollback_leaves_the_batch_out(corpus: Path, tmp_path: Path) -> None:
    config = configure("vanilla", corpus, "train.anomaly.action=roll_back")
    done = poisoned_run(config, tmp_path / "run", {2: math.nan})
    assert steps_of(done) == [1, 2, 3, 4, 5, 6] and "left out" in done.metrics("anomaly")[0]["done"]


@pytest.mark.parametrize("action", ["skip", "roll_back"])
def test_too_many_in_a_row_end_the_training(action: str, corpus: Path, tmp_path: Path) -> None:
    config = configure("vanilla", corpus, f"train.anomaly.action={action}", "train.anomaly.limit=3")
    with pytest.raises(
        AnomalyError, match=r"loss 'lm' is nan at step .*after 3 more in a row .*step-3.*train.lr below"
    ):
        poisoned_run(config, tmp_path / "run", dict.fromkeys(range(5, 50), math.nan))
    assert [path.name for path in RunFolder(tmp_path / "run").checkpoints.iterdir()] == ["step-3"]


def test_scattered_ones_do_not(corpus: Path, tmp_path: Path) -> None:
    config = configure("vanilla", corpus, "train.anomaly.limit=1")
    done = poisoned_run(config, tmp_path / "run", dict.fromkeys(range(2, 40, 2), math.nan))
    assert steps_of(done) == [1, 2, 3, 4, 5, 6] and len(anomalies_of(done)) == 5


def test_a_spike_is_a_finite_value_far_above_the_running_mean() -> None:
    config, guard, draw = AnomalyConfig(z_score=5, window=20), Guard(), random.Random(1)
    for step in range(1, 60):
        loss = 3 + draw.gauss(0, 0.1)
        assert guard.fault(config, {"lm": loss}, "lm", 1.0) is None
        guard.accept(config, step, loss, 1.0)
        assert (guard.fault(config, {"lm": 5.0}, "lm", 1.0) is None) == (step < 20)
    assert guard.fault(config, {"lm": 1.0}, "lm", 0.1) is None  # far below is no harm
    assert str(guard.fault(config, {"lm": 5.0}, "lm", 1.0)).startswith("loss 'lm' is 5, ")
    assert str(guard.fault(config, {"lm": 3.0}, "lm", 40.0)).startswith("gradient norm is 40, ")
    assert guard.fault(config, {"lm": 3.0, "balance": 99.0}, "lm", 1.0) is None
    assert guard.fault(config, {"lm": 3.0, "balance": math.inf}, "lm", 1.0) == "loss 'balance' is inf"
    assert guard.fault(AnomalyConfig(), {"lm": 1e9}, "lm", 1e9) is None  # no z-score, no spikes
    assert Guard.of(json.loads(json.dumps(asdict(guard)))) == guard


def test_running_mean_and_deviation_are_those_of_the_values() -> None:
    values = [random.Random(2).gauss(4, 2) for _ in range(30)]
    running = Running()
    for value in values:
        running.include(value, window=100)
    assert math.isclose(running.mean, statistics.fmean(values))
    assert math.isclose(running.variance, statistics.pvariance(values))
    for _ in range(2000):
        running.include(7.0, window=100)
    assert math.isclose(running.mean, 7.0, rel_tol=1e-6) and running.deviations(7.0) < 1e-3


@pytest.mark.parametrize("option", ["z_score", "limit", "window"])
def test_bad_options_are_refused_in_one_sentence(option: str, corpus: Path) -> None:
    with pytest.raises(ConfigError, match=rf"train\.anomaly\.{option}"):
        configure("vanilla", corpus, f"train.anomaly.{option}=0")
