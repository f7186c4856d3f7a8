"""A study: variants x seeds under one budget. This file reads and checks its YAML; `plan` works out the cells."""

import re
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from morex.config import Config
from morex.loading import ConfigError, Shelf, closest, validate, with_override
from morex.sections.base import Section, Seed

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Twin = Literal["equal_depth", "equal_parameters", "equal_flops"]


class Budget(Section):
    """What every cell may spend."""

    kind: Literal["tokens", "flops", "seconds", "steps"] = "steps"
    """`tokens` seen, training `flops` by closed form, `seconds` of training, or optimizer `steps`."""
    value: PositiveFloat | None = None
    """How many; `steps` may leave it out, then each variant's train.steps holds."""

    @model_validator(mode="after")
    def _has_value(self) -> Self:
        if self.value is None and self.kind != "steps":
            raise ValueError(f"a budget of kind '{self.kind}' needs a value")
        return self


class Variant(Section):
    """One model of the study: a preset (or a YAML file) with changes, or the dense twin of another variant."""

    name: str
    """Short name, as it stands in the table and in file names."""
    preset: str | None = None
    """Preset or YAML file that the variant starts from; default for a variant that is no twin: its own name."""
    set: tuple[str, ...] = ()
    """Changes, as `a.b=value` strings or as a mapping; they come after those of the study."""
    twin_of: str | None = None
    """Variant whose dense twin this one is."""
    twin: Twin | None = None
    """What the twin shares with it: unrolled depth, parameters, or training FLOPs per token."""

    @field_validator("set", mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        return as_overrides(value)

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        _check_name("variants.name", self.name)
        if (self.twin_of is None) != (self.twin is None):
            raise ValueError(f"variant '{self.name}': twin_of and twin go together")
        if self.twin_of is not None and self.preset is not None:
            raise ValueError(f"variant '{self.name}' has both preset and twin_of: a twin is derived, give one of them")
        if self.twin_of is not None and (models := [change for change in self.set if change.startswith("model")]):
            raise ValueError(f"variant '{self.name}' is a twin, its model is solved for: '{models[0]}' cannot be set")
        return self


class SampleConfig(Section):
    """The text that each trained model is asked to continue."""

    prompt: str = "The people of the United States"
    max_new_tokens: PositiveInt = 80
    temperature: Annotated[float, Field(ge=0)] = 0.8
    top_k: PositiveInt | None = 40
    seed: Seed = 0


class ReportConfig(Section):
    """What is measured after training and how it is shown."""

    reference: str | None = None
    """Variant that speed and cost are set against; default: the first dense one."""
    map_text: str | None = None
    """Text whose depth is drawn token by token; default: the beginning of the held-out text."""
    map_tokens: PositiveInt = 160
    """Tokens of that text."""
    trace_windows: PositiveInt = 32
    """Held-out windows over which depths and expert loads are counted."""
    decode_tokens: PositiveInt = 64
    """Tokens decoded greedily, one sequence, to measure speed; the median of three."""


class StudyConfig(Section):
    """Everything about a study."""

    name: str
    title: str = ""
    """Heading of the report; default: the name."""
    description: str = ""
    """A paragraph for the reader of the report: what is asked, and what would count as an answer."""
    set: tuple[str, ...] = ()
    """Changes for every variant, as `a.b=value` strings or as a mapping."""
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Each seeds the weights and the training of one cell per variant; the split of the data stays the same."""
    budget: Budget = Budget()
    learning_rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] | None = None
    """Train each cell at each of these; the best is chosen on the first half of the held-out windows and its loss
    reported on the second."""
    sample: SampleConfig = SampleConfig()
    report: ReportConfig = ReportConfig()

    @field_validator("set", mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        return as_overrides(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_name("name", self.name)
        names = [variant.name for variant in self.variants]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"variant '{name}' appears more than once; names must differ")
        for variant in self.variants:
            if variant.twin_of is None:
                continue
            origin = next((other for other in self.variants if other.name == variant.twin_of), None)
            if origin is None:
                raise ValueError(
                    f"variant '{variant.name}' is a twin of '{variant.twin_of}', which is unknown"
                    f"{closest(variant.twin_of, names)}"
                )
            if origin.twin_of is not None:
                raise ValueError(f"variant '{variant.name}' is a twin of '{origin.name}', which is a twin itself")
        if self.report.reference is not None and self.report.reference not in names:
            raise ValueError(
                f"report.reference '{self.report.reference}' is no variant{closest(self.report.reference, names)}"
            )
        for what, values in (("seeds", self.seeds), ("learning_rates", self.learning_rates or ())):
            if len(set(values)) != len(values):
                raise ValueError(f"{what} {list(values)} has a value twice")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to a study folder's study.yaml."""
        return self.model_dump(mode="json")


STUDIES = Shelf(folder="studies", entry="study", sort="study", keys=tuple(StudyConfig.model_fields))


def studies() -> list[str]:
    """Names of the studies that come with the library."""
    return STUDIES.names()


def load_study(source: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Reads a study by name or from a YAML file.

    Args:
        source: a shipped study's name, or the path of a YAML file. One may start from another: `study: OTHER` at its
            top takes over everything that it does not say itself, and its `set` comes after that of the other.
        overrides: `a.b=value` strings. `model.`, `data.`, `train.` and `eval.` keys change every variant; all others
            are keys of the study, such as `budget.value` or `seeds`.

    Raises:
        ConfigError: unknown study or key, or values that do not fit together.
    """
    tree: dict[str, Any] = {"name": Path(source).stem} | reduce(_laid_over, STUDIES.lineage(source))
    cells: list[str] = []
    for override in overrides:
        if override.partition("=")[0].split(".")[0].strip() in Config.model_fields:
            cells.append(override)
        else:
            tree = with_override(tree, override)
    if cells:
        try:
            tree["set"] = [*as_overrides(tree.get("set", ())), *cells]
        except ValueError as error:
            raise ConfigError(f"set: {error}") from None
    return validate(StudyConfig, tree)


def _laid_over(below: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """A study over the one that it starts from, whose changes come first."""
    try:
        changes = [*as_overrides(below.get("set", ())), *as_overrides(tree.get("set", ()))]
    except ValueError as error:
        raise ConfigError(f"set: {error}") from None
    kept = {key: value for key, value in below.items() if key != "name"}
    return {**kept, **tree, "set": changes}


def as_overrides(value: Any) -> tuple[str, ...]:
    """A mapping, nested or dotted, as `a.b=value` strings, `kind` before its neighbours; a list of strings as it is.

    Raises:
        ValueError: neither a mapping nor a list of strings.
    """
    if isinstance(value, Mapping):
        return tuple(_flatten("", value))
    if isinstance(value, list | tuple) and all(isinstance(change, str) for change in value):
        return tuple(value)
    raise ValueError(f"{value!r} must be a list of 'a.b=value' strings or a mapping")


def _flatten(prefix: str, tree: Mapping[Any, Any]) -> list[str]:
    changes: list[str] = []
    for key, value in sorted(tree.items(), key=lambda item: item[0] != "kind"):
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            changes += _flatten(path, value)
        else:
            changes.append(f"{path}={_inline(value)}")
    return changes


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=2**20)
    return text.removesuffix("\n").removesuffix("\n...")


def _check_name(option: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{option} '{name}' must be letters, digits, dots, hyphens and underscores, because it names a folder"
        )
