"""Draws model configs from the config classes themselves, so that an option added to a section is drawn as well."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from morex.config import ModelConfig
from morex.loading import SCHEDULE_FORMS
from morex.sections.schedule import ScheduleConfig

# Sizes that everything else is drawn around; what is not here is drawn.
PINNED: dict[str, Any] = {"vocab_size": 13, "d_model": 24, "max_seq_len": 32, "seed": 0}
INTEGERS, FLOATS = [0, 1, 1, 2, 2, 3, 4, 6], [0.0, 0.1, 0.25, 0.5, 0.9, 1.0, 2.0, 10.0]
OWN_VALUE = 0.25
"""How often an option is drawn at all, where nothing asks for it; those of the schedule always are."""


@dataclass(frozen=True)
class Option:
    """A value of an option, or a kind of a section, that is asked for."""

    section: type[BaseModel]
    field: str = ""
    value: Any = None
    """`SET` for any value but None."""

    def __str__(self) -> str:
        return f"{self.section.__name__}.{self.field}={self.value}" if self.field else self.section.__name__


SET = "set"


def options() -> list[Option]:
    """Every kind of section, and every value of every option that has few: words, yes or no, given or left out."""
    found = []
    for section in sections(ModelConfig):
        found.append(Option(section))
        for name, field in section.model_fields.items():
            values = [member for member in members(field.annotation) if not is_section(member)]
            words = [word for member in values for word in get_args(member) if get_origin(member) is Literal]
            words += [yes for member in values for yes in (False, True) if member is bool]
            if type(None) in values and name not in PINNED:
                words.append(SET)
            found += [Option(section, name, word) for word in words if name != "kind" or len(words) > 1]
    return found


def draw(wanted: Option, rng: random.Random) -> dict[str, Any]:
    """The tree of a model config with what is wanted, whether it is valid or not."""
    return _section(ModelConfig, wanted, rng)


@cache
def sections(root: Any) -> list[type[BaseModel]]:
    """A section and all below it, each once."""
    found: list[type[BaseModel]] = []
    waiting = [root]
    while waiting:
        section = waiting.pop(0)
        if section not in found:
            found.append(section)
            annotations = [field.annotation for field in section.model_fields.values()]
            waiting += [member for annotation in annotations for member in members(annotation) if is_section(member)]
    return found


def members(annotation: Any) -> Iterator[Any]:
    """The types of a union, or the one type there is, without what pydantic wraps around them."""
    origin = get_origin(annotation)
    if origin is Literal or origin is tuple or not get_args(annotation):
        yield annotation
    elif hasattr(annotation, "__metadata__"):
        yield from members(get_args(annotation)[0])
    else:
        for member in get_args(annotation):
            yield from members(member)


def is_section(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, BaseModel)


def _section(section: type[BaseModel], wanted: Option, rng: random.Random) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    here = [name for name, field in section.model_fields.items() if _reaches(field.annotation, wanted.section)]
    way = rng.choice(here) if here and wanted.section is not section else None
    for name, field in section.model_fields.items():
        if wanted.section is section and name == wanted.field:
            value = wanted.value
            tree[name] = _value(field, rng, given=True) if value == SET else value
        elif section is ModelConfig and name in PINNED:
            tree[name] = PINNED[name]
        elif name == way:
            below = [m for m in members(field.annotation) if is_section(m) and wanted.section in sections(m)]
            tree[name] = _section(rng.choice(below), wanted, rng)
        elif name == "kind" or field.is_required() or section is ScheduleConfig or rng.random() < OWN_VALUE:
            tree[name] = _value(field, rng, given=field.is_required())
    return _one_form(tree, wanted, rng) if section is ScheduleConfig else tree


def _one_form(tree: dict[str, Any], wanted: Option, rng: random.Random) -> dict[str, Any]:
    """A schedule is given by its depth or by its parts; nearly all draws of both would be refused."""
    forms = [form for form, others in SCHEDULE_FORMS.items() if wanted.field not in others]
    form = rng.choice(forms)
    tree = {key: value for key, value in tree.items() if key not in SCHEDULE_FORMS[form]}
    return tree | {form: tree.get(form) or rng.choice([n for n in INTEGERS if n])}


def _reaches(annotation: Any, target: type[BaseModel]) -> bool:
    return any(is_section(member) and target in sections(member) for member in members(annotation))


def _value(field: FieldInfo, rng: random.Random, given: bool) -> Any:
    choices = [member for member in members(field.annotation) if member is not type(None) or not given]
    chosen = rng.choice(choices)
    if is_section(chosen):
        return _section(chosen, Option(chosen), rng)
    if get_origin(chosen) is Literal:
        return rng.choice(get_args(chosen))
    if get_origin(chosen) is tuple:
        bounds = _bounds(get_args(chosen)[0])
        shares = [rng.choice([x for x in FLOATS if _within(x, bounds)]) for _ in range(rng.randint(1, 3))]
        return sorted(shares, reverse=True)
    if chosen is bool:
        return rng.random() < 0.5
    if chosen is type(None):
        return None
    assert chosen in (int, float), f"{chosen} is no type that values can be drawn of yet"
    bounds = [*field.metadata, *_bounds(field.annotation)]
    return rng.choice([x for x in (INTEGERS if chosen is int else FLOATS) if _within(x, bounds)])


def _bounds(annotation: Any) -> list[Any]:
    """Bounds that stand in an annotation, those of the members of a union included."""
    own = list(getattr(annotation, "__metadata__", ()))
    own += [bound for info in own if isinstance(info, FieldInfo) for bound in info.metadata]
    return own + [bound for member in get_args(annotation) for bound in _bounds(member)]


def _within(value: float, bounds: list[Any]) -> bool:
    for bound in bounds:
        match bound:
            case Gt(gt=least) if not value > least:
                return False
            case Ge(ge=least) if not value >= least:
                return False
            case Lt(lt=most) if not value < most:
                return False
            case Le(le=most) if not value <= most:
                return False
    return True
