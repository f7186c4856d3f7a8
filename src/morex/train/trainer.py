"""The training loop. Read `train`, then `loop` from top to bottom: that is the whole of training.

The batch of a step is drawn whole and split into microbatches, each weighted by its share of the predicted tokens, so
that accumulation changes memory and nothing else. Times are those of training steps, without evaluation and saving.
"""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from morex.config import Config
from morex.data.loader import Batch
from morex.eval.loss import depth_of
from morex.files import write_json
from morex.loading import is_depth_routed
from morex.model.count import count
from morex.nn import ranks as together
from morex.nn.signals import RouterStats
from morex.train.branch import begin_branch
from morex.train.checkpoint import load_checkpoint, save_checkpoint
from morex.train.errors import AnomalyError, Interrupted, disk_full_explained
from morex.train.interrupt import stop_on_signals
from morex.train.metrics import MetricsWriter, evaluation_line, summarise, training_line
from morex.train.opening import evaluate_by
from morex.train.optim import learning_rate
from morex.train.parallel import average_expert_gradients, exchange_gradients, gradient_norm
from morex.train.progress import ProgressDisplay
from morex.train.ranks import Ranks, started
from morex.train.runs import RunFolder
from morex.train.setup import Pace, Training, begin, cpu_threads
from morex.train.trackers import Trackers, refuse_absent
from morex.train.watchdog import Watchdog


def train(
    cfg: Config,
    run_dir: str | Path,
    resume: bool = False,
    max_seconds: float | None = None,
    console: Console | None = None,
    branch_of: str | Path | None = None,
) -> dict[str, Any]:
    """Trains a model into a run folder and returns what its summary.json says.

    Args:
        cfg: the config; with `resume` it must be that of the run, up to `checkpoint.RESUMABLE`.
        run_dir: a folder that holds no run yet, or the run to go on with.
        resume: go on from the newest intact checkpoint, to the bit on a CPU with the same number of threads. A run
            that is done already is left as it is.
        max_seconds: end the run after so much training time, with learning rates planned for it; `train.steps` still
            limits it. A resumed run keeps its own unless another is given.
        console: where progress goes, by default the terminal; `Console(quiet=True)` shows nothing.
        branch_of: a run or checkpoint folder that the run begins from, as `begin_branch` says.

    Raises:
        ConfigError: the config, the corpus, the run folder or its checkpoint cannot be used.
        Interrupted: a signal asked to stop; a checkpoint has been saved.
        AnomalyError: a loss or gradient is not finite, or a spike, and `train.anomaly` says to stop.
        DiskFullError: no space left; what was saved before is intact.
    """
    with started(cfg.train.device) as ranks:
        if branch_of is not None:
            with ranks.agreed():
                if ranks.is_first:
                    begin_branch(Path(branch_of), Path(run_dir), cfg)
        return _train(cfg, run_dir, resume or branch_of is not None, max_seconds, console, ranks)


def _train(
    cfg: Config, run_dir: str | Path, resume: bool, max_seconds: float | None, console: Console | None, ranks: Ranks
) -> dict[str, Any]:
    """`train` on one of some ranks."""
    with ExitStack() as held:
        run = RunFolder(Path(ranks.from_first(run_dir)))
        with ranks.agreed():
            refuse_absent(cfg.train.trackers)
            if resume:
                run.config()  # where there is no run, say so before a folder is made
            held.enter_context(disk_full_explained(f"run folder '{run.path}'", run.how_to_go_on))
            held.enter_context(cpu_threads(cfg.train.threads))
            if ranks.is_first:
                held.enter_context(run.locked())
        training = begin(run, cfg, resume, max_seconds, ranks)
        finished = ranks.from_first(run.summary())
        if finished is not None and is_done(training):
            return dict(finished)
        if ranks.is_first:
            run.summary_path.unlink(missing_ok=True)
        loop(training, console if console is not None and ranks.is_first else Console(quiet=not ranks.is_first))
        summary = summarise(training)
        if ranks.is_first:
            write_json(run.summary_path, summary)
        return dict(ranks.from_first(summary))


def loop(t: Training, console: Console) -> None:
    """Steps, evaluations and checkpoints until the run is done."""
    state, plan = t.state, t.config.train
    with (
        saving_finished(t),
        stop_on_signals(console) as stop,
        Trackers(t.run, t.config, console, speaks=t.ranks.is_first) as trackers,
        MetricsWriter(t.run.metrics_path, state.step, t.ranks.is_first, trackers.log) as metrics,
        ProgressDisplay(console, *progress(t)) as display,
        Watchdog(t.run, t.ranks, plan.hang_seconds) as watchdog,
    ):
        while True:
            watchdog.beat(state.step)
            # All ranks stop at the same step, by the clock of the slowest.
            signal_number, state.seconds = t.ranks.most(stop.signal_number or 0, state.seconds)
            if signal_number:
                save_and_stop(t, round(signal_number))
            if is_due(t, plan.eval_every) and not is_evaluated(t):
                evaluate_held_out(t, metrics, display)
            is_branch_point = state.step in plan.branch_points
            if (is_due(t, plan.checkpoint_every) or is_branch_point) and t.saved_step != state.step:
                save(t)
            if is_done(t):
                break

            started = time.perf_counter()
            batch = t.loader.next_batch()
            lr = set_learning_rate(t)
            losses, stats = forward_backward(t, batch)
            grad_norm = clip_gradients(t)
            # A gradient that overflows for its scale in fp16 is no fault: its update is left out, and the scale falls.
            overflows = t.loss_scale.explains(grad_norm)
            fault = state.guard.fault(plan.anomaly, losses, t.model.head.objective, None if overflows else grad_norm)
            if fault is not None:
                t.loss_scale.pass_over()
                t.optimizer.zero_grad(set_to_none=True)
                state.seconds += time.perf_counter() - started
                handle_anomaly(t, fault, metrics, display)
                continue
            t.loss_scale.step(t.optimizer)
            t.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            t.model.update_routers(stats, state.step)
            [tokens] = together.totals([num_tokens(batch)])
            state.tokens += round(tokens)
            state.flops += tokens * flops_per_token(t, stats)
            state.seconds += time.perf_counter() - started
            state.last_loss = losses[t.model.head.objective]
            if not overflows:
                state.guard.accept(plan.anomaly, state.step, state.last_loss, grad_norm)

            if state.step == 1 or is_due(t, plan.log_every):
                metrics.write(training_line(t, lr, losses, grad_norm, stats))
            display.update(progress(t)[1], state.last_loss, state.tokens / state.seconds)


def forward_backward(t: Training, batch: Batch) -> tuple[dict[str, float], RouterStats]:
    """Adds the gradients of the mean loss of the batch, of which this rank has some rows.

    Returns:
        Raw losses by name, each the mean over the batch's predicted tokens, and the routers' statistics.
    """
    means: dict[str, Tensor] = {}
    stats = RouterStats()
    own = batch.num_predicted
    [everything] = together.totals([own])
    # Ranks average their gradients. A rank with more to predict counts more in the objective; losses of routers average
    # to those of the whole batch as they are.
    weight = own * t.ranks.size / max(everything, 1)
    objective = t.model.head.objective
    parts = list(microbatches(batch, t.config.train.accumulation))
    for number, part in enumerate(parts, start=1):
        share = part.num_predicted / max(own, 1)
        part = part.to(t.device)
        exchange_gradients(t.model, number == len(parts))
        with torch.autocast(t.device.type, t.autocast, enabled=t.autocast is not None):
            out = t.model(
                part.tokens,
                labels=part.labels,
                lengths=part.lengths,
                document_ids=part.document_ids if t.config.data.mask_documents else None,
                depth=depth_of(part, t.config.train.policy),
                first_row=t.ranks.rank * part.tokens.shape[0],
            )
        assert out.loss is not None
        loss = out.loss if weight == 1 else out.loss + (weight - 1) * out.losses[objective]
        t.loss_scale.scaled(loss * share).backward()
        for name, loss in out.losses.items():
            weighted = loss.detach() * (share * weight if name == objective else share)
            means[name] = means[name] + weighted if name in means else weighted
        stats = stats + out.stats
    average_expert_gradients(t.model, t.ranks)
    values = torch.stack([loss.double() for loss in means.values()]).cpu()  # one transfer from the device
    return dict(zip(means, (together.summed(values) / t.ranks.size).tolist(), strict=True)), t.ranks.joined(stats)


def microbatches(batch: Batch, parts: int) -> Iterator[Batch]:
    """The batch in equal parts."""
    size = batch.tokens.shape[0] // parts
    for first in range(0, batch.tokens.shape[0], size):
        yield batch.rows(slice(first, first + size))


def num_tokens(batch: Batch) -> int:
    """Tokens that pass through the model, padding apart."""
    return batch.tokens.numel() if batch.lengths is None else int(batch.lengths.sum())


def flops_per_token(t: Training, stats: RouterStats) -> float:
    """Training FLOPs per token of a step: closed form, on the shares of its tokens that were active."""
    model = t.config.model
    depths_differ = is_depth_routed(model) or t.config.train.policy is not None
    if not (depths_differ or stats.step_shares):
        return t.counts.train_flops_per_token
    shares = stats.active_shares if depths_differ else None
    return count(model, seq_len=t.seq_len, shares=shares, step_shares=stats.step_shares).train_flops_per_token


def clip_gradients(t: Training) -> float:
    """Scales the gradients down to `train.clip` and returns their norm before."""
    limit = t.config.train.clip or math.inf
    t.loss_scale.unscale(t.optimizer)
    return gradient_norm(t.model, limit)


def handle_anomaly(t: Training, fault: str, metrics: MetricsWriter, display: ProgressDisplay) -> None:
    """Leaves the batch of a step out, or goes back to the last checkpoint and on with later batches.

    All ranks do the same: they judge by the same numbers.

    Args:
        fault: what is wrong with the step.

    Raises:
        AnomalyError: `train.anomaly` says to stop, or there were too many in a row.
    """
    config, guard, step = t.config.train.anomaly, t.state.guard, t.state.step + 1
    guard.note(step)
    t.saving.finish()
    if config.action == "stop" or guard.in_row > config.limit:
        many = "" if config.action == "stop" else f", after {config.limit} more in a row that train.anomaly passed over"
        raise AnomalyError(
            f"{fault} at step {step}{many}; training stopped before the update ({_saved(t)}); start anew with "
            f"train.lr below {t.config.train.lr}, more train.warmup_steps or train.precision fp32"
        )
    done = "its batch is left out"
    if config.action == "roll_back" and t.saved_step is not None:
        done = f"back to the checkpoint of step {t.saved_step}, and on with later batches"
        go_back(t, t.saved_step)
        metrics.drop_after(t.state.step)
    metrics.write({"kind": "anomaly", "step": t.state.step + 1, "at": step, "fault": fault, "done": done})
    display.say(f"step {step:,}: {fault}; {done}")


def go_back(t: Training, step: int) -> None:
    """Takes weights, optimizer and random state from the checkpoint of a step; the data goes on where it is."""
    with t.ranks.agreed():
        earlier = load_checkpoint(t.run.checkpoint_path(step), t.model, t.optimizer, t.config, t.ranks.rank)
    t.state.go_back(earlier)
    t.pace = Pace(t.state.tokens, t.state.flops, t.state.seconds)


def _saved(t: Training) -> str:
    return "no checkpoint was saved yet" if t.saved_step is None else f"the last checkpoint is step-{t.saved_step}"


def set_learning_rate(t: Training) -> float:
    """Sets the learning rate of the coming update and returns it."""
    state, steps = t.state, t.config.train.steps
    if state.max_seconds is not None and state.step:
        steps = min(steps, max(state.step + 1, round(state.step * state.max_seconds / state.seconds)))
    lr = learning_rate(t.config.train, state.step, steps)
    for group in t.optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    return lr


def evaluate_held_out(t: Training, metrics: MetricsWriter, display: ProgressDisplay) -> None:
    """Evaluates the whole held-out set, writes the line and remembers it."""
    with t.memory.left_out():
        own = t.config.eval
        result = evaluate_by(t.config, t.model, t.data.val, by_depth=own.depths, deepest=own.deepest)
    if not math.isfinite(result.loss):
        raise AnomalyError(f"the held-out loss is {result.loss} at step {t.state.step}; training stopped ({_saved(t)})")
    line = evaluation_line(t, result)
    t.state.evaluation = line
    best = t.state.best_val_loss
    t.state.best_val_loss = result.loss if best is None else min(best, result.loss)
    metrics.write(line)
    accuracy = None if result.scores is None else result.scores.all.accuracy
    display.show_evaluation(t.state.step, result.loss, result.oracle_loss, accuracy)


def save(t: Training) -> None:
    """Saves a checkpoint of this step."""
    t.state.loader, t.state.loss_scale = t.loader.state_dict(), t.loss_scale.state_dict()
    [peak] = t.ranks.most(max(t.state.peak_memory_bytes, t.memory.bytes()))
    t.state.peak_memory_bytes = round(peak)
    asked = t.config.train.save_in_background
    t.saving.finish()
    with t.memory.left_out():
        in_background = t.device.type == "cuda" if asked is None else asked
        t.saving = save_checkpoint(t.run, t.model, t.optimizer, t.state, t.config, t.ranks, in_background)
    t.saved_step = t.state.step


def save_and_stop(t: Training, signal_number: int) -> None:
    """Saves and raises Interrupted, which says how to go on."""
    if t.saved_step != t.state.step:
        save(t)
    t.saving.finish()
    raise Interrupted(
        f"stopped and saved at step {t.state.step} of {t.config.train.steps}; go on with `{t.run.resume_command}`",
        signal_number,
        exit_code=0,
    )


@contextmanager
def saving_finished(t: Training) -> Iterator[None]:
    """Nothing ends before the checkpoint that is being written does."""
    try:
        yield
    finally:
        t.saving.finish()


def is_done(t: Training) -> bool:
    """Whether the steps or the seconds are used up."""
    out_of_time = t.state.max_seconds is not None and t.state.seconds >= t.state.max_seconds
    return out_of_time or t.state.step >= t.config.train.steps


def is_due(t: Training, every: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now; 0 is at the end only."""
    return is_done(t) or (every > 0 and t.state.step > 0 and t.state.step % every == 0)


def is_evaluated(t: Training) -> bool:
    """Whether the weights of this step have been evaluated."""
    return t.state.evaluation is not None and t.state.evaluation["step"] == t.state.step


def progress(t: Training) -> tuple[float, float, str]:
    """(total, done, unit) of the run."""
    if t.state.max_seconds is not None:
        return t.state.max_seconds, t.state.seconds, "seconds"
    return t.config.train.steps, t.state.step, "steps"
