"""Checkpoints: whole or not there, checked when they are read, never unpickled."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import morex
from morex import files
from morex.loading import ConfigError
from morex.model.lm import build_model
from morex.train import checkpoint, metrics, storage, tensors
from morex.train.checkpoint import TrainState, load, load_checkpoint, newest_checkpoint, save_checkpoint
from morex.train.errors import CheckpointError, DiskFullError, RunFolderError
from morex.train.runs import RunFolder
from morex.train.tensors import model_tensors
from train.helpers import checkpoint_bytes, configure, files_of, losses, run, run_until_crash

FILES = ("model.safetensors", "optimizer.safetensors", "index.json", "state.json", "checksums.json")


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run with checkpoints step-3 and step-6; copy it before changing it."""
    return run(configure("mor-threshold", corpus), tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture
def copied(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(finished.path, tmp_path / "copy")
    return RunFolder(tmp_path / "copy")


def test_a_checkpoint_holds_five_files_and_every_tensor(finished: RunFolder) -> None:
    path = finished.checkpoints / "step-6"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    model = build_model(finished.config().model)
    saved = load_file(path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert any(name.endswith("router.threshold") for name in saved)
    moments = load_file(path / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        assert moments[f"exp_avg/{name}"].shape == moments[f"exp_avg_sq/{name}"].shape == parameter.shape
        assert float(moments[f"step/{name}"]) == 6
    state = json.loads((path / "state.json").read_text())
    assert state["step"] == 6 and state["tokens"] == 6 * 64 and state["config"] == finished.config().to_dict()


def test_only_the_newest_checkpoints_are_kept(corpus: Path, tmp_path: Path) -> None:
    done = run(configure("vanilla", corpus, "train.checkpoint_every=1", "train.keep_checkpoints=3"), tmp_path / "run")
    assert {path.name for path in done.checkpoints.iterdir()} == {"step-4", "step-5", "step-6"}


def test_a_tensor_with_two_names_is_stored_once(tmp_path: Path, corpus: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    config = configure("vanilla", corpus)
    model, other = Tied(), Tied()
    assert model_tensors(model).keys() == {"embedding.weight"}
    folder = RunFolder(tmp_path)
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(folder, model, optimizer, TrainState(step=1), config)
    path = folder.checkpoints / "step-1"
    load_checkpoint(path, other)
    assert torch.equal(other.head.weight, model.head.weight) and other.head.weight is other.embedding.weight


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def write_nonsense(path: Path) -> None:
    path.write_text("nonsense")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, write_nonsense, Path.unlink])
def test_a_damaged_checkpoint_is_refused_and_gone_around(
    name: str, damage: Callable[[Path], None], copied: RunFolder
) -> None:
    path = copied.checkpoints / "step-6"
    damage(path / name)
    model = build_model(copied.config().model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"checkpoint '.*step-6' is damaged: .*(missing|checksum|cannot be read)"):
        load_checkpoint(path, model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with pytest.warns(UserWarning, match="step-6' is damaged"):
        assert newest_checkpoint(copied) == copied.checkpoints / "step-3"


def test_resuming_goes_around_a_damaged_checkpoint_and_replaces_it(
    copied: RunFolder, finished: RunFolder, corpus: Path
) -> None:
    flip_a_bit(copied.checkpoints / "step-6" / "model.safetensors")
    with pytest.warns(UserWarning, match="looking for an older one"):
        resumed = run(configure("mor-threshold", corpus), copied.path, resume=True)
    assert checkpoint_bytes(resumed, 6) == checkpoint_bytes(finished, 6)
    assert losses(resumed) == losses(finished)
    assert newest_checkpoint(resumed) == resumed.checkpoints / "step-6"


def test_when_every_checkpoint_is_damaged_nothing_starts_over_silently(copied: RunFolder, corpus: Path) -> None:
    for path in copied.checkpoints.iterdir():
        flip_a_bit(path / "state.json")
    before = files_of(copied.path)
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="every checkpoint of run folder"):
        run(configure("mor-threshold", corpus), copied.path, resume=True)
    assert files_of(copied.path) == before


def test_a_checkpoint_of_another_config_or_model_is_refused(finished: RunFolder, corpus: Path) -> None:
    path = finished.checkpoints / "step-6"
    other = configure("mor-threshold", corpus, "model.depth.alpha=0.5")
    with pytest.raises(CheckpointError, match=r"model\.depth\.alpha is 0\.1 there and 0\.5 here"):
        load_checkpoint(path, build_model(other.model), config=other)
    wider = configure("mor-threshold", corpus, "model.vocab_size=300")
    with pytest.raises(CheckpointError, match=r"embedding\.weight is \[257, 32\] there and \[300, 32\] here"):
        load_checkpoint(path, build_model(wider.model))
    dense = configure("vanilla", corpus)
    with pytest.raises(CheckpointError, match=r"is of another model: .* is absent there"):
        load_checkpoint(path, build_model(dense.model))
    longer = configure("mor-threshold", corpus, "train.steps=100", "train.log_every=7")
    assert load_checkpoint(path, build_model(longer.model), config=longer).step == 6


def test_an_optimizer_state_of_another_model_changes_nothing(finished: RunFolder, corpus: Path, tmp_path: Path) -> None:
    config = configure("mor-threshold", corpus)
    model = build_model(config.model)
    strange = {"exp_avg/nobody.weight": storage.Piece("exp_avg/nobody.weight", "float32", (2,), (0,), (2,), "file")}
    with pytest.raises(CheckpointError, match=r"parameter nobody\.weight is absent here"):
        tensors.room_for_optimizer(model, strange)


class Disk:
    """A disk that fills up: from then on every write of the chosen kind fails as it does on a full disk."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def refuse_tensors(self, name: str, step: int) -> None:
        """Fails after a part of the file is written."""
        write = storage.write_whole

        def full(path: Path, content: bytes) -> None:
            if path.name == name and f"step-{step}." in path.parent.name:
                path.write_bytes(b"half a file")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            write(path, content)

        self.patch.setattr(storage, "write_whole", full)

    def refuse_text(self, name: str, step: int) -> None:
        """Fails when a small file is forced to disk."""
        write = files.write_whole

        def full(path: Path, text: str) -> None:
            if path.name == name and (step == 0 or f"step-{step}." in path.parent.name):
                path.with_name("half").write_text(text[:10])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            write(path, text)

        self.patch.setattr(files, "write_whole", full)

    def refuse_lines(self, after: int) -> None:
        """Fails in the middle of a metric line."""
        write, written = os.write, []

        def full(descriptor: int, content: bytes) -> int:
            written.append(write(descriptor, content if len(written) < after else content[:7]))
            if len(written) > after + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return written[-1]

        self.patch.setattr(metrics.os, "write", full)


@pytest.mark.parametrize(
    ("fill", "steps"),
    [
        (lambda disk: disk.refuse_tensors("model.safetensors", 6), [3]),
        (lambda disk: disk.refuse_tensors("optimizer.safetensors", 6), [3]),
        (lambda disk: disk.refuse_text("state.json", 6), [3]),
        (lambda disk: disk.refuse_text("checksums.json", 6), [3]),
        (lambda disk: disk.refuse_tensors("model.safetensors", 3), []),
        (lambda disk: disk.refuse_lines(4), [3]),
        (lambda disk: disk.refuse_text("summary.json", 0), [3, 6]),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(
    fill: Callable[[Disk], None], steps: list[int], corpus: Path, tmp_path: Path
) -> None:
    config = configure("mor-token", corpus)
    straight = run(config, tmp_path / "straight")
    with pytest.MonkeyPatch.context() as patch:
        fill(Disk(patch))
        with pytest.raises(DiskFullError) as caught:
            run(config, tmp_path / "run")
    left = RunFolder(tmp_path / "run")
    assert str(caught.value).startswith(f"no space left on the disk of run folder '{left.path}'")
    assert f"`morex train --resume {left.path}`" in str(caught.value) and caught.value.exit_code == 2
    assert sorted(path.name for path in left.checkpoints.iterdir()) == [f"step-{step}" for step in steps]
    for path in left.checkpoints.iterdir():
        checkpoint.verify(path)
    assert left.summary() is None
    for line in left.metrics_path.read_text(encoding="utf-8").splitlines():
        json.loads(line)

    resumed = run(config, left.path, resume=True)
    assert checkpoint_bytes(resumed, 6) == checkpoint_bytes(straight, 6)
    assert losses(resumed) == losses(straight)


def test_other_faults_of_the_disk_are_not_called_full(corpus: Path, tmp_path: Path) -> None:
    def broken(path: Path, content: bytes) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "write_whole", broken)
        with pytest.raises(OSError, match="Input/output error"):
            run(configure("vanilla", corpus), tmp_path / "run")


def test_what_a_killed_process_left_is_swept_up(corpus: Path, tmp_path: Path) -> None:
    config = configure("vanilla", corpus)
    crashed = run_until_crash(config, tmp_path / "run", step=5)
    half = crashed.checkpoints / ".step-6.new"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    resumed = run(config, crashed.path, resume=True)
    assert sorted(path.name for path in resumed.checkpoints.iterdir()) == ["step-3", "step-6"]


@pytest.mark.parametrize("preset", ["mor-expert", "more-tuned", "vanilla"])
def test_loading_gives_the_trained_model_in_eval_mode(preset: str, corpus: Path, tmp_path: Path) -> None:
    done = run(configure(preset, corpus), tmp_path / "run")
    model, tokenizer = morex.load(done.path)
    assert not model.training
    tokens = torch.tensor([tokenizer.encode("the quick brown fox")])
    expected = build_model(done.config().model)
    expected.load_state_dict(load_file(done.checkpoints / "step-6" / "model.safetensors"))
    assert torch.equal(model(tokens).logits, expected.eval()(tokens).logits)
    assert tokenizer.decode(tokenizer.encode("fox")) == "fox"

    older, _ = morex.load(done.checkpoints / "step-3")
    assert not torch.equal(older(tokens).logits, model(tokens).logits)
    same, _ = load(str(done.checkpoints / "step-6"))
    assert torch.equal(same(tokens).logits, model(tokens).logits)


def test_loading_keeps_the_format_of_the_weights(corpus: Path, tmp_path: Path) -> None:
    done = run(configure("vanilla", corpus, "train.precision=fp64", "train.steps=1"), tmp_path / "run")
    model, _ = morex.load(done.path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_what_cannot_be_loaded_is_said_in_one_sentence(finished: RunFolder, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"'.*nothing' is neither a run folder nor a checkpoint folder"):
        morex.load(tmp_path / "nothing")
    crashed = run_until_crash(configure("vanilla", corpus), tmp_path / "run", step=2)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        morex.load(crashed.path)
    alone = tmp_path / "alone" / "checkpoints" / "step-6"
    shutil.copytree(finished.checkpoints / "step-6", alone)
    with pytest.raises(RunFolderError, match="has no tokenizer folder"):
        morex.load(alone)
    with pytest.raises(ConfigError, match="device 'abacus' is unknown"):
        morex.load(finished.path, device="abacus")


def test_nothing_is_ever_unpickled(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    config = configure("mor-expert", corpus)
    crashed = run_until_crash(config, tmp_path / "run", step=5)
    run(config, crashed.path, resume=True)
    model, _ = morex.load(crashed.path)
    assert isinstance(model, nn.Module)
    # A pickle under a checkpoint's name is refused, not opened.
    path = crashed.checkpoints / "step-6" / "model.safetensors"
    path.write_bytes(pickle.dumps({"weights": [1, 2]}))
    with pytest.raises(CheckpointError):
        load_checkpoint(path.parent, model)
    with pytest.raises(CheckpointError, match="is damaged"):
        storage.read(path.parent, {"model/norm.weight": torch.zeros(32)})
