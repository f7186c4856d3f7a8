"""Fills pages from a study that was run and from benchmarks/results: no number is typed by hand.

    python docs/update_pages.py [STUDY_FOLDER] [--picture NAME]

README.md gets the table, the findings, the machine and a picture of the study `demo`, docs/studies/NAME.md those of any
other study, NAME-MORE included, with its accuracies by recursions where benchmarks/depth.py measured them, and what its
routers do where benchmarks/routing.py did; docs/speed.md gets the training benchmarks, and what compiling gains where
benchmarks/compiled.py measured it.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morex.loading import ConfigError, validate
from morex.study.records import Results
from morex.study.table import label, shown_columns
from morex.study.units import human

ROOT = Path(__file__).parents[1]
HEADINGS = {
    "val_loss": "held-out loss",
    "val_loss_spread": "over seeds",
    "val_loss_oracle": "oracle loss",
    "val_accuracy": "held-out accuracy",
    "val_accuracy_oracle": "oracle accuracy",
    "final_train_loss": "last training loss",
    "parameters": "parameters",
    "unique_non_embedding": "non-embedding parameters",
    "train_flops_per_token": "training FLOPs/token",
    "decode_flops_per_token": "decoding FLOPs/token",
    "tokens": "training tokens",
    "seconds": "training time",
    "tokens_per_s": "training tokens/s",
    "decode_tokens_per_s": "decoding tokens/s",
    "peak_memory_bytes": "peak memory",
    "kv_bytes_per_token": "KV per token",
}
SPEED_HEADINGS = (
    "preset", "twin", "tokens of a step", "precision", "threads", "tokens/s", "FLOP ratio", "time ratio", "explained",
    "time ratio to unrouted", "times as fast as fp32", "peak memory",
)  # fmt: skip
COMPILED_HEADINGS = (
    "preset", "tokens of a step", "precision", "threads", "tokens/s", "plain tokens/s", "times as fast",
    "matrix products of a plain step", "at most times as fast", "time to compile",
)  # fmt: skip
MOST_COLUMNS = 12
# Quantities of `morex analyze` that pages show, where a study has them.
ROUTING_SHOWN = (
    "depth router entropy over the largest", "mean depth", "agreement of the causal rule with top-k",
    "expert router entropy over ln E", "recurring expert router entropy over ln E", "expert load CV",
    "last recursion's share of the path", "last expert step's share of the path",
    "loss that the last expert step takes off",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Reads the study and the benchmarks and rewrites the pages in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", type=Path, default=root / "studies" / "demo")
    parser.add_argument("--picture", default="loss", help="name of the PNG, without its ending")
    options = parser.parse_args(arguments)
    source = options.study / "results.json"
    if not source.is_file():
        raise ConfigError(f"'{options.study}' has no results.json; `morex compare` makes it")
    results = validate(Results, json.loads(source.read_text(encoding="utf-8")))
    name = results.study.name
    page = root / "README.md" if name == "demo" else page_of(name, root)
    fill(page, f"{name}-table", study_section(results))
    shutil.copyfile(find_picture(options.study, options.picture), root / "docs" / "images" / f"{name}.png")
    for part, section in (("depths", depth_section), ("routing", routing_section)):
        measured_part = root / "benchmarks" / "results" / f"{name}-{part}.json"
        if measured_part.is_file():
            fill(page, f"{name}-{part}", section(measured_part))
    measured = sorted((root / "benchmarks" / "results").glob("*.json"), key=lambda path: path.stem)
    fill(root / "docs" / "speed.md", "training-table", "\n".join(map(speed_section, measured)))
    compiled = sorted((root / "benchmarks" / "results").glob("compiled*.json"))
    if compiled:
        fill(root / "docs" / "speed.md", "compiled-table", "\n\n".join(map(compiled_section, compiled)))
    print(f"wrote {page.relative_to(root)}, docs/images/{name}.png and docs/speed.md")


def page_of(study: str, root: Path = ROOT) -> Path:
    """The page of a study, or the one of the study whose name it goes on from."""
    pages = {page.stem: page for page in (root / "docs" / "studies").glob("*.md")}
    names = [name for name in pages if study == name or study.startswith(f"{name}-")]
    if not names:
        raise ValueError(f"no page of docs/studies is for the study '{study}'")
    return pages[max(names, key=len)]


def fill(page: Path, name: str, text: str) -> None:
    """Replaces what stands between `<!-- name -->` and `<!-- /name -->`. Raises ValueError where the marks are not."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = page.read_text(encoding="utf-8")
    before, found, rest = old.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no place '{start} ... {end}'")
    page.write_text(f"{before}{start}\n{text.strip()}\n{end}{after}", encoding="utf-8")


def study_section(results: Results) -> str:
    """The table of a study, the machine that it ran on, and its findings, as Markdown."""
    columns = shown_columns(results)
    headings = [", ".join(filter(None, (HEADINGS[shown.column.key], shown.unit))) for shown in columns]
    rows = [
        [f"`{label(row)}`", *(_bold(shown.texts[i], shown.best == i) for shown in columns)]
        for i, row in enumerate(results.rows)
    ]
    findings = "\n".join(f"- {sentence}" for sentence in results.findings)
    parts = [_table(["model", *headings], rows), _machine(results), _rates(results), findings]
    return "\n\n".join(filter(None, parts))


def _rates(results: Results) -> str:
    """Every variant at every learning rate, where the study tries several; means over the seeds."""
    tried = [(row, rate) for row in results.rows for rate in row.learning_rates]
    lines = []
    for row, rate in tried:
        halves = ["–" if half is None else f"{half:.4f}" for half in (rate.first_half, rate.second_half)]
        whole = "–" if rate.full is None else f"{rate.full:.4f}"
        lines.append(
            [
                f"`{row.name}`",
                f"{rate.lr:g}",
                *(_bold(half, rate.lr == row.lr) for half in halves),
                whole if rate.full_spread is None else f"{whole} ± {rate.full_spread:.4f}",
            ]
        )
    if not lines:
        return ""
    headings = ["model", "learning rate", "first half", "second half", "all held-out windows"]
    return (
        f"{_table(headings, lines)}\n\nMeans over seeds; ± is the standard deviation. Bold is the rate that was chosen."
    )


def depth_section(path: Path) -> str:
    """Accuracies by difficulty: with as many recursions as it says, as many as trained, and the most measured."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content["rows"]
    columns = _columns(list(rows[0]["by_difficulty"]))
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        trained, depths = own[0]["trained_recursions"], [row["recursions"] for row in own if row["recursions"]]
        asked: dict[str, int | None] = {"its own": None}
        if depths:
            asked = {"as many as the difficulty": 0, f"{trained}": trained, f"{max(depths)}": max(depths)}
        for title, depth in asked.items():
            found = [
                [
                    (row["by_difficulty"][level]["accuracy"], row["by_difficulty"][level]["examples"])
                    for level in levels
                    for row in own
                    if row["recursions"] == (int(level) if depth == 0 else depth)
                ]
                for levels in columns.values()
            ]
            lines.append([f"`{variant}`", title, *map(_accuracy, found)])
    command = f"`{content['machine']['command']}` (`{path.name}`), held-out accuracy by difficulty:"
    return f"{command}\n\n{_table(['model', 'recursions', *columns], lines)}"


def _columns(levels: Sequence[str]) -> dict[str, Sequence[str]]:
    """Difficulties under the heading of their column, several in one where there are many."""
    width = -(-len(levels) // MOST_COLUMNS)
    parts = [levels[start : start + width] for start in range(0, len(levels), width)]
    return {part[0] if len(part) == 1 else f"{part[0]} to {part[-1]}": part for part in parts}


def _accuracy(found: Sequence[tuple[float, int]]) -> str:
    """The mean of accuracies over their examples."""
    examples = sum(number for _, number in found)
    return f"{sum(share * number for share, number in found) / examples:.2f}" if examples else "–"


def routing_section(path: Path) -> str:
    """Quantities of the routers, means over seeds: the lowest to the highest of a model's layers and recursions."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content["rows"]
    shown = [name for name in ROUTING_SHOWN if any(name in row["quantities"] for row in rows)]
    several_rates = len({row["lr"] for row in rows}) > 1
    lines = []
    for variant, rate in dict.fromkeys((row["variant"], row["lr"]) for row in rows):
        own = [row["quantities"] for row in rows if (row["variant"], row["lr"]) == (variant, rate)]
        title = f"`{variant}` at {rate:g}" if several_rates else f"`{variant}`"
        lines.append([title, *(_range([each[name] for each in own if name in each]) for name in shown)])
    command = f"`{content['machine']['command']}` (`{path.name}`):"
    return f"{command}\n\n{_table(['model', *shown], lines)}"


def _range(found: Sequence[dict[str, float]]) -> str:
    if not found:
        return "–"
    low, high = (f"{sum(each[end] for each in found) / len(found):z.2f}" for end in ("low", "high"))
    return low if low == high else f"{low} to {high}"


def speed_section(path: Path) -> str:
    """The rows of one benchmark file as Markdown, or nothing where it has no training rows."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in content["rows"] if "explained" in row]
    if not rows:
        return ""
    machine = content["machine"]
    where = f"on {machine['cpu']}, torch {machine['versions']['torch']}"
    return f"`{machine['command']}` {where} (`{path.name}`):\n\n{_table(SPEED_HEADINGS, map(_speed_row, rows))}\n"


def compiled_section(path: Path) -> str:
    """What compiling gains, and what it could at most, as Markdown."""
    content = json.loads(path.read_text(encoding="utf-8"))
    machine = content["machine"]
    lines = [
        [
            f"`{row['preset']}`",
            f"{row['batch_size']} x {row['seq_len']:,}",
            row["precision"],
            str(row["threads"]),
            *(f"{row[key]:,.0f}" for key in ("tokens_per_s", "plain_tokens_per_s")),
            f"{row['speedup']:.2f}",
            f"{1 / row['most_speedup']:.0%}",
            f"{row['most_speedup']:.2f}",
            f"{row['compile_seconds']:.0f} s",
        ]
        for row in content["rows"]
    ]
    where = f"on {machine['device_name']}, torch {machine['versions']['torch']}"
    return f"`{machine['command']}` {where} (`{path.name}`):\n\n{_table(COMPILED_HEADINGS, lines)}"


def find_picture(study: Path, name: str) -> Path:
    """The PNG of that name in a study folder. Raises ConfigError that lists those that are there."""
    pictures = {path.stem: path for path in sorted(study.rglob("*.png"))}
    if name not in pictures:
        raise ConfigError(f"'{study}' has no picture '{name}'; there are {', '.join(pictures) or 'none'}")
    return pictures[name]


def _machine(results: Results) -> str:
    found = results.environment
    threads, seeds = found["threads"], len(results.study.seeds)
    machine = f"{found['cpu']}, {threads} {'thread' if threads == 1 else 'threads'}, torch {found['versions']['torch']}"
    return (
        f"One run of `{results.command or f'morex compare {results.study.name}'}` on {machine}; "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}. Bold is the best of a column."
    )


def _speed_row(row: dict[str, Any]) -> list[str]:
    ratios = ("flop_ratio", "time_ratio", "explained", "unrouted_time_ratio", "fp32_speedup")
    numbers = ["–" if row.get(key) is None else f"{row[key]:.2f}" for key in ratios]
    memory = "–" if row["peak_bytes"] is None else human(row["peak_bytes"], "B")
    step = f"{row['batch_size']} x {row['seq_len']:,}"
    names = [f"`{row['preset']}`", row["twin"] or "–", step, row["precision"], str(row["threads"])]
    return [*names, f"{row['tokens_per_s']:,.0f}", *numbers, memory]


def _bold(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def _table(headings: Sequence[str], rows: Any) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
