"""`train` and `eval`: one run."""

import math
import os
import shlex
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from morex.cli.accuracy import accuracy_table, rule_name, rules
from morex.cli.app import AsJson, ConfigSource, Depth, Device, Overrides, RunFolder, Tiny, app, examples
from morex.cli.terminal import console, number, print_json, print_table
from morex.loading import ConfigError, load_config, presets

if TYPE_CHECKING:
    from morex.config import Config
    from morex.eval.loss import EvalResult

TINY_VOCABULARY = 512
"""The tiny form's own 97 ids are too few for a trained tokenizer."""
SUMMARY_ROWS = {
    "steps": "steps",
    "tokens": "tokens",
    "seconds": "seconds",
    "tokens_per_s": "tokens/s",
    "final_train_loss": "last training loss",
    "val_loss": "held-out loss",
    "val_loss_oracle": "held-out loss, oracle",
    "val_accuracy": "held-out accuracy",
    "val_accuracy_oracle": "held-out accuracy, oracle",
    "bits_per_byte": "bits per byte",
    "peak_memory_bytes": "peak memory, bytes",
    "parameters": "parameters",
    "train_flops_per_token": "training FLOPs/token",
    "kv_bytes_per_token": "KV bytes/token",
}


@app.command(
    epilog=examples(
        "morex train mor-expert --out runs/first",
        "morex train vanilla --set train.steps=200 --set data.corpus=book.txt",
        "morex train my-config.yaml --tiny --set train.device=cpu",
        "morex train --resume runs/first",
        "morex train --branch runs/long --set train.steps=500 --out runs/long-500",
    )
)
def train(
    context: typer.Context,
    config: ConfigSource,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder of the run; default: runs/<config>-<date>-<time>.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint; CONFIG may then be the run folder.")
    ] = False,
    branch: Annotated[
        bool,
        typer.Option(
            "--branch", help="Begin a run from a checkpoint of another; CONFIG is its run or checkpoint folder."
        ),
    ] = False,
    tiny: Tiny = False,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Processes of this machine that train; default: one for each GPU, else one."
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Machines that train together, each with this command.")
    ] = None,
    node: Annotated[int | None, typer.Option(min=0, metavar="I", help="Number of this machine, from 0.")] = None,
    head: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where machines find each other: on machine 0, a free port.")
    ] = None,
) -> None:
    """Train one model and keep everything in a run folder.

    Ctrl-C or SIGTERM saves a checkpoint and says how to go on. On several machines start the command on each, with
    --nodes, --node and --head and a run folder that all of them see, or let torchrun or Slurm start the ranks.
    """
    from morex.cli.launch import Nodes, launch, ranks_to_start

    machines = Nodes.asked(nodes, node, head)
    if machines.count > 1:  # read when torch is imported; it warns, with a stack trace, of a machine that leaves first
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if branch:
        settings, folder = _branch_to_train(config, overrides or [], out, resume or tiny)
    else:
        settings, folder = _run_to_train(config, overrides or [], out, resume, tiny)
    count = ranks_to_start(ranks, settings.train.device)
    if count > 1 or (machines.count > 1 and "WORLD_SIZE" not in os.environ):
        from morex.train.runs import RunFolder as Run

        run = Run(folder)
        raise typer.Exit(launch(count, context.obj.words, lambda: run.is_stopped, machines))
    from morex.train.trainer import train as train_run

    progress = console(stderr=True)
    summary = train_run(settings, folder, resume=resume, console=progress, branch_of=Path(config) if branch else None)
    if os.environ.get("RANK", "0") != "0":  # one of several ranks, the first of which says it
        return
    print_table(
        ["", str(folder)],
        [[label, number(summary[key])] for key, label in SUMMARY_ROWS.items() if summary.get(key) is not None],
    )
    progress.print(_advice(settings, shlex.quote(str(folder))), style="dim", markup=False)


@app.command(
    name="eval",
    epilog=examples(
        "morex eval runs/first",
        "morex eval runs/first --depths",
        "morex eval runs/first --depth 2 --json",
        "morex eval runs/sums --difficulty 11:20 --by-difficulty",
    ),
)
def evaluate(
    run: RunFolder,
    depth: Depth = None,
    depths: Annotated[bool, typer.Option("--depths", help="Also the loss at each fixed depth 1..R.")] = False,
    deepest: Annotated[int | None, typer.Option(min=1, help="Last depth of --depths; default: R.")] = None,
    by_difficulty: Annotated[
        bool, typer.Option("--by-difficulty", help="Accuracy of a task at each difficulty.")
    ] = False,
    difficulty: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH", help="Held-out examples of these difficulties: data.task.eval_difficulty."),
    ] = None,
    overrides: Overrides = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Evaluate a run on its whole held-out set.

    Loss, perplexity and bits per byte, or of a task accuracy; for expert choice by the causal rule of decoding, beside
    the oracle of training.
    """
    span = [] if difficulty is None else [_eval_difficulty(difficulty)]
    from morex.train.opening import evaluate_by, open_run, run_of

    _check_task_options(run_of(run).config(), by_difficulty, difficulty)
    opened = open_run(run, [*(overrides or []), *span], device)
    config = opened.config
    named = config.train.policy if depth is None else depth
    by_depth = depths or deepest is not None or config.eval.depths
    result = evaluate_by(config, opened.model, opened.data.val, depth, by_depth, deepest or config.eval.deepest)
    if as_json:
        print_json(asdict(result))
    elif result.scores is not None:
        print_table(*accuracy_table(result, named, by_difficulty))
    else:
        print_table([f"{result.tokens:,} tokens", "loss", "perplexity", "bits per byte"], _loss_rows(result, named))


def _branch_to_train(source: str, overrides: list[str], out: Path | None, others: bool) -> "tuple[Config, Path]":
    """The config of a branch and the folder that it goes to; `others`: whether options were given that do not fit."""
    if others:
        raise ConfigError("--branch begins a new run from a checkpoint; leave --resume and --tiny out")
    from morex.train.opening import run_of

    run = run_of(Path(source)).path
    config = load_config(run / "config.yaml", overrides)
    return config, out or run.with_name(f"{run.name}-{config.train.steps}")


def _run_to_train(
    source: str, overrides: list[str], out: Path | None, resume: bool, tiny: bool
) -> "tuple[Config, Path]":
    """The config of a training and the folder that it goes to."""
    if resume and (Path(source) / "config.yaml").is_file():
        return load_config(Path(source) / "config.yaml", overrides), Path(source)
    if resume and out is None and source not in presets() and not Path(source).is_file():
        raise ConfigError(f"'{source}' is not a run folder: it has no config.yaml")
    if tiny:
        overrides = [f"model.vocab_size={TINY_VOCABULARY}", *overrides]
    config = load_config(source, overrides, tiny=tiny)
    if resume and out is None:
        raise ConfigError("--resume needs the run to go on with: morex train --resume RUN, or --out RUN beside CONFIG")
    return config, out or Path("runs") / f"{Path(source).stem}-{datetime.now():%Y%m%d-%H%M%S}"


def _advice(config: "Config", run: str) -> str:
    """What to do with a finished run."""
    depth = config.model.depth
    if config.data.task is not None:
        return f"Next: morex eval {run} --by-difficulty"
    if depth.kind == "expert_choice" and depth.causal == "none":
        return f"Next: morex eval {run}; it has no causal rule (depth.causal 'none') and decodes at a fixed --depth"
    return f"Next: morex eval {run}, morex generate {run} --prompt 'Once upon a time', or morex chat {run}"


def _eval_difficulty(span: str) -> str:
    """The override that --difficulty LOW:HIGH stands for."""
    low, separator, high = span.partition(":")
    if not (separator and low.isdecimal() and high.isdecimal()):
        raise ConfigError(f"--difficulty {span} must have the form LOW:HIGH, such as 11:20")
    return f"data.task.eval_difficulty=[{low}, {high}]"


def _check_task_options(config: "Config", by_difficulty: bool, difficulty: str | None) -> None:
    for option, given in (("--by-difficulty", by_difficulty), ("--difficulty", difficulty is not None)):
        if given and config.data.task is None:
            raise ConfigError(f"{option} is for runs on a task; this one was trained on {config.data.described}")


def _loss_rows(result: "EvalResult", depth: str | None) -> list[list[str]]:
    """Rows of the evaluation table; perplexity and bits per byte of every row follow from its loss."""
    losses: list[tuple[str | int, float]] = [*rules(result, depth, result.loss, result.oracle_loss)]
    losses += (result.by_depth or {}).items()
    assert result.bits_per_byte is not None
    bits_per_nat = result.bits_per_byte / result.loss
    return [
        [rule_name(rule), f"{loss:.4f}", f"{math.exp(loss):,.2f}", f"{loss * bits_per_nat:.4f}"]
        for rule, loss in losses
    ]
