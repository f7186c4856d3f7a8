"""Trace files: what is in them, and that they come back as they went."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis.helpers import GROUP, LAYER, perturbed, tiny
from morex.analysis import analyze_trace, load_trace, save_trace
from morex.analysis.trace import Decisions, Moves, decisions, join, write_trace
from morex.analysis.vocabulary import CLASSES
from morex.data.errors import DataError


def traced(preset: str, *overrides: str, depth: Any = None) -> tuple[Any, torch.Tensor, torch.Tensor, Any]:
    config = tiny(preset, *overrides).model
    tokens = torch.randint(97, (3, 12), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([12, 5, 1])
    with torch.no_grad():
        trace = perturbed(config)(tokens, lengths=lengths, depth=depth, return_trace=True).trace
    return trace, tokens, lengths, config


def assert_same(a: Any, b: Any) -> None:
    """Equal to the bit, NaN where NaN."""
    if dataclasses.is_dataclass(a):
        assert type(a) is type(b)
        for item in dataclasses.fields(a):
            assert_same(getattr(a, item.name), getattr(b, item.name))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("preset", ["vanilla", "mor-expert", "mor-token", "mor-act", "moe", "more", "more-c"])
def test_round_trip(preset: str, tmp_path: Path) -> None:
    trace, tokens, lengths, config = traced(preset)
    save_trace(tmp_path / "t.npz", trace, tokens, lengths, config)
    assert_same(load_trace(tmp_path / "t.npz"), decisions(trace, tokens, lengths, config))
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_classes_are_kept(tmp_path: Path) -> None:
    trace, tokens, _, config = traced("mor-token")
    kinds = np.arange(97, dtype=np.uint8) % 6
    found = decisions(trace, tokens, None, config, "oracle", kinds, kinds % 3)
    assert found.lengths.tolist() == [12] * 3
    write_trace(tmp_path / "t.npz", found)
    assert_same(load_trace(tmp_path / "t.npz"), found)


def test_names_and_shapes_are_those_documented(tmp_path: Path) -> None:
    trace, tokens, lengths, config = traced("mor-threshold", "model.mixer={kind: layer_recurrent, steps: 2}")
    save_trace(tmp_path / "t.npz", trace, tokens, lengths, config)
    with np.load(tmp_path / "t.npz", allow_pickle=False) as file:
        shapes = {name: file[name].shape for name in file.files}
        assert int(file["format"]) == 1
    groups = {f"{key}/{GROUP}": (3, 3, 12) for key in ("active", "scores", "start", "moved", "cosine")}
    for name, shape in groups.items():
        assert shapes[name] == shape
    # Three recursions of two steps: six choices of two among four experts.
    assert shapes[f"experts/{LAYER}"] == (6, 3, 12, 2)
    assert shapes[f"expert_logits/{LAYER}"] == (6, 3, 12, 4)
    assert shapes[f"expert_calls/{LAYER}"] == (6, 2)
    assert shapes[f"expert_moved/{LAYER}"] == (6, 3, 12)
    assert shapes["tokens"] == shapes["depth"] == (3, 12)
    assert {"format", "config", "policy", "lengths"} <= set(shapes)


def test_moves_are_those_of_the_states() -> None:
    trace, tokens, lengths, config = traced("recursive")
    found = decisions(trace, tokens, lengths, config).groups[GROUP].moves
    group = trace.groups[GROUP]
    states = [group.start, *group.states]
    for r in range(3):
        for b, t in ((0, 11), (1, 2), (2, 0)):
            before, after = states[r][b, t].tolist(), states[r + 1][b, t].tolist()
            start = math.sqrt(sum(x * x for x in before))
            moved = math.sqrt(sum((y - x) ** 2 for x, y in zip(before, after, strict=True)))
            dot = sum(x * y for x, y in zip(before, after, strict=True))
            assert found.start[r, b, t] == pytest.approx(start)
            assert found.moved[r, b, t] == pytest.approx(moved)
            assert found.cosine[r, b, t] == pytest.approx(dot / start / math.sqrt(sum(y * y for y in after)))
            assert found.change[r, b, t] == pytest.approx(moved / start)


def test_zero_states_have_no_change() -> None:
    zero = np.zeros((1, 1, 1))
    assert np.isnan(Moves(zero, zero + 1, zero).change).all()


def test_choices_stand_at_their_recursion_when_nobody_takes_another() -> None:
    """A layer reports choices only for the recursions that were run."""
    config = tiny("mor-random", "model.mixer={kind: moe, router: {experts: 3, top_k: 1}}").model
    model = perturbed(config)
    tokens = torch.randint(97, (1, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trace = model(tokens, depth=2, return_trace=True).trace
    group = trace.groups[GROUP]
    # As a router without a hierarchy may decide: nobody takes recursion 1, and all take recursion 2.
    group.active[0] = torch.zeros_like(group.active[0])
    choices = trace.choices[LAYER]
    for name, calls in trace.choices.items():
        if ".core." in name:
            del calls[0]
    layer = decisions(trace, tokens, None, config).layers[LAYER]
    assert (layer.experts[0] == -1).all() and np.isnan(layer.logits[0]).all()
    assert layer.calls.tolist() == [[1, 1], [2, 1]]
    np.testing.assert_array_equal(layer.experts[1], choices[0].experts.numpy())


def test_sequence_layers_belong_to_their_own_group() -> None:
    trace, tokens, lengths, config = traced(
        "mor-token", "model.schedule.sharing=sequence", "model.mixer={kind: moe, router: {experts: 3, top_k: 1}}"
    )
    found = decisions(trace, tokens, lengths, config)
    for block, group in enumerate(found.groups.values()):
        layer = found.layers[f"stack.core.blocks.{block}.mixer.router"]
        np.testing.assert_array_equal(layer.experts[..., 0] >= 0, group.active)


def test_join_pads_shorter_batches() -> None:
    trace, tokens, lengths, config = traced("more-c")
    whole = decisions(trace, tokens, lengths, config)
    joined = join([whole, whole])
    assert joined.tokens.shape == (6, 12) and joined.lengths.tolist() == [12, 5, 1, 12, 5, 1]
    np.testing.assert_array_equal(joined.layers[LAYER].experts[:, 3:], whole.layers[LAYER].experts)
    short = Decisions(config, "router", np.ones((1, 4), int), np.array([4]), np.ones((1, 4), int))
    padded = join([short, dataclasses.replace(short, tokens=np.ones((1, 6), int), depth=np.ones((1, 6), int))])
    assert padded.tokens.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6] and padded.real[0].sum() == 4


def test_other_files_are_refused(tmp_path: Path) -> None:
    trace, tokens, lengths, config = traced("mor-token")
    save_trace(tmp_path / "t.npz", trace, tokens, lengths, config)
    with np.load(tmp_path / "t.npz") as file:
        arrays = {name: file[name] for name in file.files}

    def refused(changes: dict[str, Any]) -> str:
        np.savez(tmp_path / "bad.npz", **{name: x for name, x in (arrays | changes).items() if x is not None})
        with pytest.raises(DataError) as error:
            load_trace(tmp_path / "bad.npz")
        assert "bad.npz" in str(error.value)
        return str(error.value)

    assert "format 9" in refused({"format": np.array(9)})
    assert "format -1" in refused({"format": None})
    assert "tokens" in refused({"tokens": None})
    assert "frame" in refused({"depth": arrays["depth"][:, :3]})
    assert f"moved/{GROUP}" in refused({f"moved/{GROUP}": None})
    assert "damaged" in refused({"config": np.array('{"vocab_size": 3}')})
    assert "lengths" in refused({"lengths": arrays["lengths"] * 100})
    assert "tokens" in refused({"tokens": -arrays["tokens"] - 1})
    # An array of objects would have to be unpickled.
    assert "damaged" in refused({"policy": np.array([{}], dtype=object)})
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match="no trace file"):
        load_trace(tmp_path / "text.npz")
    whole = (tmp_path / "t.npz").read_bytes()
    (tmp_path / "flipped.npz").write_bytes(whole[:2000] + bytes(b ^ 255 for b in whole[2000:2100]) + whole[2100:])
    with pytest.raises(DataError, match="damaged"):
        analyze_trace(tmp_path / "flipped.npz")
    classes = {f"token_class{end}": x for end, x in (("", np.full_like(arrays["tokens"], 99)), ("_names", CLASSES))}
    for changes in ({f"active/{GROUP}": arrays[f"active/{GROUP}"][:1]}, classes):
        np.savez(tmp_path / "bad.npz", **(arrays | changes))
        with pytest.raises(DataError, match=r"bad\.npz.*damaged"):
            analyze_trace(tmp_path / "bad.npz")
    with pytest.raises(OSError):
        load_trace(tmp_path / "absent.npz")
