"""Reads YAML files, ours by name and the user's by path, then dotted overrides; a fault is one clear sentence."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from morex.config import Config, ModelConfig
from morex.sections.depth import FixedConfig, SampledConfig
from morex.sections.mixers import ExpertsConfig, FeedForwardConfig
from morex.sections.tasks import GeneratedTaskConfig

TINY_WIDTH, TINY_VOCABULARY, TINY_WINDOW = 32, 97, 6
SCHEDULE_FORMS = {"layers": ("prelude", "core", "coda"), "core": ("layers",)}
MEANT = {"epochs": "steps", "epoch": "steps", "learning_rate": "lr", "max_steps": "steps"}
"""Keys of other programs that are called otherwise here."""
Tree = TypeVar("Tree", bound=BaseModel)


class ConfigError(ValueError):
    """A config that cannot be used; the message is one sentence that names the option, the value and what works."""

    said_by_first = False
    """Whether another rank of the same training says it."""


class DuplicateKeyError(Exception):
    """A YAML mapping has a key twice."""


class UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML readers silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise DuplicateKeyError(f"has the key '{key.value}' twice, in lines {lines[key.value]} and {line}")
                lines[key.value] = line
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


@dataclass(frozen=True)
class Shelf:
    """YAML files of one sort: those that come with the library, by name, and the user's own, by path."""

    folder: str
    """Folder of the package that holds the library's own."""
    entry: str
    """What messages call one of the library's own."""
    sort: str
    """What messages call any of them."""
    keys: tuple[str, ...]
    """Keys at the top, which messages name where a file has none."""

    def names(self) -> list[str]:
        """Names of those that come with the library."""
        entries = files("morex").joinpath(self.folder).iterdir()
        return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))

    def read(self, source: str | Path) -> dict[str, Any]:
        """The mapping in one of them, unchecked.

        Args:
            source: a name, or a path: a Path, or a string with a slash or the ending of a YAML file.

        Raises:
            ConfigError: there is none, or it is not UTF-8, not YAML, or not a mapping.
        """
        name = str(source)
        if isinstance(source, Path) or _is_path(name):
            path = Path(source)
            if path.is_dir():
                raise ConfigError(f"'{path}' is a folder; a {self.sort} is a YAML file, or a {self.entry} by name")
            if not path.is_file():
                raise ConfigError(f"{self.sort} file '{path}' does not exist")
            content = path.read_bytes()
        elif name in self.names():
            content = files("morex").joinpath(self.folder, f"{name}.yaml").read_bytes()
        else:
            raise ConfigError(f"unknown {self.entry} '{name}'{closest(name, self.names())}")
        try:
            tree = yaml.load(content.decode("utf-8"), UniqueKeyLoader)
        except UnicodeDecodeError:
            raise ConfigError(f"{self.sort} file '{name}' is not UTF-8 text") from None
        except DuplicateKeyError as error:
            raise ConfigError(f"{self.sort} '{name}' {error}") from None
        except (yaml.YAMLError, ValueError) as error:
            problem = " ".join(str(error).split())
            raise ConfigError(f"{self.sort} '{name}' is not valid YAML: {problem}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{self.sort} '{name}' must be a mapping with the keys {', '.join(self.keys)}")
        return tree

    def lineage(self, source: str | Path) -> list[dict[str, Any]]:
        """The mappings of one of them and of all that it starts from, the first of these first.

        The key `preset` or `study`, as `entry` says, names what one starts from; a relative path is one from its file.

        Raises:
            ConfigError: as `read`, or one starts from itself.
        """
        trees: list[dict[str, Any]] = []
        names: list[str] = []
        here = source
        while True:
            if str(here) in names:
                raise ConfigError(f"{self.sort} '{here}' starts from itself: {' -> '.join((*names, str(here)))}")
            names.append(str(here))
            tree = self.read(here)
            trees.insert(0, tree)
            base = tree.pop(self.entry, None)
            if base is None:
                return trees
            here = Path(here).parent / str(base) if _is_path(str(base)) else str(base)


PRESETS = Shelf(folder="presets", entry="preset", sort="config", keys=tuple(Config.model_fields))


def presets() -> list[str]:
    """Names of the presets that come with the library."""
    return PRESETS.names()


def load_config(source: str | Path, overrides: Sequence[str] = (), tiny: bool = False) -> Config:
    """Loads a preset by name, or a YAML file by path, applies overrides and validates.

    Args:
        source: a preset's name or the path of a YAML file. A file may start from a preset: `preset: NAME`.
        overrides: `a.b=value` strings, the value in YAML. Changing a `kind` drops that section's other keys.
        tiny: shrink the model to width 32 and vocabulary 97, kinds, sharing and ratios kept, before the overrides; a
            trained tokenizer is then of the model's vocabulary.

    Raises:
        ConfigError: unknown preset or key, or values that do not fit together.
    """
    if isinstance(overrides, str | Mapping):
        raise ConfigError(f"overrides must be a list such as ['train.steps=100'], not {overrides!r}")
    tree = reduce(merge, PRESETS.lineage(source))
    if isinstance(tree.get("model"), dict):
        # With the default kinds written down, an override below them is checked against the right section.
        tree["model"] = {"depth": {"kind": "fixed"}, "mixer": {"kind": "swiglu"}, **tree["model"]}
    if tiny:
        config = validate(Config, tree)
        model = tiny_model(config.model)
        train = {**tree.get("train", {}), "seq_len": min(config.train.seq_len, model["max_seq_len"])}
        tokenizer = config.data.tokenizer.model_copy(update={"vocab_size": None})
        data = {**tree.get("data", {}), "tokenizer": tokenizer.model_dump(mode="json")}
        tree = {**tree, "model": model, "data": data, "train": train}
        if isinstance(config.data.task, GeneratedTaskConfig):
            tree = merge(tree, {"data": {"task": config.data.task.shrunk(model["vocab_size"]).model_dump(mode="json")}})
    for override in overrides:
        tree = with_override(tree, override)
    return validate(Config, tree)


def validate(kind: type[Tree], tree: Mapping[str, Any], where: str = "") -> Tree:
    """Validates plain data against a config class; raises ConfigError with one sentence about the first fault."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_sentence(kind, error, where)) from None


def closest(name: str, known: Iterable[str], elsewhere: Sequence[str] = ()) -> str:
    """`; did you mean 'x'?` with the nearest known name and what else it may be, or the list of all known ones."""
    names = sorted(known)
    meant = [*difflib.get_close_matches(name, names, n=1, cutoff=0.6), *elsewhere]
    if meant:
        return f"; did you mean {' or '.join(repr(each) for each in meant)}?"
    return f"; known: {', '.join(names)}"


def tiny_model(model: ModelConfig) -> dict[str, Any]:
    """The same kinds, sharing, recursions and ratios at width 32 and vocabulary 97; at most two blocks a part."""
    attention, schedule = model.attention, model.schedule.resolved
    ratio = attention.heads // attention.num_kv_heads
    small_attention = attention.model_copy(
        update={"heads": 2 * ratio if ratio > 1 else 4, "kv_heads": 2 if ratio > 1 else 4, "head_dim": None}
    )
    if attention.window is not None:
        # A few tokens, so that short sequences are longer, and where there were global steps, one at least.
        blocks = min(schedule.prelude, 1) + min(schedule.coda, 1) + min(schedule.core, 2) * schedule.recursions
        depth = min(schedule.core, 3) if model.schedule.sharing == "none" else blocks
        every = attention.global_every and max(2, min(attention.global_every, depth))
        window = {"window": min(attention.window, TINY_WINDOW), "global_every": every}
        small_attention = small_attention.model_copy(update=window)
    if TINY_WIDTH % small_attention.heads or (TINY_WIDTH // small_attention.heads) % 2:
        small_attention = small_attention.model_copy(update={"head_dim": 8})

    def narrower(width: int) -> int:
        return max(4, round(width * TINY_WIDTH / model.d_model / 4) * 4)

    mixer = model.mixer.shrunk(narrower, model.d_model)
    small_schedule: dict[str, Any] = {"sharing": model.schedule.sharing, "recursions": schedule.recursions}
    if model.schedule.sharing == "none":
        small_schedule["layers"] = min(schedule.core, 3)
    else:
        small_schedule |= {
            "prelude": min(schedule.prelude, 1),
            "core": min(schedule.core, 2),
            "coda": min(schedule.coda, 1),
        }
    return model.model_dump(mode="json") | {
        "d_model": TINY_WIDTH,
        "vocab_size": TINY_VOCABULARY,
        "max_seq_len": min(model.max_seq_len, 64),
        "attention": small_attention.model_dump(mode="json"),
        "mixer": mixer.model_dump(mode="json"),
        "schedule": small_schedule,
    }


def dense_twin_mixer(model: ModelConfig) -> ModelConfig:
    """The same config with the mixer `swiglu`, the dense twin of an expert model; of the size of one expert.

    A swiglu has three matrices, so the twin of experts with two has 2/3 of their hidden width, to a multiple of 8.
    """
    mixer = model.mixer
    if isinstance(mixer, FeedForwardConfig):
        return model
    twin = FeedForwardConfig(kind="swiglu", d_ff=mixer.twin_width(model.d_model))
    return model.model_copy(update={"mixer": twin})


def is_depth_routed(model: ModelConfig) -> bool:
    """Whether a router decides how many recursions a token takes."""
    return not isinstance(model.depth, FixedConfig)


def decides_steps(model: ModelConfig) -> bool:
    """Whether a router decides how many of its steps a token takes in an expert."""
    mixer = model.mixer
    return isinstance(mixer, ExpertsConfig) and not isinstance(mixer.steps_router, FixedConfig | None)


def decides_depth(model: ModelConfig) -> bool:
    """Whether a router lets one token go deeper than another; a drawn depth is equal for all."""
    return not isinstance(model.depth, FixedConfig | SampledConfig)


def _is_path(name: str) -> bool:
    """Whether a string names a file and not something that comes with the library."""
    return name.endswith((".yaml", ".yml")) or "/" in name


def merge(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `change`, section by section; a section whose `kind` changes starts afresh."""
    if "kind" in change and base.get("kind") != change["kind"]:
        base = {}
    # A schedule is given by its unrolled depth or by its parts: one form replaces the other.
    dropped = next((other for key, other in SCHEDULE_FORMS.items() if change.get(key) is not None), ())
    merged = {key: value for key, value in base.items() if key not in dropped}
    for key, value in change.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def with_override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    """`tree` with one `a.b=value` merged in, the value in YAML; raises ConfigError where it does not have that form."""
    path, separator, text = override.partition("=")
    if not separator or not path.strip():
        raise ConfigError(f"override '{override}' must have the form a.b=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"override '{override}': the value is not valid YAML") from None
    change: Any = _number(value) if isinstance(value, str) else value
    for key in reversed(path.strip().split(".")):
        change = {key: change}
    return merge(tree, change)


def _number(text: str) -> str | float:
    """YAML 1.1 reads `3e-4` as text; people mean the number."""
    try:
        return float(text) if text[:1].isdigit() or text[:1] in "+-." else text
    except ValueError:
        return text


def _sentence(kind: type[BaseModel], error: ValidationError, where: str) -> str:
    # A key that is not ours says more about what went wrong than one of ours that is not there.
    fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    location, sections = _walk(kind, fault["loc"])
    dotted = ".".join([where, *location] if where else location)
    match fault["type"]:
        case "extra_forbidden":
            name, keys = MEANT.get(location[-1], location[-1]), _keys(sections)
            unknown = f"unknown key '{dotted}'"
            kinds = _kinds_with(kind, location)
            if kinds:
                return f"{unknown}: only {'.'.join(location[:-1])}.kind {' or '.join(map(repr, kinds))} has it"
            return f"{unknown}{closest(name, keys, [] if name in keys else places(kind, name))}"
        case "missing" if isinstance(fault["loc"][-1], int):
            return f"'{dotted.rpartition('.')[0]}' has too few entries: number {fault['loc'][-1] + 1} is missing"
        case "missing":
            return f"'{dotted}' is missing and has no default"
        case "union_tag_invalid":
            context = fault.get("ctx", {})
            return f"{dotted}.kind {context.get('tag')!r} is unknown; use one of {context.get('expected_tags')}"
        case "union_tag_not_found":
            return f"'{dotted}.kind' is missing: it says which variant is meant"
        case "value_error":
            message = fault["msg"].removeprefix("Value error, ")
            return f"{dotted}: {message}" if dotted else message
        case "model_type" | "model_attributes_type" | "dict_type":
            keys = _keys(sections)
            example = f", such as {dotted}.{'kind' if 'kind' in keys else keys[0]}" if keys else ""
            return f"{dotted} {fault['input']!r} is not valid: it is a section with keys of its own{example}"
        case "tuple_type":
            return f"{dotted} {fault['input']!r} is not valid: it must be a list, such as [{fault['input']}]"
        case "invalid_key":
            return f"key {fault['input']!r} of '{dotted.rpartition('.')[0]}' is not text"
        case _:
            message = fault["msg"][:1].lower() + fault["msg"][1:]
            return f"{dotted} {fault['input']!r} is not valid: {message}"


def _walk(kind: type[BaseModel], loc: Sequence[str | int]) -> tuple[list[str], list[type[BaseModel]]]:
    """The path to a fault as people write it, and the sections that it ends in.

    Below a union pydantic puts the `kind` of the variant into the path; it is left out, and narrows the sections down.
    """
    location: list[str] = []
    current, is_union = [kind], False
    for part in loc:
        tagged = [section for section in current if part in _kinds(section)]
        if is_union and tagged:
            current, is_union = tagged, False
            continue
        location.append(str(part))
        fields = [section.model_fields[part] for section in current if part in section.model_fields]
        below = [section for field in fields for section in _sections(field.annotation)]
        if below:
            current, is_union = below, len(below) > 1
    return location, current


def _kinds_with(kind: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Values of `kind` with which the section that a key at this path stands in has the key."""
    *above, name = location
    _, sections = _walk(kind, above)
    return [each for section in sections if name in section.model_fields for each in _kinds(section)]


def places(kind: type[BaseModel], name: str) -> list[str]:
    """Dotted paths of the keys with this name anywhere in a config class, lists apart, in order, each once."""
    found: dict[str, None] = {}
    for key, field in kind.model_fields.items():
        if key == name:
            found[key] = None
        if get_origin(field.annotation) is tuple:
            continue
        for section in _sections(field.annotation):
            found |= {f"{key}.{below}": None for below in places(section, name)}
    return list(found)


def _keys(sections: Sequence[type[BaseModel]]) -> list[str]:
    return sorted({name for section in sections for name in section.model_fields})


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for member in get_args(annotation) for section in _sections(member)]


def _kinds(section: type[BaseModel]) -> tuple[str, ...]:
    field = section.model_fields.get("kind")
    return get_args(field.annotation) if field else ()
