"""Plain sentences that follow from the numbers of a study. Pure functions of the results; whoever wins is named."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from morex.study.records import Cell, Results, Row
from morex.study.series import recursions_text
from morex.study.units import duration, human

EQUAL = 0.01
"""Relative difference up to which two sizes or budgets count as equal."""
LEVEL = 0.005
"""Nats per token up to which two losses count as equal, whatever the seeds say."""
COLLAPSED = 0.95
"""Share of the tokens at one depth from which a depth router is said not to tell tokens apart."""
UNEVEN = 1.5
"""Load of the busiest expert, relative to an even one, from which it is worth a sentence."""


def findings(results: Results) -> tuple[str, ...]:
    """Sentences for the report and the terminal, most important first."""
    if not results.finished:
        return (*_failures(results), "No cell has finished, so there is nothing to compare.")
    sentences = [
        *_winner(results),
        *_learning_rates(results),
        *_against_dense(results, "unique_non_embedding", "equal parameters", _parameters),
        *_against_dense(
            results, "train_flops", "equal training FLOPs", lambda row: human(row.train_flops or 0, "FLOP")
        ),
        *_after_the_same(results, "flops"),
        *_after_the_same(results, "seconds"),
        *_savings(results),
        *_oracle(results),
        *_oracle_only(results),
        *_depths(results),
        *_experts(results),
        *_shared_machine(results),
        *_failures(results),
    ]
    if all(row.seeds < 2 for row in results.finished) and len(results.finished) > 1:
        sentences.append("Each variant has one seed, so how much of a small difference is chance cannot be told.")
    return tuple(sentences)


def separation(one: Row, other: Row) -> str | None:
    """`within the spread over seeds` where two losses differ by less than their spreads, added in quadrature."""
    assert one.val_loss is not None and other.val_loss is not None
    if one.val_loss_spread is None or other.val_loss_spread is None:
        return None
    noise = math.hypot(one.val_loss_spread, other.val_loss_spread)
    return "within the spread over seeds" if abs(one.val_loss - other.val_loss) <= noise else None


def _winner(results: Results) -> list[str]:
    ranked = sorted(results.finished, key=_loss)
    best = ranked[0]
    if len(ranked) == 1:
        return [f"{_capital(_named(best))} reached a held-out loss of {_loss_text(best)}."]
    second = ranked[1]
    gap = _loss(second) - _loss(best)
    if separation(best, second):
        sentence = (
            f"{_named(best)} ({_loss_text(best)}) and {_named(second)} ({_loss_text(second)}) have the lowest held-out "
            f"losses; the {gap:.3f} between them is within the spread over seeds."
        )
    else:
        sentence = (
            f"{_capital(_named(best))} has the lowest held-out loss, {_loss_text(best)}, {gap:.3f} below "
            f"{_named(second)}."
        )
    dense = next((row for row in ranked if row.kind == "dense"), None)
    if dense is not None and dense not in (best, second):
        sentence += f" The best dense variant, `{dense.name}`, has {_loss_text(dense)}."
    return [_capital(sentence)]


def _learning_rates(results: Results) -> list[str]:
    rows = [row for row in results.finished if len(row.learning_rates) > 1]
    if not rows:
        return []
    chosen = _listed([f"`{row.name}` {row.lr:g}" for row in rows])
    return [
        f"Each is shown at the best of {len(rows[0].learning_rates)} learning rates, chosen on the first half of the "
        f"held-out windows and measured on the second: {chosen}."
    ]


def _against_dense(results: Results, key: str, words: str, amount: Callable[[Row], str]) -> list[str]:
    """One sentence per dense variant about all others that are equal to it in `key`; the best of equal dense ones."""
    rows = [row for row in results.finished if getattr(row, key) is not None]
    sentences, told = [], set()
    for dense in sorted((row for row in rows if row.kind == "dense"), key=_loss):
        same = [row for row in rows if row.kind != "dense" and _equal(getattr(row, key), getattr(dense, key))]
        if not same or frozenset(row.name for row in same) in told:
            continue
        told.add(frozenset(row.name for row in same))
        verdicts = {"loses to": [], "is level with": [], "beats": []}  # type: dict[str, list[str]]
        for row in sorted(same, key=_loss):
            if separation(dense, row) or abs(_loss(row) - _loss(dense)) < LEVEL:
                verdict = "is level with"
            else:
                verdict = "loses to" if _loss(row) < _loss(dense) else "beats"
            verdicts[verdict].append(f"`{row.name}` ({_loss(row):.3f}{_price(row, dense, key)})")
        said = [f"{verb} {_listed(names)}" for verb, names in verdicts.items() if names]
        level = (
            ", within the spread over seeds" if verdicts["is level with"] and dense.val_loss_spread is not None else ""
        )
        said = [text + level if text.startswith("is level") else text for text in said]
        sentences.append(
            f"At {words} ({amount(dense)}) the dense `{dense.name}` ({_loss(dense):.3f}) {_listed(said, ', and ')}."
        )
    return sentences


def _price(row: Row, dense: Row, key: str) -> str:
    """What the row pays or saves in the other of the two currencies, parameters and FLOPs."""
    other, words = ("train_flops", "FLOPs") if key == "unique_non_embedding" else ("unique_non_embedding", "parameters")
    mine, theirs = getattr(row, other), getattr(dense, other)
    if not mine or not theirs or _equal(mine, theirs):
        return ""
    return f" with {mine / theirs:.2g} times its {words}"


def _after_the_same(results: Results, axis: str) -> list[str]:
    """Who is ahead where all have spent as much as the one that spent least, read from the evaluation curves."""
    spent = {row.name: _last(results, row, axis) for row in results.finished}
    if len(spent) < 2 or any(value is None for value in spent.values()):
        return []
    least, most = min(v for v in spent.values() if v), max(v for v in spent.values() if v)
    if axis == "flops" and _equal(least, most):
        return []
    read = {row.name: _read_at(results, row, axis, least) for row in results.finished}
    known = [row for row in results.finished if read[row.name] is not None]
    if len(known) < 2:
        return []
    ranked = sorted(known, key=lambda row: read[row.name] or 0.0)
    first = ranked[0]
    rival = next((row for row in ranked[1:] if (row.kind == "dense") != (first.kind == "dense")), ranked[1])
    what = f"{human(least, 'FLOP')} of training" if axis == "flops" else f"{duration(least)} of training"
    caveat = "" if _equal(least, most) else " (read from the curves, with the longer trainings still under way)"
    rival_name = (
        f"the best dense variant, `{rival.name}`," if rival.kind == "dense" else f"the best other, `{rival.name}`,"
    )
    # Curves are over all windows, also where the table has the loss over half of them.
    basis = " over all held-out windows" if any(row.learning_rates for row in known) else ""
    return [
        f"After the same {what}{caveat} {_named(first)} is ahead with {read[first.name]:.3f}{basis}; {rival_name} has "
        f"{read[rival.name]:.3f}."
    ]


def _savings(results: Results) -> list[str]:
    """What routing saved in FLOPs and in time, against the same model without its router or its equal-depth twin."""
    by_base: dict[str, list[tuple[Row, float, float]]] = {}
    for row in results.finished:
        base = _routing_base(results, row)
        if base is None or not (row.train_flops_per_token and base.train_flops_per_token):
            continue
        if row.tokens_per_s and base.tokens_per_s:
            flop_ratio = row.train_flops_per_token / base.train_flops_per_token
            by_base.setdefault(base.name, []).append((row, flop_ratio, base.tokens_per_s / row.tokens_per_s))
    sentences = []
    for base_name, entries in by_base.items():
        parts = [f"`{row.name}` {_change(flops)} FLOPs and {_change(time)} time" for row, flops, time in entries]
        sentence = f"Routing against none (`{base_name}`), per training token: {'; '.join(parts)}."
        worst_row, flops, time = min(entries, key=lambda entry: entry[1] / entry[2])
        if flops / time < 0.9:
            sentence += (
                f" At this size the saving does not all show on the clock (`{worst_row.name}`: {flops / time:.2f} "
                "explained): choosing tokens, gathering them and smaller matrix products cost time and no FLOPs."
            )
        sentences.append(sentence)
    return sentences


def _routing_base(results: Results, row: Row) -> Row | None:
    """The variant that shows what the router saved: the unrouted form, else the twin of equal depth."""
    if row.kind != "routed":
        return None
    twins = [other.name for other in results.rows if other.twin_of == row.name and other.twin == "equal_depth"]
    for name in (row.unrouted, *twins):
        if name is not None and results.row(name).finished:
            return results.row(name)
    return None


def _oracle(results: Results) -> list[str]:
    rows = [row for row in results.finished if row.val_loss_oracle is not None]
    if not rows:
        return []
    parts = [f"`{row.name}` {row.val_loss_oracle:.3f} (causal: {_loss(row):.3f})" for row in rows]
    return [
        f"With top-k routing that sees the whole sequence (oracle) the held-out loss would be: {_listed(parts)}; only "
        "the causal figure can be had in decoding."
    ]


def _oracle_only(results: Results) -> list[str]:
    return [
        f"`{row.name}` has no causal rule, so it has an oracle loss alone ({row.val_loss_oracle:.3f}) and is left out."
        for row in results.rows
        if row.val_loss is None and row.val_loss_oracle is not None
    ]


def _depths(results: Results) -> list[str]:
    sentences = []
    for row in results.finished:
        histogram = _histogram(results.cells_of(row))
        if histogram is None:
            continue
        share, depth = max(histogram) / max(1, sum(histogram)), histogram.index(max(histogram))
        if share >= COLLAPSED:
            sentences.append(
                f"`{row.name}` gave {100 * share:.0f} % of the held-out tokens the same {recursions_text(depth)}: its "
                "router hardly tells tokens apart."
            )
    return sentences


def _histogram(cells: Sequence[Cell]) -> list[int] | None:
    found = [
        cell.measures.routing.histogram for cell in cells if cell.measures.routing and cell.measures.routing.histogram
    ]
    return [sum(counts) for counts in zip(*found, strict=True)] if found else None


def _experts(results: Results) -> list[str]:
    sentences = []
    for row in results.finished:
        loads = [
            load
            for cell in results.cells_of(row)
            if cell.measures.routing
            for load in cell.measures.routing.expert_load.values()
        ]
        if not loads:
            continue
        busiest = max(loads, key=lambda load: max(load) * len(load))
        if max(busiest) * len(busiest) >= UNEVEN:
            sentences.append(
                f"The busiest expert of `{row.name}` takes {100 * max(busiest):.0f} % of its layer's work, where "
                f"{100 / len(busiest):.0f} % would be even."
            )
    return sentences


def _shared_machine(results: Results) -> list[str]:
    if results.jobs == 1:
        return []
    return [
        f"Up to {results.jobs} cells ran at a time, so seconds and tokens per second are those of a shared machine."
    ]


def _failures(results: Results) -> list[str]:
    failed = [cell for cell in results.cells if cell.status == "failed"]
    missing = [cell for cell in results.cells if cell.status == "missing"]
    sentences = [f"The cell `{cell.name}` failed and is left out: {(cell.error or '').rstrip('.')}." for cell in failed]
    if missing:
        sentences.append(
            f"{len(missing)} of {len(results.cells)} cells are not trained yet; the figures hold for those that are."
        )
    return sentences


def _last(results: Results, row: Row, axis: str) -> float | None:
    ends = [getattr(cell.evaluations[-1], axis) for cell in results.cells_of(row) if cell.evaluations]
    return min(ends) if ends else None


def _read_at(results: Results, row: Row, axis: str, where: float) -> float | None:
    """Mean over seeds of the held-out loss at `where`, linear between evaluations; None before the first one."""
    values = []
    for cell in results.cells_of(row):
        points = [(getattr(point, axis), point.val_loss) for point in cell.evaluations]
        value = interpolate(points, where)
        if value is None:
            return None
        values.append(value)
    return sum(values) / len(values) if values else None


def interpolate(points: Sequence[tuple[float, float]], where: float) -> float | None:
    """Value at `where` on the line through the points, which are in order; None outside of them."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= where <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (where - x0) / (x1 - x0)
    return points[-1][1] if points and where == points[-1][0] else None


def _equal(one: float, other: float) -> bool:
    return abs(one - other) <= EQUAL * max(abs(one), abs(other))


def _loss(row: Row) -> float:
    assert row.val_loss is not None
    return row.val_loss


def _loss_text(row: Row) -> str:
    return f"{_loss(row):.3f}" + (f" ± {row.val_loss_spread:.3f}" if row.val_loss_spread is not None else "")


def _parameters(row: Row) -> str:
    return f"{human(row.unique_non_embedding or 0)} without embeddings"


def _named(row: Row) -> str:
    return f"the dense `{row.name}`" if row.kind == "dense" else f"`{row.name}`"


def _change(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.0f} %".replace("-", "−")


def _listed(parts: Sequence[str], last: str = " and ") -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}{last}{parts[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
