"""The compiled kernels against the plain functions that they stand for."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from morex.nn import fast
from morex.nn.attention import attend_to, turn
from morex.nn.fast import native
from morex.nn.keys import NEVER, Entries, PagedKeys
from morex.nn.linear import Linear, linear
from morex.nn.packing import Packing, pack_rows
from morex.nn.rope import Rope

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
needs_compiler = pytest.mark.skipif(not fast.is_native(), reason="there is no C++ compiler on this machine")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 64, 4), (2, 8, 3), (3, 33, 9), (5, 576, 192), (16, 7, 1)])
def test_products_of_few_rows(dtype: torch.dtype, rows: int, inner: int, outer: int) -> None:
    x, weight = torch.randn(rows, inner, dtype=dtype), torch.randn(outer, inner, dtype=dtype)
    y = native.few_rows(x, weight)
    wanted = x.double() @ weight.double().t()
    assert y.dtype == dtype and y.shape == (rows, outer)
    assert (y - wanted).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-8) * wanted.abs().max()


@needs_compiler
@torch.no_grad()
def test_a_row_is_what_it_is_alone() -> None:
    """To the bit: sums do not depend on the other rows, nor on the number of threads."""
    x, weight = torch.randn(11, 100), torch.randn(77, 100)
    whole, threads = native.few_rows(x, weight), torch.get_num_threads()
    assert all(torch.equal(native.few_rows(x[i : i + 1], weight), whole[i : i + 1]) for i in range(11))
    torch.set_num_threads(2)
    assert torch.equal(native.few_rows(x, weight), whole)
    torch.set_num_threads(threads)


@needs_compiler
def test_infinities_and_nan_come_through() -> None:
    x = torch.tensor([[1.0, torch.inf], [torch.nan, 1.0], [1.0, -torch.inf]])
    for dtype in (torch.float32, torch.bfloat16):
        y = native.few_rows(x.to(dtype), torch.ones(1, 2, dtype=dtype))[:, 0]
        assert y[0] == torch.inf and y[1].isnan() and y[2] == -torch.inf


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 128), (5, 33), (7, 3, 24)])
def test_norms_of_few_numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    assert native.takes_norm(x, weight)
    y = native.few_norms(x, weight, 0.1)
    wanted = F.rms_norm(x.double(), shape[-1:], weight.double(), 0.1)
    assert y.dtype == dtype and y.shape == shape
    assert (y - wanted).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-8) * wanted.abs().max()
    turned = x.transpose(0, -2)
    assert torch.equal(native.few_norms(turned, weight, 0.1), y.transpose(0, -2)), "numbers that stand apart"


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 32), (3, 1, 64), (2, 2, 6)])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("turns", [True, False])
def test_queries_keys_and_values_in_one_call(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, rows: int, turns: bool
) -> None:
    rope, time = Rope(100.0) if turns else None, torch.arange(rows) * 3 + 2
    packing = pack_rows([1] * rows, time, time, 1)
    x = torch.randn(rows, 48, dtype=dtype)
    maps = [torch.randn(count * dim, 48, dtype=dtype) for count in (heads, kv_heads, kv_heads)]
    table = None if rope is None else packing.turns(dim, rope, torch.float32)
    found = native.project(x, maps, table, dim)
    q, k, v = [(x.double() @ weight.double().t()).view(rows, -1, dim) for weight in maps]
    wanted = [turn(q, packing, rope), turn(k, packing, rope), v]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-8) * theirs.abs().max()
    [alone] = native.project(x, maps[:1], table, dim)
    assert torch.equal(alone, found[0])


@needs_compiler
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("apart", ["room", "heads", "odd"])
def test_one_query_a_row_to_all_its_keys(dtype: torch.dtype, rows: int, apart: str) -> None:
    """Keys in a buffer with room behind them, with heads outermost, and rows with a gap that no entry fills."""
    if apart == "room":
        k, v = torch.randn(2, rows, 20, 2, 24, dtype=dtype)[:, :, :13]
    elif apart == "heads":
        k, v = torch.randn(2, rows, 2, 13, 24, dtype=dtype).transpose(2, 3)
    else:
        k, v = torch.randn(2, rows, 13 * 48 + 5, dtype=dtype)[:, :, :-5].unflatten(2, (13, 2, 24))
    q = torch.randn(rows, 6, 24, dtype=dtype)
    found = native.attend_rows(q, k, v, 0.3)
    wanted = F.scaled_dot_product_attention(
        q.double()[:, :, None], k.double().transpose(1, 2), v.double().transpose(1, 2), scale=0.3, enable_gqa=True
    )
    assert (found - wanted[:, :, 0]).abs().max() <= TOLERANCES[dtype]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 15, 64, 1000, 5003])
def test_the_first_of_the_largest(dtype: torch.dtype, size: int) -> None:
    x = torch.randn(9, size, dtype=dtype)
    x[1] = 0.0
    x[2] = -torch.inf
    x[3, size // 2] = torch.inf
    x[4, [size // 3, size - 1]] = 9.0
    tokens, top = native.likeliest(x)
    values, places = x.max(-1, keepdim=True)
    assert top.dtype == dtype and torch.equal(top, values)
    first = (x == values).int().argmax(-1, keepdim=True)
    assert torch.equal(tokens, first) and torch.equal(x.gather(1, places), values)
    for place in {0, size // 2, size - 1}:
        y = x.clone()
        y[5, place] = torch.nan
        assert native.likeliest(y)[1].isnan().flatten().tolist() == [row == 5 for row in range(9)]


def test_linear_takes_the_plain_path_where_there_are_gradients() -> None:
    layer, x = Linear(6, 5), torch.randn(3, 6)
    y = layer(x)
    y.sum().backward()
    assert layer.weight.grad is not None and torch.equal(y, F.linear(x, layer.weight, layer.bias))
    with torch.no_grad():
        assert torch.allclose(layer(x), y, atol=1e-6)
        assert linear(x.double(), layer.weight.double()).dtype == torch.float64


@st.composite
def pages_and_queries(draw: st.DrawFn) -> tuple[Tensor, Packing, PagedKeys, int | None]:
    dtype = draw(st.sampled_from(list(TOLERANCES)))
    kv_heads, group, dim = draw(st.sampled_from([(3, 3, 64), (2, 2, 24), (2, 1, 128), (1, 8, 32), (1, 1, 5)]))
    counts = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    lengths = [draw(st.integers(count, 40)) for count in counts]
    size, window = draw(st.integers(1, 6)), draw(st.sampled_from([None, 1, 6]))
    torch.manual_seed(draw(st.integers(0, 99)))
    most = -(-max(lengths) // size)
    k, v = torch.randn(2, most * len(counts) + 3, size, kv_heads, dim, dtype=dtype)
    pages = torch.randperm(k.shape[0])[: most * len(counts)].view(len(counts), most).int()
    time, times = torch.full((len(counts), max(lengths)), NEVER), []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        time[row, :length] = torch.randperm(length + 10)[:length].sort().values
        times.append(time[row, length - count : length])
    packing = pack_rows(counts, torch.cat(times), torch.cat(times), max(counts))
    q = torch.randn(sum(counts), kv_heads * group, dim, dtype=dtype)
    return q, packing, PagedKeys(k, v, pages, Entries(lambda: time)), window


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(pages_and_queries())
def test_attention_in_pages_is_attention_to_a_copy(case: tuple[Tensor, Packing, PagedKeys, int | None]) -> None:
    """Short rows and long ones, any page size, with a window or without."""
    q, packing, keys, window = case
    found = attend_to(q, packing, keys, 0.3, window)
    wanted = attend_to(q, packing, keys.padded(), 0.3, window)
    assert (found - wanted).abs().max() <= TOLERANCES[q.dtype]


@needs_compiler
def test_the_seconds_of_kernels_are_collected_where_somebody_asks() -> None:
    logits = torch.randn(2, 50)
    with fast.kernel_seconds() as spent:
        fast.likeliest(logits)
        with fast.kernel_seconds() as inner:
            fast.likeliest(logits)
        fast.likeliest(logits)
    assert len(spent) == 2 and len(inner) == 1 and min(spent + inner) > 0
    fast.likeliest(logits)
    assert len(spent) == 2


@pytest.mark.parametrize("variables", [{"CXX": "/no/such/compiler"}, {"CXX": "false"}, {"MOREX_NATIVE": "0"}])
def test_without_kernels_everything_takes_its_plain_path(variables: dict[str, str], tmp_path: object) -> None:
    program = (
        "import torch; from morex.nn import fast; from morex.nn.linear import linear\n"
        "assert not fast.is_native()\n"
        "x, w = torch.randn(3, 8), torch.randn(5, 8)\n"
        "assert torch.equal(linear(x, w), torch.nn.functional.linear(x, w))"
    )
    environment = {**os.environ, "MOREX_CACHE": str(tmp_path), **variables}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_seen_is_that_of_each_packing() -> None:
    """Packings come and go, and one may stand where another stood."""
    k, v = torch.zeros(2, 2, 5, 1, 4)
    keys = PagedKeys(k, v, torch.tensor([[0, 1]], dtype=torch.int32), Entries(lambda: torch.arange(10)[None]))
    for time in range(10):
        now = torch.tensor([time])
        row, start, end = keys.entries.seen_by(pack_rows([1], now, now, 1), 3)
        assert (row.tolist(), start.tolist(), end.tolist()) == ([0], [max(0, time - 2)], [time + 1])
