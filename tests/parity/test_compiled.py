"""A compiled decoding step draws what the plain loop draws; graphs are few. The compiler's own back end is left out."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from parity.helpers import config_of, fresh_model, ragged_rows

CASES = ["more", "more-baseline", "vanilla", "recursive", "recursive+shared_first", "recursive+learned", "gemma3-270m"]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    counter = CompileCounter()
    monkeypatch.setattr("morex.model.compiled.BACKEND", counter)
    torch._dynamo.reset()
    return counter


@pytest.mark.parametrize("case", CASES)
def test_compiled_equals_plain(case: str, graphs: CompileCounter) -> None:
    model: Any = fresh_model(case).eval()
    prompts = [row.tolist() for row in ragged_rows(case, [5, 1, 3])]
    plain = model.generate(prompts, max_new_tokens=6)
    assert model.generate(prompts, max_new_tokens=6, compile=True) == plain
    eos = plain[1][3]
    assert model.generate(prompts, max_new_tokens=6, eos_id=eos, compile=True) == model.generate(
        prompts, max_new_tokens=6, eos_id=eos
    )
    assert graphs.frame_count == 1


def test_graphs_are_few(graphs: CompileCounter) -> None:
    """One for each power of two of room, whatever the prompt and the weights."""
    model: Any = fresh_model("more").eval()
    for length, new in ((1, 4), (9, 20), (30, 34), (3, 60), (40, 30), (60, 60)):
        prompt = [row.tolist() for row in ragged_rows("more", [length])]
        assert model.generate(prompt, max_new_tokens=new, compile=True) == model.generate(prompt, max_new_tokens=new)
        with torch.no_grad():
            model.embedding.weight.mul_(1.5)
    assert graphs.frame_count == 2


@pytest.mark.parametrize("case", ["mor-expert", "recursive+refresh", "more-tuned", "more-a"])
def test_what_is_no_graph_is_refused(case: str) -> None:
    model: Any = fresh_model(case).eval()
    assert config_of(case)
    with pytest.raises(ValueError, match="leave compile out"):
        model.generate([[1, 2]], compile=True)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    model: Any = fresh_model("more").eval()
    with pytest.raises(ValueError, match="no no-such-compiler here"):
        model.generate([[1, 2]], compile=True)
    with pytest.raises(ValueError, match="goes with a cache"):
        model.generate([[1, 2]], compile=True, use_cache=False)


def test_compiled_at_another_depth(graphs: CompileCounter) -> None:
    model: Any = fresh_model("recursive").eval()
    prompts = [row.tolist() for row in ragged_rows("recursive", [5, 2])]
    for depth in (1, 2, 5):
        plain = model.generate(prompts, max_new_tokens=4, depth=depth)
        assert model.generate(prompts, max_new_tokens=4, depth=depth, compile=True) == plain
    assert graphs.frame_count == 3
