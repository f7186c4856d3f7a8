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
from morex.nn.attention import attend_to
from morex.nn.fast import native
from morex.nn.keys import NEVER, Entries, PagedKeys
from morex.nn.linear import Linear, linear
from morex.nn.packing import Packing, pack_rows

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
