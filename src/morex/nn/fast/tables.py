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
        *((name, POINTER) for name in (*arrays, "times")),
        *((name, ctypes.c_int64) for name in ("width", "most", "size")),
    )

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray], times: Tensor) -> "Tables":
        """From the `arrays`, and the times of all entries of the pool [P, size]."""
        assert all(part.flags.c_contiguous for part in arrays) and times.is_contiguous()
        width, most = arrays[0].shape[1:]
        return cls(*(part.ctypes.data for part in arrays), times.data_ptr(), width, most, times.shape[1])

    spare: tuple[Tensor, Sequence[Tensor]] | None = None
    """What the last claim would have filled, had nothing been lacking: the next one is as a rule the same again."""

    def unused(self, tokens: int) -> tuple[Tensor, Sequence[Tensor]]:
        """Room for a claim of so many tokens: `where` [width, N], and four times [N], int32."""
        spare, self.spare = self.spare, None
        if spare is not None and spare[0].shape[1] == tokens:
            return spare
        where = torch.empty(self.width, tokens, dtype=torch.int64)
        return where, torch.empty(4, tokens, dtype=torch.int32).unbind()


class _Claimed(ctypes.Structure):
    _fields_ = tuple((name, POINTER) for name in ("where", "list", "row", "start", "end"))


def claim(
    tables: Tables, numbers: Sequence[int], added: Sequence[int], time: Tensor
) -> tuple[bool, Tensor, Sequence[Tensor]] | list[tuple[int, int, bool]]:
    """As `morex.cache.tables.PageTables.claim`: whether all lists were empty, `where`, and the other tensors.

    Or which rows' lists lack something, and what: pages, and a copy of the last one.
    """
    time, tokens = time.contiguous(), time.shape[0]
    where, others = tables.unused(tokens)
    which, more, lacks = array("q", numbers), array("q", added), array("q", added)
    out = _Claimed(where.data_ptr(), *(part.data_ptr() for part in others))
    rows = which.buffer_info()[0], more.buffer_info()[0], len(which), tokens, time.data_ptr()
    ends = ctypes.addressof(out), lacks.buffer_info()[0]
    found = run_kernel("claim", torch.int64, ctypes.addressof(tables), *rows, *ends)
    if found < 0:
        tables.spare = where, others
        return [(row, lack // 2, lack % 2 == 1) for row, lack in enumerate(lacks) if lack]
    return found > 0, where, others
