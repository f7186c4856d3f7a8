"""report.html: one file that opens offline, with its styles, scripts and numbers inside.

A content security policy in the page forbids every outside request. All text of the study is escaped.
"""

import json
from html import escape
from importlib.resources import files
from typing import Any

from morex.loading import ConfigError
from morex.study.figures import figures
from morex.study.records import Results, Row
from morex.study.reproduce import how_to_reproduce
from morex.study.series import Style, depth_colour, ink_on, styles, visible
from morex.study.spec import Budget
from morex.study.table import ShownColumn, shown_columns
from morex.study.units import duration, human

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
ASSETS = files("morex").joinpath("study", "assets")
LOSS_FIGURES = (
    ("loss_tokens", "Against tokens", "Who learns most from the same text."),
    ("loss_flops", "Against training FLOPs", "Who makes most of the same arithmetic."),
    ("loss_seconds", "Against time", "Who is ahead after the same wait on this machine."),
)
COST_FIGURES = (
    ("parameters", "Parameters against loss", "To the left and down is better."),
    (
        "cost",
        "Arithmetic against the clock",
        "On the dotted line the time follows from the arithmetic; a point above it pays for more than its FLOPs.",
    ),
    ("train_speed", "Training speed", "Longer is better."),
    ("decode_speed", "Decoding speed", "Longer is better. Greedy, with a KV cache, one sequence."),
    (
        "memory",
        "Training memory",
        "Shorter is better. Weights, optimizer and activations, above the start of the process.",
    ),
    ("kv", "KV cache", "Shorter is better."),
)


def report_html(results: Results) -> str:
    """The whole page. Raises ConfigError where plotly is not installed."""
    drawn = figures(results)
    looks = styles(results.rows)
    body = "\n".join(
        part
        for part in (
            _head(results),
            "<main>",
            _summary(results),
            _table(results, looks),
            _figures(results, drawn, looks),
            _depth(results, drawn),
            _experts(results, drawn),
            _samples(results, looks),
            how_to_reproduce(results),
            "</main>",
            "<footer>Written by morex from the run folders of this study.</footer>",
        )
        if part
    )
    title = escape(results.study.title or results.study.name)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title>
<style>
{_asset("report.css")}</style>
</head>
<body>
{body}
<script type="application/json" id="figures">{_json(drawn)}</script>
<script>{_plotly()}</script>
<script>
{_asset("report.js")}</script>
</body>
</html>
"""


def _head(results: Results) -> str:
    study, machine = results.study, results.environment
    seconds = sum(cell.summary.seconds for cell in results.cells if cell.summary is not None)
    data = next(iter(results.configs.values()), {}).get("data", {})
    task = data.get("task")
    facts = [
        (f"{len(results.rows)}", "variants"),
        (f"{len(study.seeds)}", "seed" if len(study.seeds) == 1 else "seeds"),
        (budget_text(study.budget), "each"),
        (str(task["kind"]), "task") if task else (str(data.get("corpus", "")), "corpus"),
        (duration(seconds), "of training in all"),
        (str(machine.get("device_name") or machine.get("cpu") or ""), _threads(machine.get("threads"))),
    ]
    items = "".join(f"<li><b>{escape(value)}</b> {escape(what)}</li>" for value, what in facts if value)
    lead = f'<p class="lead">{_marked(study.description.strip())}</p>' if study.description else ""
    return f"""<header class="top">
<p class="kicker">morex study · {escape(study.name)}</p>
<h1>{escape(study.title or study.name)}</h1>
{lead}
<ul class="facts">{items}</ul>
</header>"""


def _threads(number: int | None) -> str:
    return "" if number is None else "1 thread" if number == 1 else f"{number} threads"


def budget_text(budget: Budget) -> str:
    """The budget in words: `300 k tokens`, `2 min 00 s`, `1.2 PFLOP`."""
    if budget.value is None:
        return "its own steps"
    if budget.kind == "seconds":
        return duration(budget.value)
    if budget.kind == "flops":
        return human(budget.value, "FLOP")
    return f"{budget.value:,.0f} {budget.kind}"


def _summary(results: Results) -> str:
    items = "".join(f"<li><p>{_marked(sentence)}</p></li>" for sentence in results.findings)
    return f"""<section><div class="card">
<ol class="findings">{items}</ol>
</div></section>"""


def _marked(sentence: str) -> str:
    """Escaped, with `names` as code."""
    parts = sentence.split("`")
    return "".join(f"<code>{escape(part)}</code>" if i % 2 else escape(part) for i, part in enumerate(parts))


def _table(results: Results, looks: dict[str, Style]) -> str:
    columns = shown_columns(results)
    heads = "".join(
        f'<th scope="col" title="{escape(column.column.meaning)}"><button type="button">'
        f'{"<br>".join(map(escape, column.names))}</button><span class="unit">{escape(column.unit)}</span></th>'
        for column in columns
    )
    rows = "".join(_table_row(results, index, columns, looks) for index in range(len(results.rows)))
    meanings = "".join(f"<dt>{escape(column.name)}</dt><dd>{escape(column.column.meaning)}.</dd>" for column in columns)
    return f"""<section>
<h2>The numbers</h2>
<p class="note">Every column can be sorted. The best value of a column is marked where one end is better.</p>
<div class="card scroll"><table class="sortable">
<thead><tr><th scope="col"><button type="button">variant</button><span class="unit"></span></th>{heads}</tr></thead>
<tbody>{rows}</tbody>
</table></div>
<p></p><details><summary>What the columns mean</summary><dl class="meanings">{meanings}</dl></details>
{_learning_rates(results, looks)}
</section>"""


def _table_row(results: Results, index: int, columns: list[ShownColumn], looks: dict[str, Style]) -> str:
    row = results.rows[index]
    cells = []
    for column in columns:
        value = getattr(row, column.column.key)
        kind = "best" if column.best == index else "absent" if value is None else ""
        raw = "" if value is None else repr(float(value))
        cells.append(f'<td class="{kind}" data-value="{raw}">{escape(column.texts[index])}</td>')
    return (
        f'<tr data-variant="{escape(row.name)}"><th scope="row" data-value="{escape(row.name)}">'
        f"{_swatch(looks[row.name])}{escape(row.name)}<small>{escape(_role(row))}</small></th>{''.join(cells)}</tr>"
    )


def _role(row: Row) -> str:
    """What the variant is, in a few words."""
    if row.twin is not None:
        text = f"{row.twin.replace('_', ' ').removeprefix('equal ')} twin of {row.twin_of}"
    else:
        text = {"routed": "routed depth", "experts": "experts", "recursive": "shared blocks", "dense": "dense"}[
            row.kind
        ]
    failed = f", {row.failed} failed" if row.failed else ""
    return text + failed


def _learning_rates(results: Results, looks: dict[str, Style]) -> str:
    rows = [row for row in results.rows if row.learning_rates]
    if not rows:
        return ""
    lines = "".join(
        f'<tr data-variant="{escape(row.name)}"><th scope="row">{_swatch(looks[row.name])}{escape(row.name)}</th>'
        f"<td>{rate.lr:g}</td><td>{_loss(rate.first_half)}</td>"
        f'<td class="{"best" if rate.lr == row.lr else ""}">{_loss(rate.second_half)}</td>'
        f"<td>{_loss(rate.full)}</td><td>{_loss(rate.full_spread)}</td></tr>"
        for row in rows
        for rate in row.learning_rates
    )
    names = ("variant", "learning rate", "first half", "second half", "all windows", "± over seeds")
    heads = "".join(f'<th scope="col" style="padding:10px">{name}</th>' for name in names)
    return f"""<h3 style="margin-top:22px">Each learning rate</h3>
<p class="note">The learning rate is chosen on the first half of the held-out windows; the second half, marked, is what
is reported and compared. Curves are over all windows.</p>
<div class="card scroll"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"""


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _figures(results: Results, drawn: dict[str, Any], looks: dict[str, Style]) -> str:
    if not drawn:
        return ""
    chips = "".join(
        f'<button type="button" class="chip" aria-pressed="false" data-name="{escape(row.name)}">'
        f"{_line_sample(looks[row.name])}{escape(row.name)}</button>"
        for row in results.finished
    )
    ranking = _figure(drawn, "ranking", "Where they ended", _ranking_caption(results))
    loss = "".join(_figure(drawn, *entry) for entry in LOSS_FIGURES)
    costs = "".join(_figure(drawn, *entry) for entry in COST_FIGURES)
    return f"""<section>
<h2>The figures</h2>
<p class="note">Choose variants to bring them to the front, here and in the table.</p>
<div class="legend">{chips}</div>
{ranking}
<h3 style="margin:22px 0 8px">Held-out loss on the way</h3>
<div class="grid">{loss}</div>
<p class="note" style="margin-top:8px">Marks are evaluations of the whole held-out set; the faint lines are training
losses.</p>
<h3 style="margin:22px 0 8px">What it costs</h3>
<div class="grid two">{costs}</div>
</section>"""


def _ranking_caption(results: Results) -> str:
    parts = ["Held-out loss at the end, best on top."]
    if any(row.val_loss_spread is not None for row in results.finished):
        parts.append("Bars: standard deviation over seeds.")
    if any(row.val_loss_oracle is not None for row in results.finished):
        parts.append("Hollow: the loss if routing could see the whole sequence.")
    return " ".join(parts)


def _figure(drawn: dict[str, Any], name: str, title: str, caption: str) -> str:
    if name not in drawn:
        return ""
    return (
        f'<figure class="card"><figcaption><h3>{escape(title)}</h3><p>{escape(caption)}</p></figcaption>'
        f'<div class="plot" data-figure="{escape(name)}" role="img" aria-label="{escape(title)}"></div></figure>'
    )


def _depth(results: Results, drawn: dict[str, Any]) -> str:
    routed = [row for row in results.finished if row.kind == "routed"]
    if not routed:
        return ""
    histogram = _figure(
        drawn, "depth", "How deep the tokens went", "Recursions taken by held-out tokens, under the rule of decoding."
    )
    maps = "".join(_depth_map(results, row) for row in routed)
    return f"""<section>
<h2>Where the compute goes</h2>
<p class="note">A depth router decides for every token how many recursions it takes.</p>
{histogram}
<div class="maps" style="margin-top:16px">{maps}</div>
</section>"""


def _depth_map(results: Results, row: Row) -> str:
    routing = results.cells_of(row)[0].measures.routing
    if routing is None or routing.depth_map is None:
        return ""
    deepest = routing.deepest
    spans = []
    for token, depth in zip(routing.depth_map.tokens, routing.depth_map.depths, strict=True):
        colour = depth_colour(depth, deepest)
        text = escape(visible(token)).replace("\n", "↵\n")
        spans.append(f'<span style="background:{colour};color:{ink_on(colour)}" title="depth {depth}">{text}</span>')
    lowest = min(routing.depth_map.depths)
    scale = "".join(
        f'<span><i style="background:{depth_colour(depth, deepest)}"></i>{depth}</span>'
        for depth in range(min(lowest, 1), deepest + 1)
    )
    mean = f"{row.mean_depth:.2f} of {deepest} recursions on average" if row.mean_depth is not None else ""
    return f"""<div class="card" data-variant="{escape(row.name)}">
<h3>{escape(row.name)}</h3>
<p class="depths">recursions {scale}<span>{mean}</span></p>
<p class="map">{"".join(spans)}</p>
</div>"""


def _experts(results: Results, drawn: dict[str, Any]) -> str:
    parts = "".join(
        _figure(
            drawn,
            f"experts_{row.name}",
            row.name,
            "Share of the work of each expert; the dotted line is an even share.",
        )
        for row in results.finished
    )
    if not parts:
        return ""
    return f"""<section>
<h2>Expert load</h2>
<p class="note">Counted on held-out text.</p>
<div class="grid two">{parts}</div>
</section>"""


def _samples(results: Results, looks: dict[str, Style]) -> str:
    cards = []
    for row in results.finished:
        measures = results.cells_of(row)[0].measures
        if measures.sample is not None:
            text = f"<b>{escape(measures.sample.prompt)}</b><span>{escape(visible(measures.sample.text))}</span>"
        elif measures.refusal is not None:
            text = f"<span>{escape(measures.refusal)}</span>"
        else:
            continue
        cards.append(
            f'<div class="card" data-variant="{escape(row.name)}"><h3>{_swatch(looks[row.name])}{escape(row.name)}</h3>'
            f'<p class="sample">{text}</p></div>'
        )
    if not cards:
        return ""
    sample = results.study.sample
    drawn = f"temperature {sample.temperature:g}" + (f", top-k {sample.top_k}" if sample.top_k else "")
    return f"""<section>
<h2>What they write</h2>
<p class="note">The prompt in bold, then {sample.max_new_tokens} tokens, drawn with {drawn} and the same seed.</p>
<div class="grid">{"".join(cards)}</div>
</section>"""


def _swatch(look: Style) -> str:
    return f'<span class="swatch" style="background:{look.colour}"></span>'


def _line_sample(look: Style) -> str:
    """A short piece of the variant's line."""
    dashes = {"solid": "none", "dash": "5 3", "dot": "1.5 2.5", "dashdot": "5 2 1.5 2"}[look.dash]
    return (
        f'<svg width="22" height="8" aria-hidden="true"><line x1="0" y1="4" x2="22" y2="4" stroke="{look.colour}" '
        f'stroke-width="3" stroke-dasharray="{dashes}"/></svg>'
    )


def _json(content: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return ASSETS.joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError("the report needs plotly, which is not installed; run pip install 'morex[viz]'") from None
    script: str = get_plotlyjs()
    return script
