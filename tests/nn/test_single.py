"""Decoding token by token takes few calls and short ways; each is held against the plain one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import morex
from morex.nn import fast
from morex.nn.attention import Keys, attend_cached, attend_to
from morex.nn.norm import rms_norm
from morex.nn.packing import pack_batch

PROMPT = [1, 5, 2, 9, 4, 3, 7]
CALLS = {"more": 420, "more-baseline": 146, "vanilla": 490, "mor-expert": 300, "more-a": 585}
"""Operations on tensors that a new token may take, about a tenth more than it does."""


def model_of(preset: str, *overrides: str, tiny: bool = True) -> Any:
    model = morex.build_model(morex.load_config(preset, list(overrides), tiny=tiny).model).double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            parameter.add_(0.1 * noise)
    return model


@pytest.mark.parametrize("overrides", [[], ["model.attention.kv_heads=2"], ["model.mixer.branch=change"]])
def test_a_token_alone_in_its_experts(overrides: list[str]) -> None:
    layer = model_of("more", *overrides).stack.core.blocks[0].mixer
    x = torch.randn(5, layer.gate.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    packing = pack_batch((1, 1), torch.device("cpu"))
    with torch.no_grad():
        for row in x.split(1):
            alone, _ = layer(row, packing)
            with fast.enabled(False):
                plain, _ = layer(row, packing)
            assert torch.allclose(alone, plain, rtol=0, atol=1e-12)
            assert plain.abs().max() > 1e-3


@pytest.mark.skipif(not fast.is_native(), reason="there is no C++ compiler on this machine")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(
    "overrides", [[], ["model.attention.kv_heads=2"], ["model.mixer.branch=change"], ["model.mixer.d_ff=37"]]
)
def test_a_few_tokens_in_their_experts(
    overrides: list[str], dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = model_of("more", *overrides).stack.core.blocks[0].mixer.to(dtype)
    x = torch.randn(17, layer.gate.shape[-1], dtype=dtype, generator=torch.Generator().manual_seed(1))
    calls: list[int] = []
    kernel = fast.few_tokens
    monkeypatch.setattr(fast, "few_tokens", lambda x, *rest: (calls.append(x.shape[0]), kernel(x, *rest))[1])
    with torch.no_grad():
        for count in (1, 2, 5, 16, 17):
            rows, packing = x[:count], pack_batch((1, count), torch.device("cpu"))
            few, _ = layer(rows, packing)
            with fast.enabled(False):
                plain, _ = layer(rows, packing)
            assert few.dtype == dtype and (few - plain).abs().max() <= limit * plain.abs().max()
    assert calls == [1, 2, 5, 16]


def test_a_token_alone_keeps_its_gradient() -> None:
    layer = model_of("more").stack.core.blocks[0].mixer
    y, _ = layer(torch.ones(1, layer.gate.shape[-1], dtype=torch.float64), pack_batch((1, 1), torch.device("cpu")))
    y.sum().backward()
    assert layer.gate.grad.abs().max() > 0


@pytest.mark.parametrize("change", ["step", "load", "dtype"])
def test_changed_weights_count_at_once(change: str) -> None:
    """Nothing that decoding makes of the weights outlives them."""
    model, other = model_of("more"), model_of("more", "model.seed=5")
    before = model.generate([PROMPT], max_new_tokens=12)
    if change == "step":
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
                mine.copy_(theirs)
    elif change == "load":
        model.load_state_dict(other.state_dict())
    else:
        model, other = model.float(), other.float()
        model.load_state_dict(other.state_dict(), assign=True)
    after = model.generate([PROMPT], max_new_tokens=12)
    assert after == other.generate([PROMPT], max_new_tokens=12)
    assert after != before


@pytest.mark.parametrize("weight", [torch.arange(1.0, 9.0), torch.arange(1.0, 9.0)[None]])
def test_norm_of_one_row(weight: Tensor) -> None:
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        short = rms_norm(x, weight, 1e-6)
        with fast.enabled(False):
            assert torch.allclose(short, rms_norm(x, weight, 1e-6), atol=1e-6)
        assert torch.equal(rms_norm(torch.zeros(1, 8), weight, 1e-6), torch.zeros(1, 8))


@pytest.mark.parametrize("first", [0, -1, -9], ids=lambda first: f"from {first}")
@pytest.mark.parametrize("window", [None, 3, 6, 7])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_newest_tokens_see_all_keys(kv_heads: int, window: int | None, first: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 8, generator=generator)
    k, v = torch.randn(2, 2, 6, kv_heads, 8, generator=generator)
    packing = pack_batch((2, 1), torch.device("cpu"), start=torch.tensor([5, 5]))
    time = torch.arange(6).repeat(2, 1)
    time[1, 0] = first  # the second row has a gap, as where a router let tokens go
    short = attend_cached(q, packing, Keys(k, v, time, is_full=True), 0.3, window)
    assert torch.allclose(short, attend_to(q, packing, Keys(k, v, time), 0.3, window), atol=1e-6)


class Count(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", CALLS)
def test_a_new_token_takes_few_calls(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The fast paths stay away from dispatch modes; here they are what is counted.
    monkeypatch.setattr("morex.nn.fast.switch.is_in_torch_dispatch_mode", lambda: False)
    monkeypatch.setattr("morex.nn.rope.is_in_torch_dispatch_mode", lambda: False)
    model = morex.build_model(morex.load_config(preset).model).eval()

    def calls(tokens: int) -> int:
        with Count() as count:
            model.generate([PROMPT], max_new_tokens=tokens)
        return count.calls

    calls(2)
    each = (calls(12) - calls(2)) / 10
    assert each < CALLS[preset]


def test_decoding_reports_nothing_for_training() -> None:
    model = model_of("mor-expert", "model.mixer={kind: recursive, d_ff: 16, steps: 2, router: {experts: 3}}")
    tokens = torch.tensor([PROMPT])
    assert model(tokens).stats
    assert not model(tokens, cache=model.new_cache(1)).stats
