"""Random numbers go by the number of a row, wherever it is computed."""

import torch

from morex.nn.noise import noise_like
from morex.nn.packing import Packing, pack_batch

CPU = torch.device("cpu")
ROWS, TIME, WIDTH = 6, 5, 16


def drawn(packing: Packing, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return noise_like(torch.empty(packing.num_tokens, WIDTH), packing)


def test_rows_get_the_same_numbers_wherever_they_are() -> None:
    lengths = torch.tensor([5, 2, 0, 4, 1, 5])
    whole = drawn(pack_batch((ROWS, TIME), CPU, lengths))
    for size in (1, 2, 3):
        parts = [
            drawn(pack_batch((size, TIME), CPU, lengths[first : first + size], first_row=first))
            for first in range(0, ROWS, size)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_numbers_are_normal_and_all_different() -> None:
    packing = pack_batch((40, 50), CPU)
    noise = drawn(packing)
    assert noise.shape == (2000, WIDTH) and noise.unique().numel() > 0.99 * noise.numel()
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03
    assert abs(float((noise.abs() < 1).float().mean()) - 0.683) < 0.02
    assert not torch.equal(drawn(packing, seed=2), noise)
    assert torch.equal(drawn(packing), noise)


def test_a_call_takes_one_number_from_the_generator_of_torch_however_many_tokens() -> None:
    def behind(packing: Packing) -> int:
        drawn(packing)
        return int(torch.randint(10**9, ()))

    few = pack_batch((1, 3), CPU)
    nobody = few.select(torch.empty(0, dtype=torch.int64))
    assert behind(few) == behind(pack_batch((9, 7), CPU)) == behind(nobody)
    torch.manual_seed(1)
    noise = [noise_like(torch.empty(few.num_tokens, WIDTH), few) for _ in range(2)]
    assert not torch.equal(*noise)
