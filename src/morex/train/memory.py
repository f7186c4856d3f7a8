"""Memory of a training: its peak, and how the C library gets and keeps it."""

import contextlib
import ctypes
import gc
import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST_SETTING, NEVER = 2**31 - 1, -1
MADV_HUGEPAGE, HUGE_PAGE = 14, 2**21
BLOCK = 2**30
"""Smaller than what `LARGEST_SETTING` sends elsewhere than to the heap."""


def keep_freed_memory() -> None:
    """Asks glibc to keep what is freed for the next step, which needs as much again; elsewhere nothing happens.

    By default large tensors go back to the system at once, and every step pays for their pages anew.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST_SETTING)
        mallopt(M_TRIM_THRESHOLD, NEVER)
        mallopt(M_TOP_PAD, 64 * 2**20)
    ask_for_huge_pages()


def ask_for_huge_pages() -> None:
    """Asks Linux to back the heap that is yet to be used with huge pages; elsewhere nothing happens.

    A training step walks through far more pages of 4 KB than a processor keeps addresses of. Blocks that are claimed,
    advised and freed untouched cost address space only, and the C library hands them out piece by piece.
    """
    with contextlib.suppress(OSError, AttributeError, ValueError):
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
        libc.free.restype, libc.free.argtypes = None, (ctypes.c_void_p,)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        blocks = [libc.malloc(BLOCK) for _ in range(memory // 2 // BLOCK)]
        for block in filter(None, blocks):
            first = -(-block // HUGE_PAGE) * HUGE_PAGE
            libc.madvise(first, (block + BLOCK - first) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
            libc.free(block)


class PeakMemory:
    """Largest memory in use since the start, above what was in use at the start, in bytes.

    On CUDA: what torch allocated. On a CPU: the resident set of the process. Linux resets its high-water mark on
    request, so the peak is exact; elsewhere it is the peak of the whole process less what it held at the start.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = 0
        # Optimizers load this at first use, 70 MB of code that is not the training's.
        importlib.import_module("torch._dynamo")
        gc.collect()
        self._restart()
        if device.type == "cuda":
            self.start = torch.cuda.memory_allocated(device)
        else:
            self.start = _status_bytes("VmRSS") or _process_peak()

    def bytes(self) -> int:
        """The peak until now."""
        if self.device.type == "cuda":
            now = torch.cuda.max_memory_allocated(self.device)
        else:
            now = (_status_bytes("VmHWM") if self.is_exact else None) or _process_peak()
        self.peak = max(self.peak, now - self.start)
        return self.peak

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """What happens inside does not count, where the peak can be measured exactly."""
        self.bytes()
        yield
        self._restart()

    def _restart(self) -> None:
        """Measures the coming peak afresh."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        # What was freed but kept in the heap, by an earlier run in this process say, would hide this run's use.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        ask_for_huge_pages()
        self.is_exact = _reset_high_water_mark()


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return _status_bytes("VmHWM") is not None


def _status_bytes(field: str) -> int | None:
    """A size from /proc/self/status, or None where there is no such file or field."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _process_peak() -> int:
    """Largest resident set that this process ever had, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
