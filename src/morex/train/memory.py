"""Memory of a training: its peak, and how the C library keeps what is freed."""

import contextlib
import ctypes
import gc
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST_SETTING = 2**31 - 1


def keep_freed_memory() -> None:
    """Asks glibc to keep what is freed for the next step, which needs as much again; elsewhere nothing happens.

    By default large tensors go back to the system at once, and every step pays for their pages anew.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST_SETTING)
        mallopt(M_TRIM_THRESHOLD, LARGEST_SETTING)
        mallopt(M_TOP_PAD, 64 * 2**20)


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
