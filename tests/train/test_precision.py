"""Device and number format: named ones are taken or refused, `auto` follows one rule."""

import pytest
import torch

from morex.loading import ConfigError
from morex.train import precision
from morex.train.precision import autocast_dtype, cpu_has_bf16, resolve_device, resolve_precision, weight_dtype

CPU = torch.device("cpu")
FORMATS = "fp32", "bf16", "fp16", "fp64"


@pytest.mark.parametrize(
    ("has_bf16", "width", "expected"), [(True, 256, "bf16"), (True, 255, "fp32"), (False, 4096, "fp32")]
)
def test_auto_on_a_cpu_needs_the_hardware_and_the_width(
    has_bf16: bool, width: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: has_bf16)
    assert resolve_precision("auto", CPU, width) == expected


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_cuda_needs_the_hardware(supported: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: supported)
    assert resolve_precision("auto", torch.device("cuda"), 32) == expected
    if not supported:
        with pytest.raises(ConfigError, match=r"train\.precision 'bf16' is not supported by cuda; use fp32 or fp16"):
            resolve_precision("bf16", torch.device("cuda"), 32)


def test_named_formats_are_taken_as_they_are() -> None:
    assert [resolve_precision(name, CPU, 32) for name in FORMATS] == list(FORMATS)
    assert [weight_dtype(name) for name in FORMATS] == [torch.float32, torch.float32, torch.float32, torch.float64]
    assert [autocast_dtype(name) for name in FORMATS] == [None, torch.bfloat16, torch.float16, None]


def test_the_hardware_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, avx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert cpu_has_bf16() is (amx or avx)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(ConfigError, match=r"device 'cuda:1' is not there: this machine has 0 CUDA devices"):
        resolve_device("cuda:1")
    for name in ("tpu", "mps"):
        with pytest.raises(ConfigError, match=rf"'{name}' is (unknown|not supported); use auto, cpu, cuda or cuda:N"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto").type == "cuda" and resolve_device("cuda:1").index == 1
    with pytest.raises(ConfigError, match="this machine has 2 CUDA devices"):
        resolve_device("cuda:2")
