"""Tensors on disk: divided over files and ranks, whole again when read, written beside a training that goes on."""

import json
import random
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import morex
from morex import files
from morex.model.lm import build_model
from morex.train import storage
from morex.train.checkpoint import TrainState, load_checkpoint, newest_checkpoint, read_state, save_checkpoint, verify
from morex.train.errors import CheckpointError, DiskFullError
from morex.train.export import export_weights
from morex.train.optim import build_optimizer
from morex.train.ranks import ALONE
from morex.train.runs import RunFolder
from train.helpers import checkpoint_bytes, configure, files_of, losses, run


def write(folder: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Writes tensors alone and returns the checksums of the files."""
    found: dict[str, str] = {}
    storage.write(tensors, storage.Writer(folder, None, folder.mkdir, found.update), None, False, lambda: None)
    return found


def test_what_is_written_is_read_whatever_the_file_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.Generator().manual_seed(0)
    tensors = {f"model/{n}.weight": torch.randn(n + 1, 5, generator=drawn) for n in range(6)}
    tensors |= {
        "model/empty": torch.zeros(0, 3),
        "optimizer/step/a": torch.tensor(7.0),
        "model/view": torch.ones(4, 4).T,
    }
    tensors |= {"optimizer/random/cpu": torch.arange(9, dtype=torch.uint8), "model/inf": torch.tensor([-torch.inf])}
    for size in (1, 100, 2**30):
        monkeypatch.setattr(storage, "FILE_BYTES", size)
        folder = tmp_path / str(size)
        digests = write(folder, tensors)
        assert {path.name: files.sha256(path) for path in folder.iterdir()} == digests
        found = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        storage.read(folder, found)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert {path.name for path in (tmp_path / str(2**30)).iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "index.json"
    }  # fmt: skip
    assert len(list((tmp_path / "1").iterdir())) == len(tensors)  # the empty one shares a file, and there is the index
    assert load_file(tmp_path / str(2**30) / "model.safetensors").keys() == {
        name.removeprefix("model/") for name in tensors if name.startswith("model/")
    }


def test_another_number_format_is_read_as_the_one_that_is_asked_for(tmp_path: Path) -> None:
    values = torch.randn(3, 4, dtype=torch.float64)
    write(tmp_path / "at", {"model/a": values})
    found = {"model/a": torch.zeros(3, 4, dtype=torch.bfloat16)}
    storage.read(tmp_path / "at", found)
    assert torch.equal(found["model/a"], values.bfloat16())


def test_what_does_not_read_back_as_it_was_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flipped(path: Path, content: bytes) -> None:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr(storage, "write_whole", flipped)
    with pytest.raises(OSError, match="does not read back as it was written"):
        write(tmp_path / "at", {"model/a": torch.ones(3)})


@pytest.mark.slow
def test_ten_thousand_damages_and_never_a_wrong_load(corpus: Path, tmp_path: Path) -> None:
    """A file of a checkpoint is cut short or has a byte changed: it is refused in one sentence, or loads as it was."""
    config = configure("vanilla", corpus, "model.d_model=8", "model.vocab_size=257", "train.steps=1")
    done = run(config, tmp_path / "run")
    path = done.checkpoint_path(1)
    model, expected = build_model(config.model), build_model(config.model)
    load_checkpoint(path, expected)
    whole, draw = {file: file.read_bytes() for file in sorted(path.iterdir())}, random.Random(3)
    harmless = 0
    for number in range(10_000):
        file = draw.choice(list(whole))
        content = bytearray(whole[file])
        if number % 2:
            del content[draw.randrange(len(content)) :]
        else:
            content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
        file.write_bytes(content)
        try:
            verify(path)
            state = read_state(path)
        except CheckpointError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            harmless += 1
            load_checkpoint(path, model)
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
            assert TrainState.of(state).step == 1
        file.write_bytes(whole[file])
    assert harmless < 100  # the form of checksums.json alone, a space say, may change without harm


def test_a_checkpoint_in_the_background_is_of_its_step_and_the_training_goes_on(corpus: Path, tmp_path: Path) -> None:
    config = configure("mor-threshold", corpus, "train.save_in_background=true")
    straight = run(configure("mor-threshold", corpus, "train.save_in_background=false"), tmp_path / "straight")
    goes_on, seen = threading.Event(), []
    update, write = morex.model.lm.LanguageModel.update_routers, storage.write_whole

    def update_and_tell(self: Any, stats: Any, step: int) -> None:
        update(self, stats, step)
        if step == 5:
            goes_on.set()

    def wait_and_write(path: Path, content: bytes) -> None:
        if path.parent.name == ".step-3.new":
            seen.append(goes_on.wait(60))
        write(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(morex.model.lm.LanguageModel, "update_routers", update_and_tell)
        patch.setattr(storage, "write_whole", wait_and_write)
        done = run(config, tmp_path / "run")
    assert seen and all(seen)
    for step in (3, 6):
        assert checkpoint_bytes(done, step) == checkpoint_bytes(straight, step)
    assert losses(done) == losses(straight)


def test_a_disk_that_fills_up_in_the_background_stops_the_training(corpus: Path, tmp_path: Path) -> None:
    config = configure("vanilla", corpus, "train.save_in_background=true", "train.steps=9")
    write = storage.write_whole

    def full(path: Path, content: bytes) -> None:
        if path.parent.name == ".step-6.new":
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "write_whole", full)
        with pytest.raises(DiskFullError, match="nothing saved before was touched"):
            run(config, tmp_path / "run")
    assert [path.name for path in RunFolder(tmp_path / "run").checkpoints.iterdir()] == ["step-3"]
    resumed = run(config, tmp_path / "run", resume=True)
    straight = run(configure("vanilla", corpus, "train.steps=9"), tmp_path / "straight")
    assert checkpoint_bytes(resumed, 9) == checkpoint_bytes(straight, 9)


def test_checkpoints_at_multiples_are_kept_for_good(corpus: Path, tmp_path: Path) -> None:
    options = ("train.checkpoint_every=1", "train.keep_checkpoints=1", "train.keep_every=2", "train.steps=5")
    done = run(configure("vanilla", corpus, *options), tmp_path / "run")
    assert {path.name for path in done.checkpoints.iterdir()} == {"step-2", "step-4", "step-5"}


def test_a_checkpoint_of_a_newer_version_is_refused(corpus: Path, tmp_path: Path) -> None:
    done = run(configure("vanilla", corpus, "train.steps=1"), tmp_path / "run")
    path = done.checkpoint_path(1)
    state = json.loads((path / "state.json").read_text())
    files.write_json(path / "state.json", {**state, "format": 99})
    sums = json.loads((path / "checksums.json").read_text())
    files.write_json(path / "checksums.json", {**sums, "state.json": files.sha256(path / "state.json")})
    with pytest.raises(CheckpointError, match=r"has format 99; this version reads \d"):
        morex.load(done.path)


def test_a_run_goes_on_in_another_precision(corpus: Path, tmp_path: Path) -> None:
    first = run(
        configure("mor-expert", corpus, "train.precision=fp64", "train.steps=3", "train.schedule=constant"),
        tmp_path / "run",
    )
    kept = load_file(first.checkpoint_path(3) / "model.safetensors")
    config = configure("mor-expert", corpus, "train.precision=fp32", "train.steps=3")
    model = build_model(config.model)
    optimizer = build_optimizer(model, config.train)
    load_checkpoint(first.checkpoint_path(3), model, optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept[name].to(tensor.dtype))
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    for precision in ("fp32", "bf16"):
        steps = {"fp32": 5, "bf16": 6}[precision]
        config = configure(
            "mor-expert", corpus, f"train.precision={precision}", f"train.steps={steps}", "train.schedule=constant"
        )
        run(config, tmp_path / "run", resume=True)
    assert [step for step, *_ in losses(first)] == [*range(1, 7)]
    assert first.config().train.precision == "bf16"


def test_weights_are_exported_to_one_file(corpus: Path, tmp_path: Path) -> None:
    done = run(configure("mor-threshold", corpus), tmp_path / "run")
    size = export_weights(done.path, tmp_path / "new" / "weights.safetensors")
    assert (tmp_path / "new" / "weights.safetensors").stat().st_size == size
    found = load_file(tmp_path / "new" / "weights.safetensors")
    kept = load_file(done.checkpoint_path(6) / "model.safetensors")
    assert found.keys() == kept.keys() and all(torch.equal(found[name], kept[name]) for name in kept)
    export_weights(done.checkpoint_path(3), tmp_path / "half.safetensors", "bf16")
    half, older = (
        load_file(path) for path in (tmp_path / "half.safetensors", done.checkpoint_path(3) / "model.safetensors")
    )
    assert all(torch.equal(half[name], older[name].bfloat16()) for name in older)
    with pytest.raises(morex.loading.ConfigError, match="is there already"):
        export_weights(done.path, tmp_path / "half.safetensors")


def test_a_save_alone_warns_of_nothing(corpus: Path, tmp_path: Path) -> None:
    config = configure("vanilla", corpus)
    model = build_model(config.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = RunFolder(tmp_path)
        save_checkpoint(folder, model, build_optimizer(model, config.train), TrainState(step=2), config, ALONE)
        load_checkpoint(folder.checkpoint_path(2), model)
    assert newest_checkpoint(folder) == folder.checkpoint_path(2)
    assert all(path.suffix in (".safetensors", ".json") for path in map(Path, files_of(tmp_path)))
