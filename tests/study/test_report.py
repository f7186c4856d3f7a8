"""The report: one file, nothing from outside, all text escaped."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from morex.study.findings import findings
from morex.study.records import Results
from morex.study.report import budget_text, report_html
from morex.study.spec import Budget
from study.helpers import family, make_results, variant

pytest.importorskip("plotly")


def finished(results: Results) -> Results:
    return results.model_copy(update={"findings": findings(results)})


@pytest.fixture(scope="module")
def html() -> str:
    return report_html(finished(family()))


class Page(HTMLParser):
    """Tags, attributes and text of a page; what scripts and styles hold apart."""

    VOID = frozenset({"meta", "line", "br", "link", "img", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.code: dict[str, list[str]] = {"script": [], "style": []}
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.code:
            self.code[self.open[-1]].append(data)
        else:
            self.text.append(data)

    def found(self, tag: str, **wanted: Any) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(a.get(key) == value for key, value in wanted.items())]


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_every_element_is_closed(page: Page) -> None:
    assert page.open == []


def test_nothing_comes_from_outside(page: Page) -> None:
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "action"} & attributes.keys(), (tag, attributes)
        assert tag not in ("link", "iframe", "img", "object")
    [policy] = page.found("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in (policy["content"] or "")
    assert not re.search(r"url\(|@import", page.code["style"][0])


def test_plotly_is_there_once(html: str) -> None:
    assert html.count("* plotly.js v") == 1


def test_text_of_the_study_is_escaped(html: str, page: Page) -> None:
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert " &lt;two&gt;" in html
    assert "A &lt;fast&gt; CPU" in html
    assert len(page.found("script")) == 3


def test_figures_are_embedded_and_each_has_a_place(page: Page) -> None:
    figures = json.loads(page.code["script"][0])
    places = {attributes["data-figure"] for attributes in page.found("div", **{"class": "plot"})}
    assert places == set(figures)
    assert "loss_tokens" in figures
    assert "\\u003c" not in json.dumps(list(figures))


def test_the_findings_stand_first(page: Page) -> None:
    text = " ".join("".join(page.text).split())
    first = "has the lowest held-out loss, 1.910 ± 0.010"
    assert first in text
    assert text.index(first) < text.index("The numbers") < text.index("The figures")


def test_every_row_can_be_sorted_by_plain_numbers(page: Page) -> None:
    cells = [a["data-value"] for a in page.found("td") if "data-value" in a]
    assert len(cells) % 5 == 0
    for value in cells:
        assert value is not None
        if value:
            float(value)
    assert page.found("tr", **{"data-variant": "routed"})


def test_depth_map_tokens_are_coloured_by_depth(html: str) -> None:
    spans = re.findall(r'<span style="background:(#\w+);color:#\w+" title="depth (\d)">([^<]*)</span>', html)
    assert [(depth, text) for _, depth, text in spans] == [("1", "One"), ("2", " &lt;two&gt;"), ("1", "↵\nthree")]
    assert spans[0][0] == spans[2][0] != spans[1][0]


def test_how_to_reproduce_it(page: Page) -> None:
    text = "".join(page.text)
    assert "morex compare made-up.yaml" in text
    assert "torch" in text
    assert "2.13.0" in text
    assert "8 blocks of width 256, swiglu 704" in text


def test_learning_rates_have_a_table_of_their_own() -> None:
    results = finished(family())
    rate = {"lr": 1e-3, "first_half": 1.0, "second_half": 1.25, "full": 1.5, "full_spread": None}
    tree = results.model_dump()
    tree["rows"] = [row | {"learning_rates": [rate], "lr": 1e-3} for row in tree["rows"]]
    html = report_html(Results.model_validate(tree))
    assert "Each learning rate" in html
    assert '<td class="best">1.2500</td>' in html
    assert "Each learning rate" not in report_html(results)


def test_a_study_in_which_nothing_finished_still_has_a_report() -> None:
    results = make_results(variant("a", "dense", 2.0))
    empty = results.model_copy(update={"rows": (results.rows[0].model_copy(update={"val_loss": None}),), "cells": ()})
    page = Page(report_html(finished(empty)))
    assert "No cell has finished" in "".join(page.text)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(kind="tokens", value=307200), "307,200 tokens"),
        (Budget(kind="flops", value=2e13), "20.0 TFLOP"),
        (Budget(kind="seconds", value=90), "1 min 30 s"),
        (Budget(kind="steps", value=1000), "1,000 steps"),
        (Budget(), "its own steps"),
    ],
)
def test_budgets_in_words(budget: Budget, text: str) -> None:
    assert budget_text(budget) == text
