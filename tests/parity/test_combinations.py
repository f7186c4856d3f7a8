"""Options together: whatever the config classes let one write builds and keeps the invariants, or is refused in words.

Each value of each option is drawn a few times with all others at random. The config classes are asked what there is, so
a kind or an option that is added later is drawn too.
"""

import random
import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import morex
from morex.cache.batch import KVCache
from morex.config import ModelConfig
from morex.loading import ConfigError, validate
from morex.nn.attention import Attention
from morex.sections.depth import FixedConfig
from parity.detectors import future_leak, not_finite
from parity.drawing import Option, draw, options, sections
from parity.helpers import build, labels_in, largest_change

MODELS, DRAWS = 2, 400
"""Valid configs of each option that are built, and how many are drawn for them at most."""
DEEPEST = 9
"""Unrolled depth beyond which a config is not built here, for the time that it takes."""
ROWS, LENGTH, CHUNKS = 2, 9, [4, 1, 1, 3]
NEVER = {
    "ThresholdConfig.score=unweighted": "a router without a gate and without a loss of its own learns nothing",
}
"""Values that are refused in every combination, and why they can be written at all: they are inherited."""
REMEDY = r"\b(use|leave|give|train with|raise|lower|must|needs?|goes? with|nearest|says which|should be)\b"


@cache
def names() -> set[str]:
    """Every word that names an option or a kind."""
    return {name for section in sections(ModelConfig) for name in section.model_fields}


def is_refused_in_words(error: ConfigError) -> None:
    message = str(error)
    assert "\n" not in message and "pydantic" not in message and 10 < len(message) < 400, message
    assert names() & set(re.findall(r"\w+", message)), f"no option is named: {message}"
    assert re.search(REMEDY, message), f"nothing is said that would work: {message}"


def drawn(option: Option) -> list[ModelConfig]:
    """Valid configs with this option; each draw that is not valid must have been refused in words."""
    found: list[ModelConfig] = []
    for attempt in range(DRAWS):
        try:
            config = validate(ModelConfig, draw(option, random.Random(f"{option} {attempt}")))
        except ConfigError as error:
            is_refused_in_words(error)
            continue
        if config.schedule.resolved.unrolled_depth <= DEEPEST:
            found.append(config)
        if len(found) == MODELS:
            break
    return found


@pytest.mark.parametrize("option", options(), ids=str)
def test_every_combination_works_or_is_refused(option: Option) -> None:
    configs = drawn(option)
    assert bool(configs) != (str(option) in NEVER), f"{len(configs)} of {DRAWS} drawn configs are valid"
    for config in configs:
        try:
            keeps_the_invariants(config)
        except Exception as error:
            error.add_note(f"config: {config.model_dump(exclude_defaults=True)}")
            raise


def keeps_the_invariants(config: ModelConfig) -> None:
    model = build(config)
    assert morex.count(config).parameters == sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.randint(config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([LENGTH, LENGTH - 4])
    assert not not_finite(model, tokens, lengths)
    out = model(tokens, labels=labels_in(config, tokens))
    model.update_routers(out.stats, 1)
    model.eval()
    depth = causal_depth(model)
    with torch.no_grad():
        logits = model(tokens, depth=depth).logits
        size = max(1.0, logits.abs().max().item())
        assert future_leak(model, tokens, places=(0, 3, 6), depth=depth) <= 1e-9 * size
        if config.head.kind == "lm":
            assert largest_change(cached(model, tokens, depth), logits) <= 1e-9 * size
        else:
            with pytest.raises(ValueError, match="does not decode"):
                model.new_cache(ROWS)


def causal_depth(model: Any) -> str | None:
    """The router's own depth; a fixed one where it was trained without a causal rule, and says so."""
    if all(group.router.is_causal for group in model.stack.core.groups):
        return None
    with pytest.raises(ValueError, match="no causal rule"):
        model(torch.tensor([[1, 2]]))
    return f"uniform:{model.config.schedule.recursions}"


def cached(model: Any, tokens: Tensor, depth: str | None) -> Tensor:
    """Logits [B, T, V] of tokens that are fed in chunks."""
    cache = model.new_cache(ROWS)
    return torch.cat([model(part, cache=cache, depth=depth).logits for part in tokens.split(CHUNKS, 1)], 1)


def test_every_kind_and_choice_is_drawn() -> None:
    """The options that are walked are those of the reference page: one that is missed would never be tested."""
    asked = {str(option) for option in options()}
    assert {"ModelConfig.kv=shared_first", "AttentionConfig.window=set", "HaltingConfig"} <= asked
    kinds = {section for section in sections(ModelConfig) if "kind" in section.model_fields}
    assert {section.__name__ for section in kinds} <= asked
    assert asked >= NEVER.keys()


def test_a_broken_part_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of each combination is not empty: a cache that nothing reads, and a loss that is no number."""
    (config, *_) = drawn(Option(FixedConfig))
    keeps_the_invariants(config)
    with monkeypatch.context() as patched, pytest.raises(AssertionError):
        own = KVCache.append
        patched.setattr(KVCache, "append", lambda *arguments: bool(own(*arguments)) or True)
        keeps_the_invariants(config)
    with monkeypatch.context() as patched, pytest.raises(AssertionError):
        forward = Attention.forward
        patched.setattr(Attention, "forward", lambda *arguments: forward(*arguments) / 0.0)
        keeps_the_invariants(config)


def test_a_refusal_without_a_remedy_is_found() -> None:
    for message in ("model.depth is bad luck today", "please use something else here", "depth: a\nb; use c"):
        with pytest.raises(AssertionError):
            is_refused_in_words(ConfigError(message))
