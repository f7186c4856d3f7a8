"""Where the next entries of paged lists go, looked up in one kernel for all rows of a pass."""

import ctypes
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from morex.nn.fast.native import POINTER, run_kernel


class Tables(ctypes.Structure):
    """`Tables` in tables.h: where the arrays stand, as long as nobody replaces them."""

    arrays = "pages", "counts", "is_forked", "lengths"
    """Of `morex.cache.tables.PageTables`."""
    _fields_ = (
        *((name, POINTER) for name in (*arrays, "times", "free", "holders")),
        *((name, ctypes.c_int64) for name in ("width", "most", "size", "num_free")),
    )

    @classmethod
    def of(cls, parts: Sequence[np.ndarray], times: Tensor, free: "array[int]", holders: "array[int]") -> "Tables":
        """Args:
        parts: the `arrays`.
        times: of all entries of the pool [P, size].
        free, holders: as `morex.cache.pages.PagePool` has them; of the former the first `num_free` count.
        """
        assert all(part.flags.c_contiguous for part in parts) and times.is_contiguous()
        width, most = parts[0].shape[1:]
        pointers = [*(part.ctypes.data for part in parts), times.data_ptr()]
        pointers += [free.buffer_info()[0], holders.buffer_info()[0]]
        return cls(*pointers, width, most, times.shape[1], 0)


class _Claimed(ctypes.Structure):
    _fields_ = tuple((name, POINTER) for name in ("where", "list", "row", "start", "end"))


def claim(
    tables: Tables, numbers: Sequence[int], added: Sequence[int], time: Tensor
) -> tuple[bool, Tensor, Sequence[Tensor]] | None:
    """As `morex.cache.tables.PageTables.claim`: whether all lists were empty, `where`, and the other tensors.

    None, and nothing is done, where a list shares a page, has no room for more, or the pool has not enough.
    """
    time, tokens = time.contiguous(), time.shape[0]
    where = torch.empty(tables.width, tokens, dtype=torch.int64)
    others = torch.empty(4, tokens, dtype=torch.int32).unbind()
    which, more = array("q", numbers), array("q", added)
    out = _Claimed(where.data_ptr(), *(part.data_ptr() for part in others))
    rows = which.buffer_info()[0], more.buffer_info()[0], len(which), tokens, time.data_ptr()
    found = run_kernel("claim", torch.int64, ctypes.addressof(tables), *rows, ctypes.addressof(out))
    return None if found < 0 else (found > 0, where, others)
