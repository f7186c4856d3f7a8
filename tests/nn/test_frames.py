"""Frames of the fast attention: rows by length, at the least cost."""

from itertools import combinations

import pytest
import torch

from morex.nn.fast.frame import ALIGNMENT, FRAME_COST, widths_of
from morex.nn.fast.scratch import Scratch
from morex.nn.packing import pack_batch
from morex.nn.rope import Rope


def cost(shapes: list[tuple[int, int]], heads: int) -> int:
    return sum(heads * rows * width * width + FRAME_COST for rows, width in shapes)


def cheapest(lengths: list[int], heads: int) -> int:
    """Over every way to cut the sorted rows into frames."""
    widths = sorted(max(1, -(-length // ALIGNMENT)) * ALIGNMENT for length in lengths)
    found = []
    for parts in range(1, len(widths) + 1):
        for cuts in combinations(range(1, len(widths)), parts - 1):
            ends = [*cuts, len(widths)]
            starts = [0, *cuts]
            found.append(cost([(b - a, widths[b - 1]) for a, b in zip(starts, ends, strict=True)], heads))
    return min(found)


@pytest.mark.parametrize(
    "lengths", [[5], [0, 0, 3], [8, 64, 64, 65, 128], [16, 16, 16, 200], [3, 40, 41, 90, 91, 92, 300, 301]]
)
@pytest.mark.parametrize("heads", [1, 8])
def test_rows_go_into_the_cheapest_frames(lengths: list[int], heads: int) -> None:
    shapes = widths_of(lengths, heads)
    assert sum(rows for rows, _ in shapes) == len(lengths)
    assert cost(shapes, heads) == cheapest(lengths, heads)
    left = sorted(lengths)
    for rows, width in shapes:
        assert width % ALIGNMENT == 0
        assert all(length <= width for length in left[:rows])
        left = left[rows:]


@pytest.mark.parametrize("lengths", [[40, 3, 17], [40, 40, 40]])
@pytest.mark.parametrize(("dim", "rope"), [(8, Rope(10_000.0)), (8, None), (7, None)])
def test_loading_and_unloading_are_inverse(lengths: list[int], dim: int, rope: Rope | None) -> None:
    """What frames hold comes back to its token, turned there and back or never."""
    packing = pack_batch((3, 40), torch.device("cpu"), torch.tensor(lengths))
    frames = packing.frames(4, 2, dim, rope, torch.float64)
    x = torch.randn(packing.num_tokens, 8 * dim, dtype=torch.float64)
    buffer = frames.load(x)
    held = {tuple(row) for row in buffer.tolist()}
    assert (rope is None) == all(tuple(row) in held for row in x.view(-1, dim).tolist())
    torch.testing.assert_close(frames.unload(buffer.clone(), Scratch(buffer)), x)
    heads = torch.randn(packing.num_tokens, 4 * dim, dtype=torch.float64)
    torch.testing.assert_close(frames.collect(frames.spread(heads, Scratch(heads))), heads)
