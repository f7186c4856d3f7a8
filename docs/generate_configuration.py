"""Writes docs/configuration.md from the config classes: every key, its type, its default and its meaning.

    python docs/generate_configuration.py

The page is generated from the classes alone, so that it cannot say anything that the program does not do.
"""

from pathlib import Path
from typing import Any

from morex.config import Config

Schema = dict[str, Any]
Homes = dict[tuple[str, ...], str]
PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """\
# Configuration

A run is described by one config with the sections `model`, `data`, `train` and `eval`. It is read from a preset or
from a YAML file, and every value can be changed on the command line:

```console
$ morex train mor-expert --set model.schedule.layers=11 --set train.lr=1e-3
```

A YAML file may start from a preset and give only what differs:

```yaml title="my-config.yaml"
preset: mor-expert
model:
  schedule: {layers: 11}
train: {steps: 2000, lr: 1.0e-3}
```

```console
$ morex train my-config.yaml --out runs/mine
```

Rules that hold everywhere:

- An unknown key is refused, and the message names the nearest key that exists.
- Variants are chosen by `kind`. Changing a `kind` drops the other keys of that section, since they belonged to the
  variant that was there before.
- The resolved config, every default written out, is stored as `config.yaml` in the run's folder; that file can be
  trained again as it is.
- `—` in the column "default" marks a key that has none and must be given. Integers, numbers and lists are written as
  in YAML.

This page is generated from `src/morex/config.py` and `src/morex/sections/` by `python docs/generate_configuration.py`.
"""


def main() -> None:
    """Writes the page."""
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE}")


def render() -> str:
    """The whole page as Markdown."""
    schema = Config.model_json_schema()
    definitions: Schema = schema["$defs"]
    parts: dict[str, str] = {}
    _walk("", "", schema, definitions, parts, _homes("", schema, definitions))
    return "\n".join([INTRODUCTION, *parts.values()])


def _homes(path: str, section: Schema, definitions: Schema) -> dict[tuple[str, ...], str]:
    """Where the kinds of a field that stands in several sections are described: at its shortest path."""
    homes: dict[tuple[str, ...], str] = {}
    for name, field in section["properties"].items():
        targets, place = tuple(_targets(field)), f"{path}.{name}" if path else name
        found = [{targets: place} if len(targets) > 1 else {}]
        found += [_homes(place, definitions[target], definitions) for target in targets]
        for union, where in (item for one in found for item in one.items()):
            homes[union] = min(homes.get(union, where), where, key=lambda at: at.count("."))
    wider = {small: large for small in homes for large in homes if set(small) < set(large)}
    return homes | {small: homes[large] for small, large in wider.items()}


def _walk(path: str, variant: str, section: Schema, definitions: Schema, parts: dict[str, str], homes: Homes) -> None:
    """Adds the part of the section at `path` (but for the root's), then those of the sections below it, each once."""
    heading = f"## `{path}`{variant}"
    if path and heading not in parts:
        parts[heading] = _part(heading, path, section, definitions, homes)
    for name, field in section["properties"].items():
        targets = _targets(field)
        place = f"{path}.{name}" if path else name
        if homes.get(tuple(targets), place) != place:
            continue
        for target in targets:
            below = definitions[target]
            kinds = " or ".join(f"`{kind}`" for kind in _kinds(below))
            _walk(place, f" of kind {kinds}" if len(targets) > 1 else "", below, definitions, parts, homes)


def _part(heading: str, path: str, section: Schema, definitions: Schema, homes: Homes) -> str:
    rows = []
    for name, field in section["properties"].items():
        meaning, place = _meaning(name, field, definitions), f"{path}.{name}"
        home = homes.get(tuple(_targets(field)), place)
        meaning += f" Its kinds are those of `{home}`." if home != place else ""
        rows.append(f"| `{name}` | {_type(field, definitions)} | {_default(name, field, section)} | {meaning} |")
    text = " ".join(section.get("description", "").split())
    return "\n".join([heading, "", text, "", "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _kinds(section: Schema) -> list[str]:
    """The values of `kind` that choose this section."""
    kind = section["properties"].get("kind", {})
    return [kind["const"]] if "const" in kind else list(kind.get("enum", []))


def _targets(field: Schema) -> list[str]:
    """Names of the sections that a field may hold, or that its list holds."""
    if "$ref" in field:
        return [field["$ref"].rsplit("/", 1)[-1]]
    if isinstance(field.get("items"), dict):
        return _targets(field["items"])
    return [
        target for key in ("oneOf", "anyOf", "allOf") for option in field.get(key, []) for target in _targets(option)
    ]


def _type(field: Schema, definitions: Schema) -> str:
    targets = _targets(field)
    if targets and field.get("type") == "array":
        return "list of sections"
    if targets:
        kinds = [kind for target in targets for kind in _kinds(definitions[target])]
        return f"section, by `kind`: {', '.join(f'`{kind}`' for kind in kinds)}" if len(targets) > 1 else "section"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if "anyOf" in field:
        return " or ".join("`null`" if option == {"type": "null"} else _type(option, {}) for option in field["anyOf"])
    if field["type"] == "array":
        items = field.get("items") or field["prefixItems"][0]
        number = f" of {field['maxItems']}" if "maxItems" in field else ""
        return f"list{number}: {_type(items, {})}"
    return _plain(field)


def _plain(field: Schema) -> str:
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    low = next((f"{sign} {field[key]:g}" for key, sign in _LOWER.items() if key in field), "")
    high = next((f"{sign} {_bound(field[key])}" for key, sign in _UPPER.items() if key in field), "")
    return " ".join(part for part in (names[field["type"]], low, "and" if low and high else "", high) if part)


def _bound(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"


_LOWER = {"exclusiveMinimum": ">", "minimum": "≥"}
_UPPER = {"exclusiveMaximum": "<", "maximum": "≤"}


def _default(name: str, field: Schema, section: Schema) -> str:
    if name in section.get("required", []):
        return "—"
    value = field.get("default")
    if isinstance(value, dict):
        return f"`kind: {value['kind']}`" if "kind" in value else "see below"
    if value is None:
        return "`null`" if "default" in field else "see below"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _meaning(name: str, field: Schema, definitions: Schema) -> str:
    targets = _targets(field)
    text = " ".join(field.get("description", "").split())
    if text or name == "kind":
        return text or "Chooses this variant."
    return " ".join(definitions[targets[0]].get("description", "").split()) if len(targets) == 1 else ""


if __name__ == "__main__":
    main()
