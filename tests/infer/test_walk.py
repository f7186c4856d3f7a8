"""Blocks for a few tokens in one kernel, against the same blocks one by one; keys and values in pages."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from morex.cache.paged import PagedStore
from morex.cache.slots import KVRule
from morex.depth.schedule import Slot, Step
from morex.infer.lists import PassLists
from morex.infer.passes import Segment
from morex.infer.walk import Walks
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
        self, blocks: Sequence[Block], x: Tensor, locals_: Sequence[Local | None], parts: StepParts, on: bool
    ) -> tuple[Tensor, PagedStore]:
        """Two blocks one after another; what comes out, and the store after them."""
        store = copy.deepcopy(self.store)
        recursions = [recursion for _, recursion in self.rows]
        lists = PassLists(store, self.rule, 0, 2, self.segments, recursions, replace(self.packing), 64)
        steps = [("block", block, Step(place, 1), parts) for place, block in enumerate(blocks)]
        with fast.enabled(on), torch.no_grad():
            y = Walks()(("core", 0, 0), lambda: steps, x, lists, lambda step: locals_[step.block])
        return y, store


@st.composite
def runs(draw: st.DrawFn) -> tuple[Run, list[Block], Tensor, list[Local | None], StepParts]:
    dtype = draw(st.sampled_from(list(TOLERANCES)))
    rule: KVRule = draw(st.sampled_from(["per_recursion", "shared_first"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    rows = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=6))
    run = Run(draw(st.sampled_from(SHAPES)), dtype, rule, rows)
    d_model, d_ff = draw(st.sampled_from([(32, 48), (17, 30), (64, 7)]))
    shape = run.shape if draw(st.booleans()) else replace(run.shape, rope=None)
    blocks = [block_of(shape, d_model, d_ff).to(dtype) for _ in range(2)]
    local = st.sampled_from([None, Local(3, Rope(7.0)), Local(100, None)])
    locals_ = draw(st.lists(local, min_size=2, max_size=2))
    norm = RMSNorm(d_model, 1e-5).to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    parts = draw(st.sampled_from([WHOLE, StepParts(norms={"norm1": norm, "norm2": norm})]))
    return run, blocks, torch.randn(run.packing.num_tokens, d_model).to(dtype), locals_, parts


@pytest.fixture(scope="module")
def calls() -> Iterator[list[int]]:
    """Blocks of each call of the kernel."""
    found: list[int] = []
    known = fast.Walk.__call__

    def noted(walk: fast.Walk, *given: Any) -> Tensor:
        found.append(len(walk.steps))
        return known(walk, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast.Walk, "__call__", noted)
        yield found


@needs_compiler
@settings(max_examples=80, deadline=None)
@given(runs())
def test_one_kernel_is_the_blocks(
    calls: list[int], case: tuple[Run, list[Block], Tensor, list[Local | None], StepParts]
) -> None:
    """What comes out, and every key, value and time that has been written."""
    run, blocks, x, locals_, parts = case
    calls.clear()
    found, store = run.once(blocks, x, locals_, parts, on=True)
    assert calls == [2]
    wanted, plain = run.once(blocks, x, locals_, parts, on=False)
    assert calls == [2]
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
        blocks, x = [block_of(run.shape, 96, 200).to(dtype)] * 2, torch.randn(16, 96).to(dtype)
        whole, _ = run.once(blocks, x, [None, None], WHOLE, on=True)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        again, _ = run.once(blocks, x, [None, None], WHOLE, on=True)
        torch.set_num_threads(threads)
        assert torch.equal(whole, again)
        index, run.packing = run.packing.of_rows([4])
        run.segments, run.rows = [run.segments[4]], [run.rows[4]]
        alone, _ = run.once(blocks, x[index], [None, None], WHOLE, on=True)
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
def test_other_blocks_go_one_by_one(name: str, calls: list[int]) -> None:
    what = unknown_blocks()[name]
    run = Run((2, 2, 6), torch.float32, "per_recursion", [(1, 1), (2, 2)])
    options = dict(what) if isinstance(what, dict) else {}
    if options.get("placement"):
        options["norms"] = {f"norm{i}{behind}": RMSNorm(32, 1e-5) for i in (1, 2) for behind in ("", "_after")}
    block = block_of(run.shape, 32, 48, **options)
    if callable(what):
        what(block)
    calls.clear()
    lists = PassLists(run.store, "per_recursion", 0, 1, run.segments, [1, 2], run.packing, 64)
    with torch.set_grad_enabled(what is None):
        y = Walks()(
            ("core", 0, 0), lambda: [("block", block, Step(0, 1), WHOLE)], torch.randn(3, 32), lists, lambda step: None
        )
    assert y.shape == (3, 32) and y.isfinite().all()
    assert not calls


@pytest.mark.parametrize(("count", "start", "kernel_calls"), [(4, 600, [1]), (5, 500, [1]), (5, 600, []), (65, 0, [])])
def test_long_pieces_of_long_texts_go_one_by_one(
    count: int, start: int, kernel_calls: list[int], calls: list[int]
) -> None:
    """And so do more tokens than the kernel is faster for."""
    run = Run((2, 2, 6), torch.float32, "per_recursion", [(count, 1)])
    run.segments[0].start = start
    calls.clear()
    lists = PassLists(run.store, "per_recursion", 0, 1, run.segments, [1], run.packing, start + count)
    steps = [("block", block_of(run.shape, 32, 48), Step(0, 1), WHOLE)]
    with torch.no_grad():
        Walks()(("core", 0, 0), lambda: steps, torch.randn(count, 32), lists, lambda step: None)
    assert calls == (kernel_calls if fast.is_native() else [])


@needs_compiler
def test_weights_that_change_are_seen(calls: list[int]) -> None:
    """At once where they change in place, and after another look where others stand in their stead."""
    run, walks = Run((2, 2, 6), torch.float32, "per_recursion", [(1, 1), (2, 2)]), Walks()
    block, x = block_of(run.shape, 32, 48), torch.randn(3, 32)

    def once(walks: Walks) -> Tensor:
        lists = PassLists(
            copy.deepcopy(run.store), "per_recursion", 0, 1, run.segments, [1, 2], replace(run.packing), 64
        )
        with torch.no_grad():
            return walks(("core", 0, 0), lambda: [("block", block, Step(0, 1), WHOLE)], x, lists, lambda step: None)

    calls.clear()
    before = once(walks)
    with torch.no_grad():
        block.attention.v.weight.mul_(3)
    changed = once(walks)
    assert not torch.allclose(changed, before) and torch.equal(changed, once(Walks()))
    block.attention.v.weight = torch.nn.Parameter(torch.randn(12, 32))
    walks.look_again()
    assert torch.equal(once(walks), once(Walks())) and not torch.allclose(once(walks), changed)
    assert calls == [1] * 6
