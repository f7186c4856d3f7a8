"""Kernels in C++ for decoding on a CPU, compiled for this machine when they are first needed and kept.

Where there is no compiler, or `MOREX_NATIVE=0` says so, everything takes its plain path.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.profiler import record_function

from morex import files
from morex.nn.fast.switch import available

SOURCES = sorted(Path(__file__).with_name("kernels").iterdir())
# Not -ffast-math: it would round denormal numbers to zero for the whole process.
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast", "-fopenmp-simd"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
)
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float64: "f64", torch.int64: "i64"}
MULTIPLIED = torch.float32, torch.bfloat16
"""Number formats for whose products there are kernels."""
ATTENDED = *MULTIPLIED, torch.float64
"""And for whose attention."""
PLAIN = Tensor, Parameter
POINTER, INTEGER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
ARGUMENTS = {
    "linear": [POINTER] * 3 + [INTEGER] * 3,
    "likeliest": [POINTER] * 3 + [INTEGER] * 2,
    "norm": [POINTER] * 3 + [INTEGER] * 2 + [REAL],
    "project": [POINTER] * 6,
    "attend": [POINTER] * 5 + [INTEGER] * 2 + [POINTER] * 3 + [INTEGER] * 4 + [REAL],
    "blocks": [POINTER] * 5,
    "claim": [POINTER] * 3 + [INTEGER] * 2 + [POINTER] * 2,
    "experts": [POINTER] * 6 + [REAL],
}
RETURNS = {"claim": INTEGER}
FEW_NUMBERS = 2**15
"""Up to so many numbers a norm is faster in one call of one thread. Measured."""
_spent: list[float] | None = None
"""Where the seconds of kernels are collected, if anybody asks."""
SMALL = 2**14
"""Numbers of a weight matrix that is small: one row of it is done before the kernel has been called."""


def is_native() -> bool:
    """Whether the kernels can be had on this machine; compiles them where that has not been done."""
    return _library() is not None


def takes_rows(x: Tensor, *weights: Tensor) -> bool:
    """Whether `few_rows` or `project` may take x [N, D] and weights [O, D], and is faster than torch."""
    if not may_run(x, *weights):
        return False
    fits = x.dim() == 2 and x.dtype in MULTIPLIED and 0 < x.shape[0] <= most_rows(x.dtype)
    is_plain = fits and all(weight.dtype == x.dtype and weight.is_contiguous() for weight in weights)
    return is_plain and (x.shape[0] > 1 or weights[0].numel() >= SMALL)


@cache
def most_rows(dtype: torch.dtype) -> int:
    """Up to so many rows the kernel is faster than torch.

    Measured: fp32, and bf16 where the CPU has arithmetic in it. Where it has none, torch widens every weight again for
    every row. Where it multiplies bf16 by tiles, 16 is a guess on the safe side.
    """
    if dtype == torch.float32:
        return 32
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 2**31
    return 16 if has_tiles() else 64


@cache
def has_tiles() -> bool:
    """Whether the CPU multiplies bf16 by tiles (AMX), of which torch makes use and these kernels do not."""
    return bool(torch.cpu._is_amx_tile_supported())


def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, D] and a weight [O, D] -> [N, O]."""
    x = x.contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0])
    run_kernel("linear", x.dtype, x.data_ptr(), weight.data_ptr(), y.data_ptr(), *x.shape, weight.shape[0])
    return y


def takes_logits(x: Tensor) -> bool:
    """Whether `likeliest` may take x [B, V]."""
    return x.dtype in MULTIPLIED and x.numel() > 0 and x.is_contiguous() and may_run(x)


def likeliest(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, V] -> the first of the largest numbers of each row, its place and itself, [B, 1] each.

    The latter is not a number where any of the row is not; the place means nothing then.
    """
    rows, size = x.shape
    tokens, top = x.new_empty(rows, 1, dtype=torch.int64), x.new_empty(rows, 1)
    run_kernel("likeliest", x.dtype, x.data_ptr(), tokens.data_ptr(), top.data_ptr(), rows, size)
    return tokens, top


def takes_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether `few_norms` may take x [..., D] and a weight [D], and is faster than torch."""
    if torch.compiler.is_compiling():  # whose graphs would be for so many numbers alone
        return False
    fits = x.dtype in MULTIPLIED and 0 < x.numel() <= FEW_NUMBERS and weight.dim() == 1
    return fits and weight.dtype == x.dtype and weight.is_contiguous() and may_run(x, weight)


def few_norms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] and a weight [D] -> the root-mean-square norm over the last dimension."""
    x = x.contiguous()
    y = torch.empty_like(x)
    channels = weight.shape[0]
    run_kernel("norm", x.dtype, x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // channels, channels, eps)
    return y


def project(x: Tensor, maps: Sequence[Tensor], turns: tuple[Tensor, Tensor] | None, dim: int) -> list[Tensor]:
    """Queries of some tokens, turned, and where there are maps for them keys, turned, and values.

    Args:
        x: [N, D].
        maps: weights [H * dim, D] of queries, and maybe [KV * dim, D] of keys and of values.
        turns: cosines and sines as `rotate` takes them, fp32; None: no rotation.
        dim: channels of a head.

    Returns:
        [N, H, dim], and maybe [N, KV, dim] twice.
    """
    x, rows = x.contiguous(), x.shape[0]
    outer = [weight.shape[0] for weight in maps]
    y = x.new_empty(rows * sum(outer))
    missing = 3 - len(maps)
    pointers = (POINTER * 3)(*[weight.data_ptr() for weight in maps], *[None] * missing)
    sizes = (INTEGER * 6)(*x.shape, *outer, *[0] * missing, dim)
    cos, sin = (None, None) if turns is None else (part.data_ptr() for part in turns)
    run_kernel("project", x.dtype, x.data_ptr(), y.data_ptr(), pointers, cos, sin, sizes)
    return [part.view(rows, -1, dim) for part in y.split([rows * size for size in outer])]


def reads_pages(q: Tensor, k: Tensor) -> bool:
    """Whether `attend_pages` may take queries and keys like these."""
    return q.dtype in ATTENDED and k.dtype == q.dtype and may_run(q, k)


def attend_pages(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, row: Tensor, start: Tensor, end: Tensor, scale: float
) -> Tensor:
    """Attention of each query to the entries of its list from `start` up to `end`.

    Args:
        q: [N, H, dim].
        k, v: pages of a pool [P, size, KV, dim].
        pages: of each list, in order [B, L], int32.
        row: list of each query [N], int32.
        start, end: [N], int32; each query sees one entry at least.
        scale: factor on the scores.

    Returns:
        [N, H, dim].
    """
    q = q.contiguous()
    y = torch.empty_like(q)
    (queries, heads, dim), (size, kv_heads) = q.shape, k.shape[1:3]
    pointers = [part.data_ptr() for part in (q, k, v, y, pages)]
    spans = [part.data_ptr() for part in (row, start, end)]
    shape = queries, kv_heads, heads // kv_heads, dim
    run_kernel("attend", q.dtype, *pointers, pages.stride(0), size, *spans, *shape, scale)
    return y


def attend_rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of one query a row to all its keys.

    Args:
        q: [B, H, dim].
        k, v: [B, S, KV, dim].
        scale: factor on the scores.

    Returns:
        [B, H, dim].
    """
    (rows, entries, kv_heads, dim), heads = k.shape, q.shape[1]
    if k.stride()[1:] != (kv_heads * dim, dim, 1) or k.stride() != v.stride() or k.stride(0) % k.stride(1):
        k, v = k.contiguous(), v.contiguous()
    # Every row is a list of one page.
    row, start = _rows(rows)
    end = torch.full_like(row, entries)
    y, q = torch.empty_like(q, memory_format=torch.contiguous_format), q.contiguous()
    pointers = [part.data_ptr() for part in (q, k, v, y, row)]
    spans = [part.data_ptr() for part in (row, start, end)]
    page = entries if rows == 1 else k.stride(0) // k.stride(1)
    run_kernel("attend", q.dtype, *pointers, 1, page, *spans, rows, kv_heads, heads // kv_heads, dim, scale)
    return y


@lru_cache(maxsize=16)
def _rows(count: int) -> tuple[Tensor, Tensor]:
    """The numbers from 0 up to `count`, and as many zeros, int32."""
    return torch.arange(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)


def may_run(*tensors: Tensor) -> bool:
    """Whether kernels may run on these."""
    # Asked several times for every block and token: a loop, which takes a third of the time of generators.
    with_gradient = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) not in PLAIN or (with_gradient and tensor.requires_grad):
            return False
    return not torch.is_autocast_enabled("cpu") and available(*tensors) and is_native()


def run_kernel(name: str, dtype: torch.dtype, *arguments: Any) -> Any:
    """A kernel, and what it returns, if anything; a profiler sees it as one of torch's operators."""
    kernel = _kernel(name, dtype)
    if _spent is not None:
        start = time.perf_counter()
        found = kernel(*arguments)
        _spent.append(time.perf_counter() - start)
        return found
    if not torch.autograd._profiler_enabled():
        return kernel(*arguments)
    with record_function(f"morex::{name}"):
        return kernel(*arguments)


@contextmanager
def kernel_seconds() -> Iterator[list[float]]:
    """Collects the seconds of every kernel that runs inside, without a profiler."""
    global _spent
    before, _spent = _spent, []
    try:
        yield _spent
    finally:
        _spent = before


@cache
def _kernel(name: str, dtype: torch.dtype) -> "ctypes._NamedFuncPointer":
    library = _library()
    assert library is not None
    kernel = getattr(library, f"{name}_{NAMES[dtype]}")
    kernel.argtypes, kernel.restype = ARGUMENTS[name], RETURNS.get(name)
    return kernel


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None or os.environ.get("MOREX_NATIVE") == "0":
        return None
    sources = [source.read_text(encoding="utf-8") for source in SOURCES]
    parts = [*sources, compiler, *FLAGS, platform.machine(), _processor()]
    path = files.cache_folder() / f"kernels-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"
    try:
        if not path.is_file():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


def _compile(compiler: str, path: Path) -> None:
    """Compiles the kernels into a file, whole or not at all; with threads where the compiler has OpenMP."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        for threads in (["-fopenmp"], []):
            command = [compiler, *FLAGS, *threads, str(SOURCES[0].with_name("kernels.cpp")), "-o", str(unfinished)]
            done = subprocess.run(command, capture_output=True, check=False, timeout=120)
            if done.returncode == 0:
                unfinished.replace(path)
                return
        done.check_returncode()
    finally:
        unfinished.unlink(missing_ok=True)


def _processor() -> str:
    """What tells processors apart, so that a folder that several machines share keeps one file for each kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
