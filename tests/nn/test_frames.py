"""Frames of the fast attention: rows by length, at the least cost."""

from itertools import combinations

import pytest
import torch

from morex.nn.fast.frame import ALIGNMENT, FRAME_COST, widths_of
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


def test_loading_and_unloading_are_inverse() -> None:
    """What the frames of ragged rows hold comes back to its token, turned there and back."""
    from morex.nn.fast.scratch import Scratch

    packing = pack_batch((3, 40), torch.device("cpu"), torch.tensor([40, 3, 17]))
    frames = packing.frames(4, 2, 8, Rope(10_000.0), torch.float64)
    x = torch.randn(packing.num_tokens, 8 * 8, dtype=torch.float64)
    buffer = frames.load(x)
    torch.testing.assert_close(frames.unload(buffer.clone(), Scratch(buffer)), x)
    heads = torch.randn(packing.num_tokens, 4 * 8, dtype=torch.float64)
    torch.testing.assert_close(frames.collect(frames.spread(heads, Scratch(heads))), heads)
