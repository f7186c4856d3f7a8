"""Decoding speed of a preset in the engine, beside a dense model that the same engine decodes with ordinary batching.

Contenders take turns round by round in one process, and ratios are medians over rounds. Everything is inside the clock,
from a prompt's text to the last token, the first and the last wave of a closed loop included. Weights are untrained, so
the depths of a model with a router are forced (`morex.study.depth_mix`). No two prompts begin alike, so no text is kept
for others. The ceiling of a ratio is derived from the costs of passes (`morex.study.ceiling`), which are measured right
after the rounds that it stands beside.
"""

import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from rich.console import Console

from morex.config import ModelConfig
from morex.data.encoding import Tokenizer
from morex.infer.clock import Clock
from morex.infer.engine import Engine
from morex.infer.request import Params
from morex.infer.room import page_bytes
from morex.loading import ConfigError, load_config
from morex.model.checks import check_decodes
from morex.model.count import count, expected_shares
from morex.model.lm import LanguageModel, build_model
from morex.nn import fast
from morex.study.bench import Row, paired_ratio
from morex.study.bench_kv import DTYPES, expected_pages
from morex.study.ceiling import PAGE_SIZE, PassCosts, cache_bytes_for, ceiling, measure_passes, sizes_for
from morex.study.depth_mix import with_depths
from morex.study.overhead import measure_overhead
from morex.study.twins import bench_twin
from morex.study.workload import Served, drive, made_up_tokenizer, make_workload
from morex.train.memory import keep_freed_memory
from morex.train.precision import resolve_device, resolve_precision
from morex.train.setup import cpu_threads

VANILLA = "vanilla"
WARM_UP = 4
"""Requests, and new tokens of each, before the clock runs."""


@dataclass(frozen=True)
class DecodePlan:
    """What is measured."""

    preset: str
    overrides: Sequence[str] = ()
    tiny: bool = False
    against: str | None = VANILLA
    """`vanilla` is the preset's dense twin, another name a preset, None nothing."""
    modes: Sequence[str] = ("depthwise",)
    """How a model with recursions is batched; one without is always batched continuously. `uniform` is lockstep in
    which all tokens are computed through all recursions, whatever their router says, as where a batch keeps its shape.
    """
    concurrencies: Sequence[int] = (8,)
    """Requests at a time."""
    cache_bytes: int | None = None
    """Default: enough for all requests at full depth."""
    cache_requests: Sequence[int] = ()
    """In place of concurrencies: budgets that hold so many of the longest requests of the model compared with. Each
    model then runs as many as it holds of its own."""
    rate: float | None = None
    """Poisson arrivals, requests a second; None: closed loop."""
    requests: int | None = None
    """Of each round; default: four times those that run at a time."""
    prompt_tokens: tuple[int, int] = (64, 256)
    new_tokens: int = 128
    depth_mix: Sequence[float] | None = None
    """Weights of depths 1..R; None: the shares that the preset's own router aims at."""
    own_router: bool = False
    """Whether depths are left to the untrained router."""
    precision: str = "fp32"
    threads: int = 1
    rounds: int = 3
    device: str = "auto"
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens that a request may have in the cache."""
        return self.prompt_tokens[1] + self.new_tokens - 1


@dataclass(frozen=True)
class Best:
    """What a contender could do."""

    tokens_per_s: float
    costs: PassCosts


@dataclass(eq=False)
class Contender:
    """A model and how it is batched, with what came of its rounds at one concurrency."""

    name: str
    mode: str
    model: LanguageModel
    overrides: Sequence[str]
    twin_of: str | None = None
    concurrency: int = 0
    cache_bytes: int = 0
    rounds: list[Served] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    """Of all rounds."""
    probe: dict[str, float] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def groups(self) -> int:
        """Routed groups."""
        return self.config.schedule.resolved.num_groups

    @property
    def in_lockstep(self) -> bool:
        """Whether all tokens of a step leave the core together."""
        return self.mode in ("lockstep", "uniform")

    @property
    def computes_all(self) -> bool:
        """Whether no token leaves before the last recursion."""
        return self.mode == "uniform"

    @property
    def params(self) -> Params:
        """What its requests ask for, beside their number of tokens."""
        return Params(depth=f"uniform:{self.config.schedule.recursions}" if self.computes_all else None)

    def seat(self, plan: DecodePlan, number: int, budget_of: "Contender | None") -> None:
        """How many requests run at a time in how much memory.

        Args:
            number: of requests.
            budget_of: who needs the memory for as many; the others run as many as they hold of their own in it.
        """
        self.rounds, self.concurrency = [], number
        if budget_of is None:
            self.cache_bytes = plan.cache_bytes or cache_bytes_for(self.model, number, plan.longest)
            return
        self.cache_bytes = number * budget_of.bytes_of(plan.longest)
        self.concurrency = max(1, self.cache_bytes // self.bytes_of(plan.longest))

    def bytes_of(self, tokens: int) -> int:
        """Bytes in the pages of one request of so many tokens, on average."""
        everybody = (1.0,) * self.config.schedule.recursions
        shares = everybody if self.computes_all else expected_shares(self.config, tokens)
        return expected_pages(self.config, shares, tokens, PAGE_SIZE) * page_bytes(self.model, PAGE_SIZE)

    def engine(self) -> Engine:
        """A new engine of this model."""
        return Engine(
            self.model,
            cache_bytes=self.cache_bytes,
            page_size=PAGE_SIZE,
            most_requests=self.concurrency,
            prefixes=0,
            lockstep=self.in_lockstep,
        )

    def shares(self) -> tuple[float, ...]:
        """Share of the tokens that took recursion r = 1..R, in all rounds."""
        tokens = self.groups * max(1, self.clock.entering)
        return tuple(self.clock.visits[r] / tokens for r in range(1, self.config.schedule.recursions + 1))

    def rates(self) -> list[float]:
        """New tokens a second, by round."""
        return [served.tokens / served.seconds for served in self.rounds]

    def seconds(self) -> dict[str, float]:
        """By part, of all rounds."""
        outside = {name: sum(getattr(served, name) for served in self.rounds) for name in ("tokenizing", "waiting")}
        known = outside | self.clock.seconds
        return known | {"scheduling": sum(served.seconds for served in self.rounds) - sum(known.values())}


def bench_decode(plan: DecodePlan, console: Console | None = None) -> Iterator[Row]:
    """Measures a preset in its modes and what it is compared with.

    Yields:
        Rows as soon as all of a concurrency are there, see `_row`.

    Raises:
        ConfigError: an unknown preset, key, device or precision, or options that do not fit.
        ValueError: a classifier, a cache too small for one request, or prompts longer than the model takes.
    """
    console = console or Console(quiet=True)
    if plan.cache_requests and (plan.against is None or plan.cache_bytes is not None):
        raise ConfigError(
            "--cache-requests counts requests of the model that --against names, and gives the bytes of the cache; "
            "name one there, and leave --cache-bytes out"
        )
    keep_freed_memory()
    with cpu_threads(plan.threads):
        contenders, reference, precision = _contenders(plan, console)
        tokenizer = made_up_tokenizer(min(own.config.vocab_size for own in contenders))
        told = {"precision": precision, "tokenizer": tokenizer.kind, "native": fast.is_native()}
        for number in plan.cache_requests or plan.concurrencies:
            budget = number if plan.cache_requests else None
            for own in contenders:
                own.seat(plan, number, reference if plan.cache_requests else None)
            running = ", ".join(f"{own.name} {own.mode} {own.concurrency}" for own in contenders)
            console.print(f"requests at a time: {running}", highlight=False)
            _rounds(plan, contenders, tokenizer, console)
            best = _ceilings(plan, contenders, console) if plan.rate is None else {}
            for own in contenders:
                yield _row(plan, own, contenders, reference, best) | told | {"cache_requests": budget}


def _contenders(plan: DecodePlan, console: Console) -> tuple[list[Contender], Contender | None, str]:
    """The models in their modes; among them the one that all are compared with, if any; and the precision."""
    device, lengths = resolve_device(plan.device), (plan.prompt_tokens, plan.new_tokens)
    if plan.own_router:
        config, overrides = load_config(plan.preset, plan.overrides, plan.tiny), list(plan.overrides)
    else:
        config, overrides = with_depths(plan.preset, plan.overrides, plan.tiny, plan.depth_mix, *lengths)
    check_decodes(config.model, None)
    precision = resolve_precision(plan.precision, device, config.model.d_model)

    def built(model: ModelConfig) -> LanguageModel:
        check_decodes(model, None)
        return build_model(model, device, DTYPES[precision]).eval()

    modes, model = _modes(plan, config.model), built(config.model)
    found = [Contender(plan.preset, mode, model, overrides) for mode in modes]
    if plan.against == VANILLA:
        twin = bench_twin(config.model)
        if twin is None:
            return found, found[0], precision
        found.append(Contender(VANILLA, "continuous", built(twin), list(plan.overrides), plan.preset))
    elif plan.against is not None:
        other, overrides = with_depths(plan.against, [], plan.tiny, None, *lengths)
        mode = "continuous" if other.model.schedule.recursions == 1 else "depthwise"
        found.append(Contender(plan.against, mode, built(other.model), overrides))
    return found, None if plan.against is None else found[-1], precision


def _modes(plan: DecodePlan, model: ModelConfig) -> list[str]:
    """How the preset is batched: each way that was asked for and that there is."""
    if model.schedule.recursions == 1:
        return ["continuous"]
    modes = [mode for mode in plan.modes if mode != "continuous"]
    if not modes:
        raise ConfigError(
            f"--mode continuous is for models without recursions, and '{plan.preset}' has {model.schedule.recursions}; "
            "use depthwise, lockstep or uniform"
        )
    return modes


def _rounds(plan: DecodePlan, contenders: Sequence[Contender], tokenizer: Tokenizer, console: Console) -> None:
    """Rounds in which each contender serves the same requests once, in an order that turns from round to round."""
    requests = plan.requests or 4 * max(own.concurrency for own in contenders)
    engines = [own.engine() for own in contenders]
    shape = (plan.prompt_tokens, plan.new_tokens)
    warm = make_workload(tokenizer, WARM_UP, plan.prompt_tokens, min(WARM_UP, plan.new_tokens), seed=plan.seed)
    for own, engine in zip(contenders, engines, strict=True):
        drive(engine, tokenizer, warm, WARM_UP, own.params)
        engine.clock.reset()
    for number in range(plan.rounds):
        work = make_workload(tokenizer, requests, *shape, plan.rate, plan.seed + 1 + number)
        order = list(range(len(contenders)))
        for place in order[number % len(order) :] + order[: number % len(order)]:
            own = contenders[place]
            own.rounds.append(drive(engines[place], tokenizer, work, own.concurrency, own.params))
            console.print(
                f"round {number + 1} of {plan.rounds}: {own.name} {own.mode} {own.rates()[-1]:.1f} tokens/s",
                highlight=False,
            )
    for own, engine in zip(contenders, engines, strict=True):
        own.clock = copy.deepcopy(engine.clock)
        work = make_workload(tokenizer, own.concurrency, *shape, seed=plan.seed)
        prompts = [tokenizer.encode(text)[:tokens] for text, tokens in zip(work.texts, work.lengths, strict=True)]
        own.probe = measure_overhead(engine, prompts, replace(own.params, max_new_tokens=plan.new_tokens))


def _ceilings(plan: DecodePlan, contenders: Sequence[Contender], console: Console) -> dict[int, Best]:
    """The best that each contender could do, by its place."""
    console.print("costs of passes", highlight=False)
    models = {(id(own.model), own.computes_all): own for own in contenders}
    prompt = sum(plan.prompt_tokens) // 2
    measured = measure_passes(
        [own.model for own in models.values()],
        [sizes_for(own.concurrency) for own in models.values()],
        [own.shares() for own in models.values()],
        prompt,
        prompt + plan.new_tokens // 2,
        depths=[own.params.depth for own in models.values()],
    )
    costs = dict(zip(models, measured, strict=True))
    found = {}
    for place, own in enumerate(contenders):
        passes = costs[id(own.model), own.computes_all]
        best = ceiling(passes, own.concurrency, own.shares(), plan.new_tokens, own.groups, own.in_lockstep)
        found[place] = Best(best, passes)
    return found


def _row(
    plan: DecodePlan,
    own: Contender,
    contenders: Sequence[Contender],
    reference: Contender | None,
    best: dict[int, Best],
) -> Row:
    """The figures of one contender at one concurrency: those of `_compared`, and all that it takes to repeat them.

    preset, mode, twin_of (whose dense twin it is), against; concurrency, requests at a time at most, and mean_running,
    those that ran in a step; tokens_per_s, the median over rounds; mean_depth and shares at recursion r = 1..R, prompts
    included; ttft_s and tpot_s, seconds to the first token and for each further one; overhead_share;
    kv_bytes_per_token, measured, and kv_closed_form; seconds by part of all rounds, `scheduling` being what is left.
    With them go the precision, the tokenizer, and whether the native kernels were there.
    """
    shares, context = own.shares(), sum(plan.prompt_tokens) // 2 + plan.new_tokens // 2
    size = own.model.embedding.weight.element_size()
    counted = count(own.config, context=context, shares=shares, bytes_per_value=size)
    asked = ("tiny", "rate", "prompt_tokens", "new_tokens", "depth_mix", "threads", "device", "seed")
    return {
        "preset": own.name,
        "mode": own.mode,
        "twin_of": own.twin_of,
        "against": plan.against,
        "concurrency": own.concurrency,
        "mean_running": own.clock.running / max(1, own.clock.steps),
        "cache_bytes": own.cache_bytes,
        "tokens_per_s": statistics.median(own.rates()),
        **_compared(own, contenders, reference, best, context),
        "mean_depth": sum(shares),
        "shares": shares,
        "ttft_s": _percentiles([seconds for served in own.rounds for seconds in served.ttft]),
        "tpot_s": _percentiles([seconds for served in own.rounds for seconds in served.tpot]),
        **own.probe,
        "kv_closed_form": counted.kv_bytes_per_token,
        "kv": own.config.kv,
        "parameters": counted.parameters,
        "seconds": own.seconds(),
        "tokens": sum(served.tokens for served in own.rounds),
        "tokens_entering": own.clock.entering,
        "steps": own.clock.steps,
        "requests": sum(len(served.ttft) for served in own.rounds),
        "page_size": PAGE_SIZE,
        "depth": own.config.depth.model_dump(mode="json"),
        "overrides": list(own.overrides),
        "rounds": plan.rounds,
        **{name: getattr(plan, name) for name in asked},
    }


def _compared(
    own: Contender,
    contenders: Sequence[Contender],
    reference: Contender | None,
    best: dict[int, Best],
    context: int,
) -> Row:
    """How a contender does beside others, and beside what its passes allow; None where there is nothing to compare.

    ratio_to_vanilla (to whom `against` names); ratio_to_lockstep and ratio_to_uniform, of the same model; ceiling of
    the first, and share_of_ceiling; ceiling_tokens_per_s, share_of_own_best (tokens_per_s over that) and pass_costs,
    seconds by tokens; flop_ratio, FLOPs of a token of `against` over those of one of this model.
    """
    place = contenders.index(own)
    row: Row = dict.fromkeys(("ceiling", "share_of_ceiling", "ceiling_tokens_per_s", "share_of_own_best", "pass_costs"))
    row |= {"ratio_to_vanilla": _ratio(own, reference), "flop_ratio": None}
    row |= {f"ratio_to_{mode}": _ratio(own, _other_mode(own, mode, contenders)) for mode in ("lockstep", "uniform")}
    if best:
        row["ceiling_tokens_per_s"], row["pass_costs"] = best[place].tokens_per_s, asdict(best[place].costs)
        row["share_of_own_best"] = statistics.median(own.rates()) / best[place].tokens_per_s
    if reference is not None:
        flops, theirs = (
            count(c.config, context=context, shares=c.shares()).decode_flops_per_token for c in (own, reference)
        )
        row["flop_ratio"] = theirs / flops
    if reference is not None and best:
        row["ceiling"] = best[place].tokens_per_s / best[contenders.index(reference)].tokens_per_s
        row["share_of_ceiling"] = row["ratio_to_vanilla"] / row["ceiling"]
    return row


def _other_mode(own: Contender, mode: str, contenders: Sequence[Contender]) -> Contender | None:
    """The same model in this mode, if it is there in another one too."""
    found = [other for other in contenders if other.model is own.model and other.mode == mode]
    return found[0] if found and found[0] is not own else None


def _ratio(own: Contender, other: Contender | None) -> float | None:
    return None if other is None else paired_ratio(own.rates(), other.rates())


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """The median and what one in twenty exceeds."""
    return {f"p{p}": float(np.percentile(values, p)) for p in (50, 95)} if values else None
