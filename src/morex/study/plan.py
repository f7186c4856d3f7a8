"""Works out a study: each variant's whole config, its steps under the budget, and the cells to train."""

from dataclasses import dataclass
from typing import Any

from morex.config import Config, ModelConfig
from morex.loading import ConfigError, is_depth_routed, load_config, validate, with_override
from morex.model.count import count
from morex.sections.mixers import FeedForwardConfig
from morex.study.records import Kind
from morex.study.spec import StudyConfig, Twin, Variant
from morex.study.twins import derive_twin, unrouted

UNLIMITED = 10**9
"""Steps of a cell whose budget is time."""


@dataclass(frozen=True)
class PlannedVariant:
    """A variant with its config; `unrouted` names the variant that is the same model without its depth router."""

    name: str
    config: Config
    kind: Kind
    twin_of: str | None
    twin: Twin | None
    unrouted: str | None = None


@dataclass(frozen=True)
class PlannedCell:
    """One training; `max_seconds` ends it where the budget is time. `name` is also its folder's."""

    name: str
    variant: str
    seed: int
    lr: float
    config: Config
    max_seconds: float | None

    @property
    def train_flops(self) -> float:
        """Training FLOPs of all its steps, by closed form."""
        train = self.config.train
        per_token = count(self.config.model, seq_len=train.seq_len).train_flops_per_token
        return per_token * train.steps * train.batch_size * train.seq_len


@dataclass(frozen=True)
class Plan:
    """All variants and cells, in the order of the study, and the variant that the others are set against."""

    variants: tuple[PlannedVariant, ...]
    cells: tuple[PlannedCell, ...]
    reference: str


def plan(study: StudyConfig) -> Plan:
    """Resolves a study.

    Raises:
        ConfigError: a variant's config is not valid, or variants differ in what makes losses comparable.
    """
    configs: dict[str, Config] = {}
    for variant in study.variants:
        if variant.twin_of is None:
            configs[variant.name] = _load(study, variant)
    for variant in study.variants:
        if variant.twin_of is not None:
            configs[variant.name] = _twin(configs[variant.twin_of], variant)
    configs = {variant.name: _spend(study, variant.name, configs[variant.name]) for variant in study.variants}
    _check_comparable(configs)
    variants = tuple(_planned(variant, configs) for variant in study.variants)
    dense = [variant.name for variant in variants if variant.kind == "dense"]
    reference = study.report.reference or (dense[0] if dense else variants[0].name)
    return Plan(variants, tuple(_cells(study, configs)), reference)


def _load(study: StudyConfig, variant: Variant) -> Config:
    try:
        return load_config(variant.preset or variant.name, [*study.set, *variant.set])
    except ConfigError as error:
        raise ConfigError(f"variant '{variant.name}': {error}") from None


def _twin(origin: Config, variant: Variant) -> Config:
    assert variant.twin is not None
    try:
        model = derive_twin(origin.model, variant.twin, origin.train.seq_len)
        tree = origin.to_dict() | {"model": model.model_dump(mode="json")}
        for change in variant.set:
            tree = with_override(tree, change)
        return validate(Config, tree)
    except ConfigError as error:
        raise ConfigError(f"variant '{variant.name}': {error}") from None


def _spend(study: StudyConfig, name: str, config: Config) -> Config:
    """The config with the steps that the budget allows."""
    budget, train = study.budget, config.train
    tokens_per_step = train.batch_size * train.seq_len
    match budget.kind:
        case "tokens":
            assert budget.value is not None
            steps = budget.value / tokens_per_step
        case "flops":
            assert budget.value is not None
            steps = budget.value / (count(config.model, seq_len=train.seq_len).train_flops_per_token * tokens_per_step)
        case "steps":
            steps = budget.value or train.steps
        case "seconds":
            steps = UNLIMITED
    if round(steps) < 1:
        raise ConfigError(
            f"variant '{name}': a budget of {budget.value:,.0f} {budget.kind} is less than one step of "
            f"{tokens_per_step:,} tokens; raise budget.value or lower train.batch_size"
        )
    return config.model_copy(update={"train": train.model_copy(update={"steps": round(steps)})})


def _check_comparable(configs: dict[str, Config]) -> None:
    """Losses are compared only over the same tokens, seen in the same windows."""
    (first, one), *others = configs.items()
    for name, other in others:
        for key, mine, theirs in (
            *((f"data.{key}", getattr(one.data, key), getattr(other.data, key)) for key in type(one.data).model_fields),
            ("model.vocab_size", one.model.vocab_size, other.model.vocab_size),
            ("train.seq_len", one.train.seq_len, other.train.seq_len),
        ):
            if mine != theirs:
                raise ConfigError(
                    f"variants '{first}' and '{name}' differ in {key} ({_short(mine)} and {_short(theirs)}), so their "
                    f"losses are not comparable; set one value for all in the study's `set`"
                )


def _short(value: Any) -> str:
    return str(value) if not hasattr(value, "model_dump") else str(value.model_dump(exclude_none=True))


def _planned(variant: Variant, configs: dict[str, Config]) -> PlannedVariant:
    model = configs[variant.name].model
    plain = unrouted(model)
    same = next((name for name, config in configs.items() if config.model == plain), None)
    return PlannedVariant(variant.name, configs[variant.name], kind_of(model), variant.twin_of, variant.twin, same)


def kind_of(model: ModelConfig) -> Kind:
    """`routed` depth, `experts`, `recursive` or `dense`, the first that applies."""
    if is_depth_routed(model):
        return "routed"
    if not isinstance(model.mixer, FeedForwardConfig):
        return "experts"
    return "recursive" if model.schedule.recursions > 1 else "dense"


def describe(config: Config) -> str:
    """A model in one line: width, blocks, mixer, router."""
    model, schedule = config.model, config.model.schedule.resolved
    mixer = model.mixer
    if isinstance(mixer, FeedForwardConfig):
        channel = f"{mixer.kind} {mixer.hidden(model.d_model)}"
    else:
        router = mixer.router
        what = "recursive experts" if mixer.kind == "recursive" else "experts"
        loops = f", {mixer.num_steps} steps each" if mixer.kind == "recursive" else ""
        channel = f"{router.top_k} of {router.experts} {what}{loops}"
    if schedule.recursions == 1:
        blocks = f"{schedule.num_blocks} blocks"
    else:
        ends = f"{schedule.prelude} + ", f" + {schedule.coda}"
        core = f"{schedule.core} × {schedule.recursions}"
        blocks = f"{ends[0] if schedule.prelude else ''}{core}{ends[1] if schedule.coda else ''} blocks"
        blocks += " in sequence" if schedule.order == "sequence" else ""
    routed = f", {model.depth.kind.replace('_', ' ')}" if is_depth_routed(model) else ""
    return f"{blocks} of width {model.d_model}, {channel}{routed}"


def _cells(study: StudyConfig, configs: dict[str, Config]) -> list[PlannedCell]:
    cells = []
    max_seconds = study.budget.value if study.budget.kind == "seconds" else None
    for seed in study.seeds:
        for variant in study.variants:
            config = configs[variant.name]
            for lr in study.learning_rates or (config.train.lr,):
                model = config.model.model_copy(update={"seed": seed})
                train = config.train.model_copy(update={"seed": seed, "lr": lr})
                own = config.model_copy(update={"model": model, "train": train})
                rate = f"{lr:g}" if float(f"{lr:g}") == lr else repr(lr)
                name = f"{variant.name}-s{seed}" + (f"-lr{rate}" if study.learning_rates else "")
                cells.append(PlannedCell(name, variant.name, seed, lr, own, max_seconds))
    return cells
