"""Muon for matrices, AdamW for everything else (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

An update is the momentum of the gradient made orthogonal, M = U S V^T -> U V^T, by five steps of a Newton-Schulz
iteration, times 0.2 sqrt(max(rows, columns)), which gives its entries the size that AdamW's have: learning rate and
decay are those of AdamW (Liu et al. 2025, arXiv 2502.16982, section 2.2).

This is `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, for more kinds of weights than that takes: experts
that are stacked to [E, rows, columns], each made orthogonal by itself, and matrices whose rows are divided over ranks.
torch would exchange in every step of the iteration and round otherwise than one process does. Here every rank gets a
share of the matrices whole, makes them orthogonal, and gives their rows back: two exchanges, and no work done twice.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

from morex.train.parallel import whole

COEFFICIENTS = 3.4445, -4.7750, 2.0315
STEPS = 5
SMALLEST_NORM = 1e-7


class Muon(torch.optim.AdamW):
    """Muon over the groups of parameters that say `orthogonal: True`, AdamW over the others.

    Parameters of Muon have the state `momentum_buffer`, those of AdamW `exp_avg`, `exp_avg_sq` and `step`.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], momentum: float, dtype: torch.dtype | None = None, **adamw: Any
    ) -> None:
        """Args:
        momentum: decay rate of Muon's momentum (Nesterov's).
        dtype: what the iteration computes in; default: the weights' own.
        adamw: options of `torch.optim.AdamW`; `lr` and `weight_decay` are Muon's as well.
        """
        super().__init__([{"orthogonal": False, **group} for group in groups], **adamw)
        self.momentum, self.dtype = momentum, dtype
        self._step_supports_amp_scaling = False  # a scaler must not leave unscaling to AdamW's kernel alone

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonal"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        moved = [parameter for parameter in group["params"] if parameter.grad is not None]
        updates = []
        for parameter in moved:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            average = state["momentum_buffer"].lerp_(parameter.grad, 1 - self.momentum)
            updates.append(parameter.grad.lerp(average, self.momentum))
        for parameter, update in zip(moved, orthogonal_all(updates, self.dtype), strict=True):
            own = _local(parameter)
            own.mul_(1 - group["lr"] * group["weight_decay"])
            own.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape[-2:])))


def orthogonal(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Matrices [..., rows, columns] with all singular values near 1 and the singular vectors that they had.

    Args:
        dtype: what to compute in and return; default: theirs.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype or matrices.dtype)
    x = x.flatten(0, -3) if x.dim() > 2 else x[None]
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)


def orthogonal_all(updates: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """What this rank holds of each update, made orthogonal as a whole; all ranks have to call it."""
    results: dict[int, Tensor] = {}
    by_rows: dict[tuple[DeviceMesh, int], dict[int, DTensor]] = {}
    for number, update in enumerate(updates):
        places = [place for place, how in enumerate(_placements(update)) if isinstance(how, Shard)]
        first_dim = all(how.dim == 0 for how in _placements(update) if isinstance(how, Shard))
        if not places or (first_dim and update.dim() > 2):  # what a rank has is whole matrices
            results[number] = orthogonal(_local(update), dtype)
        elif first_dim and len(places) == 1:
            assert isinstance(update, DTensor)
            by_rows.setdefault((update.device_mesh, places[0]), {})[number] = update
        else:
            assert isinstance(update, DTensor)
            turned = orthogonal(whole(update), dtype)
            results[number] = _local(
                distribute_tensor(turned, update.device_mesh, update.placements, src_data_rank=None)
            )
    for (_, dim), divided in by_rows.items():
        # Those that are made orthogonal at the same time should be alike in size.
        numbers = sorted(divided, key=lambda number: updates[number].numel())
        found = _orthogonal_by_turns([divided[number] for number in numbers], dim, dtype)
        results |= dict(zip(numbers, found, strict=True))
    return [results[number].to(update.dtype) for number, update in enumerate(updates)]


def _orthogonal_by_turns(updates: Sequence[DTensor], dim: int, dtype: torch.dtype | None) -> list[Tensor]:
    """Of matrices whose rows are divided over one dimension of a mesh, this rank's rows, made orthogonal as a whole.

    Of so many matrices as there are ranks, each rank gets one whole.
    """
    mesh = updates[0].device_mesh
    group, size, rank = mesh.get_group(dim), mesh.size(dim), mesh.get_local_rank(dim)
    results: list[Tensor] = []
    for first in range(0, len(updates), size):
        turn = updates[first : first + size]
        rows = [update.to_local().to(dtype or update.dtype) for update in turn]
        sent = [part.numel() for part in rows] + [0] * (size - len(turn))
        shape = turn[rank].shape if rank < len(turn) else torch.Size((0, 0))
        received = [_num_rows(shape[0], other, size) * shape[1] for other in range(size)]
        own = _exchange(torch.cat([part.flatten() for part in rows]), sent, received, group)
        if rank < len(turn):
            own = orthogonal(own.view(shape)).flatten()
        back = _exchange(own, received, sent, group).split(sent[: len(turn)])
        results += [part.view_as(mine) for part, mine in zip(back, rows, strict=False)]
    return results


def _exchange(flat: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Numbers for each rank of a group, one after another -> those from each rank."""
    found = flat.new_empty(sum(received))
    dist.all_to_all_single(found, flat.contiguous(), received, sent, group)
    return found


def _num_rows(rows: int, rank: int, size: int) -> int:
    """Rows of a matrix that a rank holds: as many as the others before it, then what is left."""
    each = -(-rows // size)
    return min(each, max(0, rows - rank * each))


def _placements(tensor: Tensor) -> Sequence[Placement]:
    return tensor.placements if isinstance(tensor, DTensor) else ()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
