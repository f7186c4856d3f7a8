"""A block for a few tokens in one kernel, against the same block step by step; keys and values in pages."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from morex.cache.paged import PagedStore
from morex.cache.slots import KVRule
from morex.depth.schedule import Slot
from morex.infer.lists import PassLists
from morex.infer.passes import Segment
from morex.nn import fast
from morex.nn.attention import Attention, AttentionShape, Local
from morex.nn.block import WHOLE, Block, StepParts
from morex.nn.mixers import GatedFeedForward
from morex.nn.norm import LayerNorm, RMSNorm
from morex.nn.packing import pack_rows
from morex.nn.rope import Rope

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
SHAPES = [(3, 3, 64), (2, 2, 24), (2, 1, 128), (1, 8, 32), (1, 1, 6)]
"""Key/value heads, query heads of each, channels of each."""
needs_compiler = pytest.mark.skipif(not fast.is_native(), reason="there is no C++ compiler on this machine")


def block_of(shape: AttentionShape, d_model: int, d_ff: int, **options: Any) -> Block:
    norms = {name: RMSNorm(d_model, 1e-5) for name in ("norm1", "norm2")}
    for norm in norms.values():
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    parts = {"placement": "pre", "norms": norms, "mixer": GatedFeedForward(d_model, d_ff, "swiglu"), **options}
    return Block(Attention(d_model, shape), **parts)


class Run:
    """Tokens of some rows, each row at a recursion of its own and behind a text that is in the store."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, rule: KVRule, rows: Sequence[tuple[int, int]]):
        """`rows`: new tokens of each, and their recursion. A row has five tokens more behind it than the one before."""
        self.dtype, self.rule, self.rows = dtype, rule, rows
        kv_heads, group, dim = shape
        self.shape = AttentionShape(kv_heads * group, kv_heads, dim, dim**-0.5, Rope(100.0))
        self.store = PagedStore(600, 4, kv_heads, dim, dtype)
        self.segments = []
        for place, (count, _) in enumerate(rows):
            sequence, past = self.store.open(), 1 + 5 * place
            self.segments.append(Segment(sequence, past, [0] * count, None))  # type: ignore[arg-type]
            for recursion in (1, 2, 3):
                time = torch.arange(past)
                packing = pack_rows([past], time, time, past + 1)
                lists = self.store.lists([(sequence, Slot(0, recursion))], 2, packing)
                for slot in range(2):
                    lists.append(slot, *torch.randn(2, past, kv_heads, dim).to(dtype))
        counts = [count for count, _ in rows]
        time = torch.cat([1 + 5 * place + torch.arange(count) for place, count in enumerate(counts)])
        self.packing = pack_rows(counts, time, time, max(counts))

    def once(
        self, block: Block, x: Tensor, local: Local | None, parts: StepParts, on: bool
    ) -> tuple[Tensor, PagedStore]:
        """Two blocks one after another; what comes out, and the store after them."""
        store = copy.deepcopy(self.store)
        recursions = [recursion for _, recursion in self.rows]
        packing = replace(self.packing)
        lists = PassLists(store, self.rule, 0, 2, self.segments, recursions, packing)
        with fast.enabled(on), torch.no_grad():
            for place in range(2):
                x, reports = block(x, packing, lists.view(place), local, parts)
                assert not reports
        return x, store


@st.composite
def runs(draw: st.DrawFn) -> tuple[Run, Block, Tensor, Local | None, StepParts]:
    dtype = draw(st.sampled_from(list(TOLERANCES)))
    rule: KVRule = draw(st.sampled_from(["per_recursion", "shared_first"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    rows = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=6))
    run = Run(draw(st.sampled_from(SHAPES)), dtype, rule, rows)
    d_model, d_ff = draw(st.sampled_from([(32, 48), (17, 30), (64, 7)]))
    shape = run.shape if draw(st.booleans()) else replace(run.shape, rope=None)
    block = block_of(shape, d_model, d_ff).to(dtype)
    local = draw(st.sampled_from([None, Local(3, Rope(7.0)), Local(100, None)]))
    norm = RMSNorm(d_model, 1e-5).to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    parts = draw(st.sampled_from([WHOLE, StepParts(norms={"norm1": norm, "norm2": norm})]))
    return run, block, torch.randn(run.packing.num_tokens, d_model).to(dtype), local, parts


@needs_compiler
@settings(max_examples=80, deadline=None)
@given(runs())
def test_one_kernel_is_the_block(case: tuple[Run, Block, Tensor, Local | None, StepParts]) -> None:
    """What comes out, and every key, value and time that has been written."""
    run, block, x, local, parts = case
    calls: list[int] = []
    known, fast.block = fast.block, lambda *given: (calls.append(1), known(*given))[1]
    try:
        found, store = run.once(block, x, local, parts, on=True)
    finally:
        fast.block = known
    assert len(calls) == 2
    wanted, plain = run.once(block, x, local, parts, on=False)
    limit = TOLERANCES[run.dtype]
    assert found.dtype == run.dtype and (found - wanted).abs().max() <= limit * max(1, wanted.abs().max())
    assert torch.equal(store.time, plain.time)
    for own, other in ((store.k, plain.k), (store.v, plain.v)):
        assert (own - other).abs().max() <= limit * max(1, other.abs().max())
    store.check()


@needs_compiler
def test_a_token_is_what_it_is_alone() -> None:
    """To the bit, beside others and with any number of threads."""
    torch.manual_seed(0)
    for dtype in TOLERANCES:
        run = Run((3, 3, 64), dtype, "per_recursion", [(1, 1), (2, 3), (1, 2)] * 4)
        block, x = block_of(run.shape, 96, 200).to(dtype), torch.randn(16, 96).to(dtype)
        whole, _ = run.once(block, x, None, WHOLE, on=True)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        again, _ = run.once(block, x, None, WHOLE, on=True)
        torch.set_num_threads(threads)
        assert torch.equal(whole, again)
        index, run.packing = run.packing.of_rows([4])
        run.segments, run.rows = [run.segments[4]], [run.rows[4]]
        alone, _ = run.once(block, x[index], None, WHOLE, on=True)
        assert torch.equal(alone, whole[index])


def unknown_blocks() -> dict[str, Any]:
    """What the kernel does not know, by name: options of a block, or what is done to one."""

    def hooked(block: Block) -> None:
        block.attention.q.register_forward_hook(lambda *given: None)

    def with_another_map(block: Block) -> None:
        block.attention.o = torch.nn.Linear(24, 32, bias=False)

    return {
        "a norm behind the branch": {"placement": "pre_post"},
        "norms of another kind": {"norms": {"norm1": LayerNorm(32, 1e-5), "norm2": LayerNorm(32, 1e-5)}},
        "another gate": {"mixer": GatedFeedForward(32, 48, "geglu")},
        "somebody who looks inside": hooked,
        "a map of somebody else's": with_another_map,
        "weights with gradients wanted": None,
    }


@pytest.mark.parametrize("name", unknown_blocks())
def test_other_blocks_go_step_by_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    what = unknown_blocks()[name]
    monkeypatch.setattr(fast, "block", lambda *given: pytest.fail("the kernel does not know this block"))
    run = Run((2, 2, 6), torch.float32, "per_recursion", [(1, 1), (2, 2)])
    options = dict(what) if isinstance(what, dict) else {}
    if options.get("placement"):
        options["norms"] = {f"norm{i}{behind}": RMSNorm(32, 1e-5) for i in (1, 2) for behind in ("", "_after")}
    block = block_of(run.shape, 32, 48, **options)
    if callable(what):
        what(block)
    lists = PassLists(run.store, "per_recursion", 0, 2, run.segments, [1, 2], run.packing)
    with torch.set_grad_enabled(what is None):
        y, _ = block(torch.randn(3, 32), run.packing, lists.view(0))
    assert y.shape == (3, 32) and y.isfinite().all()


def test_long_rows_go_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "block", lambda *given: pytest.fail("a long row is not for this kernel"))
    run = Run((2, 2, 6), torch.float32, "per_recursion", [(5, 1), (1, 2)])
    run.once(block_of(run.shape, 32, 48), torch.randn(6, 32), None, WHOLE, on=True)
