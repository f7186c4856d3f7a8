"""What a run writes down about itself: the lines of metrics.jsonl, and the summary at its end."""

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from morex.depth.router import DepthRouter
from morex.eval.accuracy import Scores
from morex.eval.loss import EvalResult
from morex.experts.router import ExpertRouter
from morex.files import write_whole
from morex.train.runs import encoded, read_json_lines
from morex.train.setup import Training


class MetricsWriter:
    """Appends one JSON object a line, each forced to disk before the training goes on.

    Args:
        path: metrics.jsonl; lines of later steps, which a run wrote after its last checkpoint, are dropped.
        step: step that the run continues from.
        speaks: whether this is the rank that writes; another writes nothing.
        tell: gets each line once it is on disk.
    """

    def __init__(
        self, path: Path, step: int, speaks: bool = True, tell: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        self._path, self._speaks, self._tell = path, speaks, tell
        self._descriptor: int | None = None
        self.drop_after(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def drop_after(self, step: int) -> None:
        """Drops lines of later steps."""
        if not self._speaks:
            return
        self._close()
        if self._path.exists():
            kept = [line for line in read_json_lines(self._path) if line["step"] <= step]
            write_whole(self._path, "".join(encoded(line) for line in kept))
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes one line, whole or not at all."""
        if self._descriptor is None:
            return
        before = os.fstat(self._descriptor).st_size
        left = memoryview(encoded(line).encode())
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
            os.fsync(self._descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, before)
            raise
        if self._tell is not None:
            self._tell(line)


def training_line(
    t: Training, lr: float, losses: Mapping[str, float], grad_norm: float, stats: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """A line about the step just done; `loss` is the objective's of that step's tokens, no running mean.

    A gradient norm of None is one that overflowed in fp16, whose update was left out.
    """
    objective = t.model.head.objective
    tokens_per_s, flops_per_s = t.pace.since_last(t.state)
    return {
        "kind": "train",
        "step": t.state.step,
        "tokens": t.state.tokens,
        "seconds": t.state.seconds,
        "flops": t.state.flops,
        "loss": losses[objective],
        "lr": lr,
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "tokens_per_s": tokens_per_s,
        "flops_per_s": flops_per_s,
        "memory_bytes": t.memory.bytes(),
        **t.loss_scale.report(),
        "losses": dict(losses),
        **{f"loss_{name}": value for name, value in losses.items() if name != objective},
        **router_report(stats),
        "router_state": router_state(t.model),
    }


def evaluation_line(t: Training, result: EvalResult) -> dict[str, Any]:
    """A line about an evaluation of the whole held-out set."""
    return {
        "kind": "eval",
        "step": t.state.step,
        "tokens": t.state.tokens,
        "seconds": t.state.seconds,
        "flops": t.state.flops,
        **_held_out(result),
    }


def _held_out(result: EvalResult) -> dict[str, Any]:
    line: dict[str, Any] = {
        "val_loss": result.loss,
        "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,
        "val_tokens": result.tokens,
    }
    if result.bits_per_byte is not None:
        line["bits_per_byte"] = result.bits_per_byte
    if result.oracle_loss is not None:
        line["val_loss_oracle"] = result.oracle_loss
    if result.is_oracle:
        line["val_loss_is_oracle"] = True
    if result.by_depth is not None:
        line["val_loss_by_depth"] = {str(depth): loss for depth, loss in result.by_depth.items()}
    if result.scores is not None:
        line |= _accuracies(result.scores, result)
    return line


def _accuracies(scores: Scores, result: EvalResult) -> dict[str, Any]:
    """What a line about a task has beside its losses."""
    levels = scores.by_difficulty.items()
    line: dict[str, Any] = {
        "val_accuracy": scores.all.accuracy,
        "val_token_accuracy": scores.all.token_accuracy,
        "val_examples": scores.all.examples,
        "val_accuracy_by_difficulty": {str(level): score.accuracy for level, score in levels},
        "val_loss_by_difficulty": {str(level): score.loss for level, score in levels},
    }
    if result.oracle_scores is not None:
        line["val_accuracy_oracle"] = result.oracle_scores.all.accuracy
    if result.scores_by_depth is not None:
        line["val_accuracy_by_depth"] = {str(r): one.all.accuracy for r, one in result.scores_by_depth.items()}
    return line


def summarise(t: Training) -> dict[str, Any]:
    """The run in numbers, as written to summary.json: the last evaluation, speed, memory and closed-form counts."""
    state, counts = t.state, t.counts
    assert state.evaluation is not None
    about_run = ("kind", "step", "tokens", "seconds", "flops")
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "train_flops": state.flops,
        "final_train_loss": state.last_loss,
        **{key: value for key, value in state.evaluation.items() if key not in about_run},
        "best_val_loss": state.best_val_loss,
        "tokens_per_s": state.tokens / state.seconds if state.seconds else 0.0,
        "peak_memory_bytes": max(state.peak_memory_bytes, t.memory.bytes()),
        "parameters": counts.parameters,
        "unique_non_embedding": counts.unique_non_embedding,
        "train_flops_per_token": counts.train_flops_per_token,
        "decode_flops_per_token": counts.decode_flops_per_token,
        "kv_bytes_per_token": counts.kv_bytes_per_token,
        "precision": t.config.train.precision,
        "device": str(t.device),
        "finished": True,
    }


def router_report(stats: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """What the routers did in one step, by module path.

    Returns:
        active_share: share of the tokens active at recursions 1..R, of each depth router.
        expert_load: share of the assignments that each expert got, of each expert router.
        expert_balance, expert_z: raw balance loss and z-loss of each expert router.
        router_entropy: mean entropy of a token's probabilities in nats, of each router that has a distribution.
        mean_updates, remainder, ponder: mean N, mean remainder and their sum, of each halting router.
        exit_probability: mean probability of leaving after recursions 1..R, of each exit gate.
    """
    of_experts = ("expert_load", "expert_balance", "expert_z")
    names = ("active_share", *of_experts, "router_entropy", "mean_updates", "remainder", "ponder", "exit_probability")
    report: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name, fields in stats.items():
        tokens = max(float(fields["tokens"]), 1.0)
        if "active" in fields:
            report["active_share"][name] = (fields["active"].double() / tokens).tolist()
        if "load" in fields:
            load = fields["load"].double() / fields["load"].sum().clamp(min=1)
            report["expert_load"][name] = load.tolist()
            report["expert_balance"][name] = float(len(load) * (load * fields["importance"]).sum()) / tokens
            report["expert_z"][name] = float(fields["z"]) / tokens
        if "entropy" in fields:
            report["router_entropy"][name] = float(fields["entropy"]) / tokens
        if "exits" in fields:
            report["exit_probability"][name] = (fields["exits"].double() / tokens).tolist()
        if "remainder" in fields:
            report["mean_updates"][name] = float(fields["active"].sum()) / tokens
            report["remainder"][name] = float(fields["remainder"]) / tokens
            report["ponder"][name] = report["mean_updates"][name] + report["remainder"][name]
    return report


def router_state(model: nn.Module) -> dict[str, dict[str, list[float | None]]]:
    """Biases, thresholds and capacities that the routers have moved to, by module path; None for infinity."""
    state: dict[str, dict[str, list[float | None]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, DepthRouter | ExpertRouter):
            for name, values in module.named_buffers(recurse=False):
                if values.any():
                    plain = [value if math.isfinite(value) else None for value in values.tolist()]
                    state.setdefault(path, {})[name] = plain
    return state
