"""What moves over the first steps: the weight of balance losses, and the depth that is drawn."""

from pathlib import Path

import pytest
import torch

import morex
from morex.depth.sampled import SampledRouter, draw
from morex.model.lm import LanguageModel, build_model
from morex.nn.signals import RouterStats
from train.helpers import checkpoint_bytes, configure, losses, run, run_until_crash

BALANCE = {
    "expert_balance": ("moe", "model.mixer.router.balance_warmup_steps=4"),
    "depth_balance": ("mor-token", "model.depth.balance_warmup_steps=4"),
}


def tiny(preset: str, *overrides: str) -> LanguageModel:
    return build_model(morex.load_config(preset, list(overrides), tiny=True).model).double().train()


@pytest.mark.parametrize("loss", BALANCE)
def test_a_balance_loss_comes_in_over_its_warm_up(loss: str) -> None:
    preset, warming = BALANCE[loss]
    model, plain = tiny(preset, warming), tiny(preset)
    tokens = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(0))
    whole = plain(tokens, labels=tokens)
    balance = whole.loss_weights[loss] * whole.losses[loss]
    assert whole.loss is not None and balance > 0.005
    for step, share in ((0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)):
        if step:
            model.update_routers(model(tokens).stats, step)
        out = model(tokens, labels=tokens)
        assert out.loss is not None and torch.equal(out.losses[loss], whole.losses[loss])  # logged as it is
        assert out.loss.item() == pytest.approx((whole.loss - (1 - share) * balance).item(), abs=1e-12)
    assert model.eval()(tokens, labels=tokens).loss == plain.eval()(tokens, labels=tokens).loss


def test_what_a_curriculum_draws_rises_in_a_line() -> None:
    recursions, steps = 6, 1000
    router = SampledRouter(8, recursions, 0.5, None, "input", 0.0, seed=3, curriculum_steps=steps)
    drawn = [draw(router.mean_at(step), 0.5, 3, step) for step in range(2 * steps)]
    for first in range(0, 2 * steps, 250):
        middle = min(1.0, (first + 125) / steps) if first < steps else 1.0
        assert sum(drawn[first : first + 250]) / 250 == pytest.approx(1 + recursions * middle, abs=0.7)
    assert max(drawn[:10]) <= 2
    later = SampledRouter(8, recursions, 0.5, None, "input", 0.0, seed=3)
    assert later.mean_at(0) == recursions == router.mean_at(steps)


def test_a_model_takes_the_depth_of_its_curriculum() -> None:
    model = tiny("huginn", "model.depth.curriculum_steps=1000")
    tokens = torch.randint(0, 97, (1, 8), generator=torch.Generator().manual_seed(0))
    depths = {}
    for step in (1, 2, 1000, 1001, 1002):
        model.update_routers(RouterStats({"stack.core.groups.0.router": {}}), step)
        stats = model(tokens, labels=tokens).stats["stack.core.groups.0.router"]
        depths[step] = len(stats["active"])
    assert depths[1] == depths[2] == 1 and max(depths[step] for step in (1000, 1001, 1002)) > 2
    assert depths == {step: draw(4 * min(1, (step + 1) / 1000), 0.5, 0, step) for step in depths}


@pytest.mark.parametrize(
    ("preset", "warming"),
    [*BALANCE.values(), ("huginn", "model.depth.curriculum_steps=5")],
    ids=[*BALANCE, "curriculum"],
)
def test_warm_ups_go_on_where_they_were(preset: str, warming: str, corpus: Path, tmp_path: Path) -> None:
    config = configure(preset, corpus, warming)
    straight = run(config, tmp_path / "straight")
    run_until_crash(config, tmp_path / "run", step=5)
    resumed = run(config, tmp_path / "run", resume=True)
    assert losses(resumed) == losses(straight) and checkpoint_bytes(resumed, 6) == checkpoint_bytes(straight, 6)
    without = run(configure(preset, corpus), tmp_path / "without")
    assert losses(without) != losses(straight)
