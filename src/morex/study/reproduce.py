"""The last section of the report: the command, every setting, the machine."""

import shlex
from collections.abc import Iterable
from html import escape
from typing import Any

import yaml

from morex.config import Config
from morex.loading import validate
from morex.study.plan import describe
from morex.study.records import Results


def how_to_reproduce(results: Results) -> str:
    """The section as HTML."""
    configs = {name: validate(Config, tree) for name, tree in results.configs.items()}
    shared, own = _shared_settings(results.configs)
    differing = any(own.values())
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(describe(config))}</td>'
        + (f"<td>{escape(', '.join(own[name]) or '–')}</td>" if differing else "")
        + "</tr>"
        for name, config in configs.items()
    )
    versions = results.environment.get("versions", {})
    machine = {key: value for key, value in results.environment.items() if not isinstance(value, dict | list) and value}
    command = results.command or f"morex compare {shlex.quote(results.study.name)}"
    return f"""<section>
<h2>How to reproduce it</h2>
<pre>{escape(command)}</pre>
<p class="note" style="margin-top:8px">Training on a CPU repeats to the bit with the same versions and threads; times
differ.</p>
<div class="card scroll settings"><table>
<thead><tr><th scope="col">variant</th><th scope="col">model</th>
{'<th scope="col">training, where variants differ</th>' if differing else ""}</tr></thead>
<tbody>{rows}</tbody></table></div>
<p></p>
<details><summary>Settings that all variants share</summary>{_definitions(shared)}</details>
<details><summary>Machine and versions</summary>{_definitions([*machine.items(), *versions.items()])}</details>
<details><summary>The study as YAML</summary><pre>{escape(_yaml(results.study.to_dict()))}</pre></details>
</section>"""


def _shared_settings(configs: dict[str, dict[str, Any]]) -> tuple[list[tuple[str, Any]], dict[str, list[str]]]:
    """Settings that are equal in all variants, and the training settings of each that are not."""
    flat = {name: dict(_flatten(tree)) for name, tree in configs.items()}
    first = next(iter(flat.values()), {})
    equal = [key for key in first if all(other.get(key) == first[key] for other in flat.values())]
    own = {
        name: [
            f"{key.split('.', 1)[1]} {value:g}" if isinstance(value, int | float) else f"{key} {value}"
            for key, value in tree.items()
            if key not in equal and not key.startswith("model.")
        ]
        for name, tree in flat.items()
    }
    return [(key, first[key]) for key in equal if first[key] is not None], own


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _definitions(entries: Iterable[tuple[str, Any]]) -> str:
    items = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in entries)
    return f'<dl class="meanings">{items}</dl>'


def _yaml(tree: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return text
