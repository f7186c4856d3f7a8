"""An expert layer whose experts may be divided over ranks, each of which has some of them whole.

Every rank routes its own tokens over all experts. Their rows go to the ranks that have the experts, and what these make
of them comes back (Lepikhin et al. 2021, arXiv 2006.16668, section 3.1), without a capacity: ranks first say how many
rows they send. A rank's experts then see what they would see of the rows of all ranks together: expert by expert, of
each the rows of one rank after another, in time order. All ranks run the layer equally often.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from morex.experts.attention import ExpertRows
from morex.experts.dispatch import Dispatch, dispatch
from morex.experts.router import ExpertRouter
from morex.nn.packing import Packing, pack_rows


@dataclass(frozen=True, eq=False)
class DividedDispatch:
    """The assignments of this rank's N tokens to K experts each, and the M rows that all ranks send to this one's."""

    own: Dispatch
    """This rank's assignments, over all experts."""
    peers: "dist.ProcessGroup"
    sent: list[int]
    """Rows that go to each rank."""
    received: list[int]
    """Rows that come from each rank."""
    order: Tensor
    """Place among the received rows of each row [M], expert by expert."""
    rank: Tensor
    """Rank that each row is from [M]."""
    expert: Tensor
    """Expert that each row is for [M], counted from this rank's first."""
    counts: list[int]
    """Rows of each expert of this rank."""

    @cached_property
    def inverse(self) -> Tensor:
        """Place among the rows [M] of each one as it was received."""
        return self.order.argsort()

    def gather(self, x: Tensor) -> Tensor:
        """x [N, D] -> rows of this rank's experts [M, D]."""
        return self.send(self.own.gather(x))

    def send(self, rows: Tensor) -> Tensor:
        """Rows of this rank's assignments [N * K, ...] -> rows of its experts [M, ...]."""
        return _travelled(rows, self, is_back=False)

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        """Rows y [M, D] of this rank's experts and weights [N, K] -> the weighted sum per token [N, D]."""
        return self.own.combine(_travelled(y, self, is_back=True), weights)

    def rows(self, packing: Packing) -> ExpertRows:
        """What stands in the rows [M, D], of which the tokens of each rank are in `packing`."""
        about = [packing.row, packing.time, packing.positions]
        about += [] if packing.documents is None else [packing.documents.to(packing.time.dtype)]
        row, time, positions, *documents = self.send(torch.stack(about, 1)[self.own.token]).unbind(1)
        num_rows, span = (int(each.max()) + 1 if each.shape[0] else 1 for each in (row, time))
        row = (self.expert * len(self.received) + self.rank) * num_rows + row
        lengths = row.bincount(minlength=len(self.counts) * len(self.received) * num_rows).tolist()
        together = pack_rows(lengths, time, positions, span, documents[0] if documents else None)
        return ReceivedRows(together, torch.arange(row.shape[0], device=row.device), self.counts)


class ReceivedRows(ExpertRows):
    """Rows whose packing is their own: each expert has rows of its own in it already."""

    @property
    def together(self) -> Packing:
        return self.packing


class ExpertLayer(nn.Module):
    """What all expert layers are: a router and experts, whose weights [E, ...] are the layer's own parameters."""

    router: ExpertRouter
    peers: "dist.ProcessGroup | None" = None
    """Ranks that the experts are divided over; their weights are then DTensors, of which each rank has some."""

    def stacks(self) -> dict[str, Tensor]:
        """Weights of the experts that are here, by name."""
        own = {name: weight for name, weight in self._parameters.items() if weight is not None}
        if self.peers is None:
            return dict(own)
        return {name: weight.to_local() for name, weight in own.items()}  # type: ignore[attr-defined]

    def dispatch(self, chosen: Tensor) -> Dispatch | DividedDispatch:
        """Brings tokens to their experts [N, K]; all ranks have to call it."""
        sent = dispatch(chosen, self.router.experts)
        return sent if self.peers is None else divided(sent, self.peers)

    def rows(self, sent: Dispatch | DividedDispatch, packing: Packing) -> ExpertRows:
        """What stands in the rows that experts work on."""
        if isinstance(sent, DividedDispatch):
            return sent.rows(packing)
        return ExpertRows(packing, sent.token, sent.counts)


def unvisited(rows: Tensor, stacks: Mapping[str, Tensor]) -> Tensor:
    """What experts without any make of rows [0, D]: nothing, with a gradient of zero into their weights."""
    return rows + torch.stack([weight[:0].sum() for weight in stacks.values()]).sum()


def divided(own: Dispatch, peers: "dist.ProcessGroup") -> DividedDispatch:
    """Has all ranks know how many rows they send to each expert.

    Args:
        own: this rank's assignments, over all experts; rank i of the peers has the i-th part of these.
    """
    device, ranks = own.token.device, peers.size()
    told = torch.tensor(own.counts, device=device)
    heard = torch.empty_like(told)
    dist.all_to_all_single(heard, told, group=peers)
    here = heard.view(ranks, -1)  # [ranks, experts of this rank]
    each = torch.arange(here.numel(), device=device).repeat_interleave(heard)
    expert = each % here.shape[1]
    order = expert.argsort(stable=True)
    return DividedDispatch(
        own,
        peers,
        sent=told.view(ranks, -1).sum(1).tolist(),
        received=here.sum(1).tolist(),
        order=order,
        rank=(each // here.shape[1])[order],
        expert=expert[order],
        counts=here.sum(0).tolist(),
    )


def _travelled(rows: Tensor, sent: DividedDispatch, is_back: bool) -> Tensor:
    """Rows of this rank's assignments [N * K, ...] -> rows of its experts [M, ...], or back; their gradients return."""
    found: Tensor = _Travel.apply(rows, sent, is_back)
    return found


class _Travel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: DividedDispatch, is_back: bool) -> Tensor:
        ctx.of = sent, is_back
        if is_back:
            return _exchanged(rows[sent.inverse], sent.received, sent.sent, sent.peers)
        return _exchanged(rows, sent.sent, sent.received, sent.peers)[sent.order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        sent, is_back = ctx.of
        return _travelled(grad, sent, not is_back), None, None


def _exchanged(rows: Tensor, sent: Sequence[int], received: Sequence[int], peers: "dist.ProcessGroup") -> Tensor:
    """Rows for each rank, one rank after another -> those from each rank."""
    found = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), list(received), list(sent), peers)
    return found
