"""Traces of a held-out set: what the routers of a model did with every token, a batch at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from morex.config import Config
from morex.data.source import held_out_batches
from morex.data.stream import TokenStream
from morex.data.tasks.prepared import HeldOut
from morex.depth.policy import Depth
from morex.eval.loss import depth_of
from morex.model.lm import LanguageModel
from morex.model.trace import Trace
from morex.sections.depth import ExpertChoiceConfig


@dataclass(frozen=True)
class TracedBatch:
    """One batch and its traces, all on the CPU but for the traces."""

    tokens: Tensor
    """[B, T]."""
    lengths: Tensor
    """True lengths of the rows [B]."""
    difficulty: Tensor | None
    """Of the examples of a task [B]."""
    traces: tuple[Trace, ...]
    """One for each depth policy that was asked for."""

    @property
    def real(self) -> Tensor:
        """Tokens that are no padding [B, T], bool."""
        return torch.arange(self.tokens.shape[1])[None] < self.lengths[:, None]


def own_rule(config: Config) -> Depth:
    """The depth policy of a run: that of its training, or the oracle's where its router has no causal rule."""
    depth = config.model.depth
    return "oracle" if isinstance(depth, ExpertChoiceConfig) and depth.causal == "none" else config.train.policy


@torch.no_grad()
def traced_batches(
    model: LanguageModel,
    held_out: TokenStream | HeldOut,
    seq_len: int,
    batch_size: int,
    depths: tuple[Depth, ...],
    autocast: torch.dtype | None = None,
    mask_documents: bool = False,
) -> Iterator[TracedBatch]:
    """Runs a model in eval mode over consecutive windows of a stream or examples of a task, once for each depth policy.

    Args:
        model: its mode is the caller's affair.
        held_out: tokens or examples.
        seq_len: window in tokens.
        batch_size: windows or examples per forward call.
        depths: depth policies of `model.forward`, or 'difficulty'.
        autocast: format that autocast computes in; None computes in the format of the weights.
        mask_documents: tokens attend only to their own document.
    """
    device = next(model.parameters()).device
    for batch in held_out_batches(held_out, seq_len, batch_size, mask_documents):
        rows, time = batch.tokens.shape
        sent, traces = batch.to(device), []
        for depth in depths:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                out = model(
                    sent.tokens,
                    lengths=sent.lengths,
                    document_ids=sent.document_ids if mask_documents else None,
                    depth=depth_of(batch, depth),
                    logits_to_keep=0 if model.config.head.kind == "classifier" else 1,
                    return_trace=True,
                )
            assert out.trace is not None
            traces.append(out.trace)
        lengths = torch.full((rows,), time) if batch.lengths is None else batch.lengths
        yield TracedBatch(batch.tokens, lengths, batch.difficulty, tuple(traces))
