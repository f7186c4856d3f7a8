"""Width scaling: what training changes has the same size at every width, and nothing else is other than it was."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import morex
from morex.config import ModelConfig
from morex.experts.router import ExpertRouter
from morex.loading import ConfigError
from morex.model.lm import LanguageModel, attention_shape, build_model
from morex.model.roles import roles
from morex.sections.train import TrainConfig
from morex.train.optim import build_optimizer

BASE = 64
FAMILIES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "dense": ("vanilla", (), "adamw"),
    "dense, muon": ("vanilla", (), "muon"),
    "shared, low-rank changes": ("recursive", ("model.lora={rank: 4}",), "adamw"),
    "experts": ("moe", (), "adamw"),
    "experts, muon": ("moe", (), "muon"),
}


def wide(preset: str, width: int, *overrides: str) -> ModelConfig:
    """A tiny form at another width: heads of 16 channels, mixers twice as wide as the model."""
    heads, hidden = width // 16, "expert.d_ff" if preset == "moe" else "d_ff"
    attention = f"model.attention={{heads: {heads}, kv_heads: {heads}, head_dim: 16}}"
    return morex.load_config(
        preset, [f"model.d_model={width}", attention, f"model.mixer.{hidden}={2 * width}", *overrides], tiny=True
    ).model


def scaled(width: int = BASE, **more: int) -> str:
    return f"model.width_scaling={ {'base_width': width} | more }"


def change(config: ModelConfig, optimizer: str, steps: int = 4, lr: float = 0.003) -> dict[str, float]:
    """Root mean square of what some updates change in logits, last states and the logits of an expert router."""
    model, seen = build_model(config).train(), dict[str, Tensor]()
    model.norm.register_forward_pre_hook(lambda _, args: seen.update(states=args[0].detach()))
    for module in model.modules():
        if isinstance(module, ExpertRouter):
            plain = module.logits

            def watched(x: Tensor, plain: Any = plain) -> Tensor:
                logits: Tensor = plain(x)
                seen["router"] = logits.detach()
                return logits

            module.logits = watched  # type: ignore[method-assign]
    train = TrainConfig(optimizer=optimizer, lr=lr)  # type: ignore[arg-type]
    chosen = build_optimizer(model, train, config.width_ratio)
    for group in chosen.param_groups:
        group["lr"] = lr * group["lr_factor"]
    tokens = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(1))
    first: dict[str, Tensor] = {}
    for step in range(steps + 1):
        out = model(tokens, labels=tokens)
        now = {"logits": out.logits.detach(), **seen}
        first = first or now
        if step < steps:
            out.loss.backward()
            chosen.step()
            chosen.zero_grad()
    return {name: float((now[name] - value).square().mean().sqrt()) for name, value in first.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_coordinates_move_as_far_at_every_width(family: str) -> None:
    """The coordinate check (Yang et al. 2022, appendix D.1) from the base to four times its width."""
    preset, overrides, optimizer = FAMILIES[family]
    base = change(wide(preset, BASE, *overrides), optimizer)
    plain = change(wide(preset, 4 * BASE, *overrides), optimizer)
    held = change(wide(preset, 4 * BASE, *overrides, scaled()), optimizer)
    for name in ("logits", "states"):
        assert plain[name] > 2.2 * base[name], name
        assert 0.65 * base[name] < held[name] < 1.5 * base[name], name
    if "router" in base:
        assert plain["router"] > 2.2 * base["router"] and held["router"] < 1.2 * base["router"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_at_the_base_nothing_is_otherwise(optimizer: str) -> None:
    assert change(wide("moe", BASE), optimizer) == change(wide("moe", BASE, scaled()), optimizer)


def test_initial_weights_by_role() -> None:
    """Variances over those without: 1 / ratio inside, 1 / ratio^2 of scores, the same elsewhere."""
    lora = ("model.lora={rank: 4}", "model.depth={kind: expert_choice, router: mlp}")
    plain, held = (build_model(wide("recursive", 4 * BASE, *lora, *more)) for more in ((), (scaled(),)))
    found, divisor = set(), {"hidden": 2.0, "output": 4.0, "input": 1.0}
    for name, role in roles(plain).items():
        own, other = plain.get_parameter(name), held.get_parameter(name)
        assert torch.allclose(own, other * divisor[role], rtol=1e-5), name
        found.add(role)
    assert found == divisor.keys()


def factors(model: LanguageModel, config: ModelConfig, optimizer: str) -> dict[str, tuple[float, float]]:
    """(factor of the learning rate, decay) of each parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    train = TrainConfig(optimizer=optimizer, weight_decay=0.1)  # type: ignore[arg-type]
    groups = build_optimizer(model, train, config.width_ratio).param_groups
    return {names[id(p)]: (group["lr_factor"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_learning_rates_by_role_and_optimizer() -> None:
    config = wide("recursive", 4 * BASE, "model.lora={rank: 4}", "model.depth={kind: token_choice}", scaled())
    model = build_model(config)
    adamw, muon = factors(model, config, "adamw"), factors(model, config, "muon")
    lora, matrix = "stack.core.groups.0.lora.0.0.q", "stack.core.blocks.0.attention.q.weight"
    assert adamw[matrix] == adamw[f"{lora}.a"] == muon[f"{lora}.a"] == pytest.approx((0.25, 0.4))
    assert muon[matrix] == pytest.approx((0.5, 0.2))
    assert adamw["stack.core.groups.0.router.score.weight"][0] == 0.25
    for name in (f"{lora}.b", "embedding.weight", "norm.weight", "stack.core.blocks.0.norm1.weight"):
        assert adamw[name][0] == muon[name][0] == 1.0
    # Without, there are the two groups of always.
    assert set(factors(model, wide("recursive", BASE), "adamw").values()) == {(1.0, 0.1), (1.0, 0.0)}


def test_attention_and_logits_go_down_with_the_width() -> None:
    config = wide("vanilla", 4 * BASE, scaled())
    assert attention_shape(config).scale == 16**-0.5
    assert attention_shape(wide("vanilla", 4 * BASE, scaled(base_head_dim=4))).scale == pytest.approx(2 / 16)
    fixed = wide("vanilla", 4 * BASE, scaled(base_head_dim=4), "model.attention.scale=0.3")
    assert attention_shape(fixed).scale == 0.3
    tokens = torch.randint(0, 97, (1, 8), generator=torch.Generator().manual_seed(1))
    held, plain = build_model(config).eval(), build_model(wide("vanilla", 4 * BASE)).eval()
    plain.load_state_dict(held.state_dict())
    assert torch.allclose(held(tokens).logits, plain(tokens).logits / 4, atol=1e-6)


def test_a_classifier_is_scaled_too() -> None:
    head = "model.head={kind: classifier, classes: 3}"
    held, plain = (build_model(wide("vanilla", 2 * BASE, head, *more)).eval() for more in ((scaled(),), ()))
    plain.load_state_dict(held.state_dict())
    with torch.no_grad():
        plain.get_parameter("head.weight").div_(2)
    tokens = torch.randint(0, 97, (2, 8), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(held(tokens).logits, plain(tokens).logits, atol=1e-6)


def test_decoding_knows_of_it() -> None:
    model = build_model(wide("mor-token", 2 * BASE, scaled(base_head_dim=8))).double().eval()
    tokens = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(2)
    with torch.no_grad():
        whole = model(tokens).logits
        parts = [model(part, cache=cache).logits for part in tokens.split([5, 1, 6], dim=1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-9)


def test_a_scale_that_grows_with_the_width_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"embedding_scale multiplies .* leave one of them out"):
        wide("vanilla", BASE, "model.embedding_scale=true", scaled())
    with pytest.raises(ConfigError, match=r"model\.width_scaling\.base_width"):
        wide("vanilla", BASE, "model.width_scaling={base_width: 0}")
    assert math.isclose(wide("vanilla", BASE, scaled(16)).width_ratio, 4)
