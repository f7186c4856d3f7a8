"""The fast recurrent block of experts against the plain one: same states, same gradients."""

import pytest
import torch
from torch import Tensor

from morex.experts.attention import ExpertRows, fast_plan
from morex.experts.recurrent import recur, recurrent_parameters
from morex.nn.attention import AttentionShape
from morex.nn.fast.switch import enabled
from morex.nn.packing import pack_batch
from morex.nn.rope import Rope

WIDTH, EPS = 16, 1e-6
LOADS = {
    "even": [10, 10, 10],
    "uneven": [1, 25, 4],
    "empty experts": [0, 30, 0],
    "one expert": [30],
    "one token": [0, 1, 0],
}
Found = tuple[Tensor, dict[str, Tensor]]


def rows_of(counts: list[int], documents: bool = False) -> ExpertRows:
    """Tokens of three rows of 10, each for one expert, ascending for each."""
    total, generator = sum(counts), torch.Generator().manual_seed(3)
    shape = (3, total // 3) if total >= 3 else (1, total)
    ids = torch.arange(shape[1]).div(4, rounding_mode="floor").expand(shape) if documents else None
    packing = pack_batch(shape, torch.device("cpu"), documents=ids)
    token = torch.randperm(total, generator=generator)
    return ExpertRows(packing, torch.cat([part.sort().values for part in token.split(counts)]), counts)


TURNING, STILL, ODD = (4, Rope(100.0)), (4, None), (5, None)
"""Width of a head, and how it turns."""


def run(
    rows: ExpertRows,
    scope: str,
    steps: int,
    dtype: torch.dtype,
    fast: bool,
    head: tuple[int, Rope | None] = TURNING,
) -> Found:
    """The last states, and the gradients of the input and of every weight."""
    shape = AttentionShape(4, 2, head[0], 0.3, head[1])
    generator = torch.Generator().manual_seed(1)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    sizes = recurrent_parameters(len(rows.counts), WIDTH, shape, 24, scope)
    w = {name: drawn(*weight.shape).mul_(0.4).requires_grad_() for name, weight in sizes.items()}
    s, x, outer = (drawn(sum(rows.counts), WIDTH) for _ in range(3))
    x.requires_grad_()
    with enabled(fast):
        assert (fast_plan(x, w, shape, EPS, rows, together=True) is not None) == (
            fast and rows.packing.documents is None
        )
        y = recur(s, x, w, steps, shape, EPS, rows)
        with torch.no_grad():
            assert torch.equal(recur(s, x, w, steps, shape, EPS, rows), y)
        (y * outer).sum().backward()
    gradients = {name: weight.grad for name, weight in {"x": x, **w}.items()}
    return y.detach(), {name: grad for name, grad in gradients.items() if grad is not None}


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("scope", ["routed", "token"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_fast_is_plain(loads: str, scope: str, steps: int, dtype: torch.dtype, near: float) -> None:
    rows = rows_of(LOADS[loads])
    (y, gradients), (plain, expected) = (run(rows, scope, steps, dtype, fast) for fast in (True, False))
    torch.testing.assert_close(y, plain, rtol=near, atol=near)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=near * scale, msg=f"gradient of {name}")


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("head", [STILL, ODD], ids=["even width", "odd width"])
def test_fast_is_plain_where_heads_do_not_turn(loads: str, head: tuple[int, Rope | None]) -> None:
    rows = rows_of(LOADS[loads])
    (y, gradients), (plain, expected) = (run(rows, "routed", 2, torch.float64, fast, head) for fast in (True, False))
    torch.testing.assert_close(y, plain)
    turning, _ = run(rows, "routed", 2, torch.float64, True)
    assert max(LOADS[loads]) == 1 or not torch.allclose(y, turning)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, msg=f"gradient of {name}")


@pytest.mark.parametrize("scope", ["routed", "token"])
def test_experts_without_tokens_get_gradients_of_zero(scope: str) -> None:
    _, gradients = run(rows_of([0, 30, 0]), scope, 2, torch.float64, fast=True)
    for name in gradients.keys() - {"x"}:
        assert gradients[name][1].any() and not gradients[name][[0, 2]].any()


def test_documents_take_the_plain_path() -> None:
    rows = rows_of([10, 20], documents=True)
    (y, gradients), (plain, expected) = (run(rows, "routed", 2, torch.float64, fast) for fast in (True, False))
    torch.testing.assert_close(y, plain)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient)
