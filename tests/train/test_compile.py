"""Compiled training is plain training, in few graphs. Where nothing else is said the compiler's own back end is left
out: graphs are made and run operator by operator."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from morex.loading import ConfigError
from morex.model.lm import LanguageModel, build_model
from morex.nn import compiled
from morex.train.parallel import parallelise
from morex.train.ranks import ALONE
from train.helpers import KINDS, configure, losses, run

COMPILED = ("train.compile=true",)
USUAL = "dense", "fixed", "expert_choice accumulated", "threshold", "moe loss-free", "experts routed"
GRAPHS = dict.fromkeys(USUAL, 3) | {"exit gate": 2, "halting": 5}
"""What comes before attention, what comes behind it, and the loss, which an exit gate has elsewhere. Under `kv:
shared_first` later recursions have queries alone, in blocks of other parts."""


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


def pair(kind: str, corpus: Path, *overrides: str) -> tuple[LanguageModel, LanguageModel]:
    """A model in float64, plain and compiled."""
    preset, own = KINDS[kind]
    config = configure(preset, corpus, *own, *COMPILED, *overrides)
    plain, other = (build_model(config.model, dtype=torch.float64).train() for _ in range(2))
    parallelise(other, config.train, ALONE, "cpu")
    return plain, other


def batch(number: int) -> dict[str, Tensor]:
    """Four rows of a length of their own, every other time ragged."""
    draw = torch.Generator().manual_seed(number)
    tokens = torch.randint(257, (4, 12 + number), generator=draw)
    lengths = torch.randint(1, 12, (4,), generator=draw)
    return {"tokens": tokens, "labels": tokens, **({"lengths": lengths} if number % 2 else {})}


def step(model: LanguageModel, number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and the gradients, with which the weights are moved."""
    torch.manual_seed(number)
    out = model(**batch(number))
    assert out.loss is not None
    out.loss.backward()
    model.update_routers(out.stats, number + 1)
    found = {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None}
    with torch.no_grad():
        for own in model.parameters():
            own -= 0.1 * own.grad if own.grad is not None else 0
    model.zero_grad()
    return out.loss.detach(), found


@pytest.mark.parametrize("kind", GRAPHS)
def test_compiled_equals_plain(kind: str, corpus: Path, graphs: Any) -> None:
    """Losses and gradients of steps whose tokens take other recursions each time, in graphs of the first step."""
    plain, other = pair(kind, corpus)
    for number in range(4):
        (loss, gradients), (compiled_loss, found) = step(plain, number), step(other, number)
        assert abs(compiled_loss - loss) < 1e-9
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(found[name], gradient, rtol=0, atol=1e-9), name
        assert graphs() == GRAPHS[kind] and not counters["graph_break"]


def test_graphs_are_few(corpus: Path, graphs: Any) -> None:
    """Twice as many for passes without a gradient, whatever their lengths; none for a token alone."""
    _, model = pair("expert_choice", corpus, "model.depth.warmup_steps=20")
    shares = set()
    for number in range(16):
        torch.manual_seed(number)
        out = model(**batch(number))
        model.update_routers(out.stats, number + 1)
        shares.add(out.stats.active_shares)
    assert len(shares) > 8 and graphs() == 3
    for evaluates in (True, False):
        model.train(not evaluates)
        with torch.no_grad():
            for number in range(4):
                model(**batch(number))
            model(torch.ones(1, 1, dtype=torch.int64))
    assert graphs() <= 3 * 3  # with a gradient, without one, and without one in eval mode


@pytest.mark.slow
def test_trains_as_plain_training_does(corpus: Path, tmp_path: Path) -> None:
    """With the back end; recursions computed again, and resumed half-way."""
    torch._dynamo.reset()
    options = "train.steps=5", "train.schedule=constant"
    plain = run(configure("mor-expert", corpus, *options), tmp_path / "plain")
    again = configure("mor-expert", corpus, *options, *COMPILED, "train.recompute=recursions")
    run(again.model_copy(update={"train": again.train.model_copy(update={"steps": 3})}), tmp_path / "compiled")
    other = run(again, tmp_path / "compiled", resume=True)
    for (number, mine, *_), (theirs_number, theirs, *_) in zip(losses(plain), losses(other), strict=True):
        assert number == theirs_number and mine.keys() == theirs.keys()
        assert all(abs(mine[name] - theirs[name]) < 1e-5 for name in mine)


def test_what_cannot_be_compiled_is_refused(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'selective' chooses among operators, .* leave train.compile out"):
        configure("vanilla", corpus, *COMPILED, "train.recompute=selective")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"train.compile needs a C\+\+ compiler, and there is no no-such-compiler"):
        pair("dense", corpus)
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    assert compiled.missing_compiler("cuda") == "the package triton, which is not installed"
