"""The report opens without a network, and its numbers are the results'."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from narses_lab.demo import ATTACKS, RULES
from narses_lab.figures import curves
from narses_lab.report import Report
from narses_lab.results import summarise, verdicts
from tests.lab.results_for import everything, result

FETCHING = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}


class Page(HTMLParser):
    """Collects what a browser would fetch, the open tags, and the text of each table cell."""

    def __init__(self, html):
        super().__init__()
        self.fetched, self.open, self.cells = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in FETCHING]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag == "td":
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1][-1] += data + " "


def report_of(results, **changes):
    table = summarise(results)
    fields = {
        "started": "2026-01-02T03:04:05+00:00",
        "seconds": 70.0,
        "first_accuracy": 9.0,
        "table": table,
        "verdicts": verdicts(table),
        "results": results,
        "settings": {"rounds": 10},
        "machine": {"cores": 2},
        "versions": {"narses": "0.0"},
        "commands": ["narses-server --config config/server.toml"],
    }
    return Report(**{**fields, **changes})


def test_nothing_is_fetched_and_the_page_is_well_formed(tmp_path):
    results = everything({("mean", "ipm"): 0.1}, seeds=2)
    svg = curves(results, tmp_path / "plot.png")
    html = report_of(results).html(svg)

    page = Page(html)

    assert page.open == []
    (figure,) = page.fetched
    assert figure.startswith("data:image/svg+xml;base64,")
    assert base64.b64decode(figure.partition(",")[2]) == svg
    assert not re.search(r"url\(|@import|<script|<link|<iframe", html)
    assert not re.search(rb"(href|src)=\"(?!#)", svg)  # matplotlib's own references stay inside the figure
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_every_accuracy_in_the_table_is_computed_from_the_results():
    finals = {
        (rule, attack): 0.31 + 0.05 * i for i, (rule, attack) in enumerate((r, a) for r in RULES for a in ATTACKS)
    }
    page = Page(report_of(everything(finals)).html(b""))

    for rule, title in RULES.items():
        (row,) = [cells for cells in page.cells if cells and cells[0].strip() == title]
        for cell, attack in zip(row[1:], ATTACKS, strict=True):
            final = 100 * finals[rule, attack]
            assert cell.split() == [f"{final:.1f}", "best", f"{max(50.0, final):.1f}"]


def test_divergence_is_shown():
    results = [result("mean", attack, outcome="diverged" if attack == "ipm" else "completed") for attack in ATTACKS]

    (row,) = [cells for cells in Page(report_of(results).html(b"")).cells if cells and cells[0].strip() == "Mean"]

    assert ["diverged" in cell for cell in row] == [False, False, False, True]


def test_who_was_chosen_under_alie_is_told():
    results = [*everything({}), result("krum", "alie", 2, liars_chosen=0.25)]

    assert "Krum 25 %" in report_of(results).html(b"")


@pytest.mark.parametrize(("collapsed", "word"), [(0.1, "PASS"), (0.85, "FAIL")])
def test_the_verdict_is_on_the_page_and_decides_whether_it_failed(collapsed, word):
    report = report_of(everything({("mean", "ipm"): collapsed}))

    assert Page(report.html(b"")).cells[1][0].strip() == word
    assert report.failed is (word == "FAIL")


def test_text_is_escaped():
    html = report_of(everything({}), machine={"processor": "<script>alert(1)</script>"}, commands=["a && b < c"]).html(
        b""
    )

    assert "<script" not in html
    assert "a &amp;&amp; b &lt; c" in html


def test_the_summary_is_strict_json_and_says_the_same():
    results = everything({("mean", "ipm"): 0.1}, seeds=3)
    report = report_of(results)

    summary = json.loads(json.dumps(report.summary(), allow_nan=False))

    assert summary["passed"] is True
    assert [v["verdict"] for v in summary["verdicts"]] == ["PASS", "PASS"]
    assert len(summary["runs"]) == len(results)
    assert len(summary["table"]) == len(RULES) * len(ATTACKS)
    mean_ipm = next(c for c in summary["table"] if (c["rule"], c["attack"]) == ("mean", "ipm"))
    assert mean_ipm["final_accuracy"]["mean"] == pytest.approx(0.1)
    assert {"settings", "machine", "versions", "commands", "seconds", "first_accuracy_seconds"} <= summary.keys()


def test_a_curve_that_ends_early_does_not_break_the_figure(tmp_path):
    short = result("mean", "ipm", 2, 0.1, outcome="diverged", curve=((5, 0.1),))

    whole = [result("mean"), result("mean", "ipm", 1, 0.2)]

    assert curves([*whole, short], tmp_path / "p.png").startswith(b"<?xml")
