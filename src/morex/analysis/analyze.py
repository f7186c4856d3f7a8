"""An analysis of a run, or of a trace file: where its routers send the tokens, and whether that is healthy."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from morex.analysis.drift import drift
from morex.analysis.health import judge
from morex.analysis.pictures import write_pictures
from morex.analysis.records import AccuracyReport, Analysis, LossReport, Missing
from morex.analysis.tally import AgreementTally, Tally
from morex.analysis.trace import DAMAGE, Decisions, damaged, decisions, join, load_trace, write_trace
from morex.analysis.vocabulary import token_classes, token_rarities
from morex.config import ModelConfig
from morex.data.errors import DataError
from morex.data.source import first_part, num_windows, training_tokens
from morex.data.stream import TokenStream
from morex.data.tasks.prepared import HeldOut
from morex.depth.policy import BY_DIFFICULTY, Depth, parse_depth
from morex.depth.routers import ROUTERS
from morex.eval.loss import EvalResult
from morex.eval.traces import own_rule, traced_batches
from morex.files import write_json
from morex.loading import ConfigError, decides_depth, decides_steps
from morex.model.lm import LanguageModel, build_model, takes_any_depth
from morex.sections.depth import ExpertChoiceConfig
from morex.sections.mixers import FeedForwardConfig
from morex.train.opening import OpenRun, evaluate_by, open_run, run_of
from morex.train.precision import autocast_dtype
from morex.train.setup import cpu_threads

if TYPE_CHECKING:
    from rich.console import Console

TOKENS = 16384
BATCH = 8
"""Windows that are traced at a time; their states are held, and nothing else."""
NO_RUN = "a trace file has no weights; analyse the run"


def analyze(
    run: str | Path,
    tokens: int = TOKENS,
    depth: Depth = None,
    trace: str | Path | None = None,
    device: str = "auto",
    overrides: Sequence[str] = (),
    console: "Console | None" = None,
) -> Analysis:
    """Analyses a run on the first tokens of its held-out set: always the same tokens, and the same result.

    Args:
        run: a run folder (its newest checkpoint), or one of its checkpoint folders.
        tokens: how many, rounded up to whole windows of train.seq_len, and at most the whole set.
        depth: depth policy of `model.forward`; default: the router's own rule (the oracle's where it has no other).
        trace: also writes the decisions of every token to this trace file; they are held in memory until then.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        overrides: `a.b=value` changes of data, train and eval options.
        console: where to say what is under way; default: nowhere.

    Raises:
        ConfigError: there is no such run, its corpus has changed, or a value is out of range.
    """
    if tokens < 1:
        raise ConfigError(f"tokens {tokens} must be 1 or more")
    return analyze_opened(open_run(Path(run), overrides, device), str(run), tokens, depth, trace, console)


def analyze_opened(
    opened: OpenRun,
    source: str,
    tokens: int = TOKENS,
    depth: Depth = None,
    trace: str | Path | None = None,
    console: "Console | None" = None,
) -> Analysis:
    """Analyses a run that is open; `source` is its name, all else as in `analyze`."""
    config = opened.config
    # A depth that is not understood is better refused before the work begins.
    recursions, span = config.model.schedule.resolved.recursions, config.model.max_seq_len
    rules = ROUTERS[config.model.depth.kind].exit_rules
    if depth != BY_DIFFICULTY:
        parse_depth(depth, recursions, span, takes_any_depth(config.model), rules)
    held_out = first_part(opened.data.val, tokens, config.train.seq_len)
    with cpu_threads(config.train.threads):
        tally, agreement, policy = _trace(opened, held_out, depth, trace, console)
        losses, accuracy = _losses(opened, held_out, depth, console)
    found = Analysis(
        source=source,
        step=opened.step,
        tokens=tally.tokens,
        windows=tally.windows,
        policy=policy,
        model=config.model.model_dump(mode="json"),
        groups=tuple(group.report() for group in tally.groups.values()),
        layers=tuple(layer.report() for layer in tally.layers.values()),
        depth=tally.depth_report(goes_differently_deep(config.model, policy)),
        agreement=agreement if isinstance(agreement, Missing) else {n: agreement.report(n) for n in agreement.counts},
        losses=losses,
        accuracy=accuracy,
        drift=drift(opened.run.metrics("train"), config.model),
    )
    return replace(found, health=judge(found))


def analyze_trace(path: str | Path) -> Analysis:
    """Analyses a trace file, as far as it goes: what needs weights or a training is said to be missing.

    Raises:
        DataError: it is no trace file, or is damaged.
    """
    trace = load_trace(path)
    if not trace.real.any():
        raise DataError(f"trace file '{path}' has no tokens")
    tally = Tally(trace.config)
    try:
        tally.add(trace)
    except DAMAGE as error:
        raise damaged(path, error) from None
    found = Analysis(
        source=str(path),
        step=None,
        tokens=tally.tokens,
        windows=tally.windows,
        policy=trace.policy,
        model=trace.config.model_dump(mode="json"),
        groups=tuple(group.report() for group in tally.groups.values()),
        layers=tuple(layer.report() for layer in tally.layers.values()),
        depth=tally.depth_report(goes_differently_deep(trace.config, trace.policy)),
        agreement=Missing(NO_RUN),
        losses=Missing(NO_RUN),
        accuracy=Missing(NO_RUN),
        drift=Missing("a trace file has no training; analyse the run"),
    )
    return replace(found, health=judge(found))


def write(analysis: Analysis, folder: str | Path, figures: bool = True) -> list[Path]:
    """Writes analysis.json and the figures into a folder, which is made where it is missing; returns what it wrote.

    Raises:
        ConfigError: there shall be figures, and matplotlib is missing; analysis.json is written all the same.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / "analysis.json", to_dict(analysis))
    return [place / "analysis.json", *(write_pictures(analysis, place) if figures else [])]


def folder_for(path: Path) -> Path:
    """Where the analysis of a run goes by default: `analysis` in its folder; of a checkpoint, a folder in that."""
    if path.is_file():
        return path.with_name(f"{path.stem}-analysis")
    run = run_of(path).path
    return run / "analysis" if run == path else run / "analysis" / path.resolve().name


def to_dict(analysis: Analysis) -> dict[str, Any]:
    """Plain data, as written to analysis.json."""
    return asdict(analysis)


def _trace(
    opened: OpenRun, held_out: TokenStream | HeldOut, depth: Depth, file: str | Path | None, console: "Console | None"
) -> tuple[Tally, AgreementTally | Missing, str]:
    """Goes over the windows once, under both rules where there are two."""
    config, model = opened.config, opened.model
    own = own_rule(config) if depth is None else depth
    policy = "router" if own is None else str(own)
    missing = _why_no_agreement(config.model, depth)
    rules: tuple[Depth, ...] = (own,) if missing else (own, "oracle")
    classes = token_classes(opened.tokenizer, config.model.vocab_size)
    rarities = token_rarities(training_tokens(opened.data), config.model.vocab_size)
    tally, agreement, kept = Tally(config.model), AgreementTally(), list[Decisions]()
    batches = traced_batches(
        model,
        held_out,
        config.train.seq_len,
        BATCH,
        rules,
        autocast_dtype(config.train.precision),
        config.data.mask_documents,
    )
    windows = num_windows(held_out, config.train.seq_len)
    deepest = held_out.hardest if own == BY_DIFFICULTY and isinstance(held_out, HeldOut) else 0
    with _bar(console, "tracing", windows) as advance:
        for batch in batches:
            first, *others = (
                decisions(
                    trace,
                    batch.tokens,
                    batch.lengths,
                    config.model,
                    policy,
                    classes,
                    rarities,
                    batch.difficulty,
                    recursions=deepest,
                )
                for trace in batch.traces
            )
            tally.add(first)
            for other in others:
                agreement.add(first, other)
            if file is not None:
                kept.append(first)
            advance(len(batch.tokens))
    if file is not None:
        write_trace(file, join(kept))
    return tally, Missing(missing) if missing else agreement, policy


def _why_no_agreement(config: ModelConfig, depth: Depth) -> str:
    """Why the causal rule and top-k are not compared; empty where they are."""
    if not isinstance(config.depth, ExpertChoiceConfig):
        steps = None if isinstance(config.mixer, FeedForwardConfig) else config.mixer.steps_router
        apart = "; what mixer.depth decides about steps is not" if isinstance(steps, ExpertChoiceConfig) else ""
        return f"depth.kind {config.depth.kind!r} trains and decodes by one rule{apart}"
    if config.depth.causal == "none":
        return "this model was trained with depth.causal 'none' and has no causal rule"
    return "" if depth is None else "the caller decides the depth"


def _losses(
    opened: OpenRun, held_out: TokenStream | HeldOut, depth: Depth, console: "Console | None"
) -> tuple[LossReport | Missing, AccuracyReport | Missing]:
    config, model = opened.config, opened.model
    recursions = config.model.schedule.resolved.recursions

    _say(console, f"losses at {recursions} depths" if recursions > 1 else "loss")
    whole = evaluate_by(config, model, held_out, depth, by_depth=True)
    by_depth: dict[int, float] | Missing = Missing("there is one recursion")
    if whole.by_depth is not None:
        by_depth = whole.by_depth
    by_steps: dict[int, float] | Missing
    shallow = with_fewer_steps(model)
    if isinstance(shallow, Missing):
        by_steps = shallow
    else:
        _say(console, "loss with one expert step less")
        assert not isinstance(config.model.mixer, FeedForwardConfig)
        steps = config.model.mixer.num_steps
        own = own_rule(config) if depth is None else depth
        by_steps = {steps - 1: evaluate_by(config, shallow, held_out, own).loss, steps: whole.loss}
    values = [whole.loss, *(v for found in (by_depth, by_steps) if isinstance(found, dict) for v in found.values())]
    accuracy = _accuracy(whole)
    if not all(math.isfinite(value) for value in values):
        return Missing("a loss is not finite"), accuracy
    return LossReport(whole.loss, whole.oracle_loss, by_depth, by_steps), accuracy


def _accuracy(result: EvalResult) -> AccuracyReport | Missing:
    if result.scores is None:
        return Missing("a text has no answers; the examples of a task have")
    by_depth = {r: scores.all.accuracy for r, scores in (result.scores_by_depth or {}).items()}
    return AccuracyReport(
        examples=result.scores.all.examples,
        accuracy=result.scores.all.accuracy,
        oracle_accuracy=None if result.oracle_scores is None else result.oracle_scores.all.accuracy,
        by_depth=by_depth or Missing("there is one recursion"),
        by_difficulty={level: score.accuracy for level, score in result.scores.by_difficulty.items()},
    )


def with_fewer_steps(model: LanguageModel) -> LanguageModel | Missing:
    """The same weights in a model whose experts take one step less; what belongs to the last step is left out."""
    mixer = model.config.mixer
    if isinstance(mixer, FeedForwardConfig):
        return Missing("this model has no experts")
    if mixer.num_steps == 1:
        return Missing(f"mixer.kind {mixer.kind!r} has experts of one step")
    if decides_steps(model.config):
        assert mixer.steps_router is not None
        return Missing(f"router {mixer.steps_router.kind!r} decides how many steps a token takes")
    shorter = model.config.model_copy(update={"mixer": mixer.model_copy(update={"steps": mixer.num_steps - 1})})
    weight = model.embedding.weight
    shallow = build_model(shorter, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        own = dict(model.state_dict())
        for name, tensor in shallow.state_dict().items():
            tensor.copy_(own[name][tuple(slice(size) for size in tensor.shape)])
    return shallow.eval()


def goes_differently_deep(config: ModelConfig, policy: str) -> bool:
    """Whether a router or the caller may let one token go deeper than another."""
    if policy in ("router", "oracle"):
        return decides_depth(config)
    return config.schedule.resolved.recursions > 1


def _say(console: "Console | None", text: str) -> None:
    if console is not None:
        console.print(f"{text} …", style="dim", highlight=False)


@contextmanager
def _bar(console: "Console | None", title: str, total: int) -> Iterator[Any]:
    """A bar over windows on a terminal, a line elsewhere; yields what advances it."""
    if console is None or not console.is_terminal:
        _say(console, f"{title} {total:,} windows")
        yield lambda windows: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{title} windows", total=total)
        yield lambda windows: progress.advance(task, windows)
