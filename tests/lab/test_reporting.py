"""A results folder becomes a report whose numbers are the folder's, and that opens without a network."""

import base64
import json
import math
import re
import statistics
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from narses_lab.errors import OptionError
from narses_lab.reporting import render
from narses_lab.reporting.curves import against, mean_curve, over_numbers, over_rounds
from narses_lab.reporting.figures import COLOURS, DASHES, MARKERS
from narses_lab.reporting.groups import groups
from narses_lab.reporting.read import Experiment

FETCHING = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}
HOSTILE = '$\\frac{$ <script>alert("x")</script> | `a` ![b](http://example.org/c.png) _d_ &amp;'


class Folder:
    """Writes what `narses run` leaves behind. axes: key -> {label: value}; every combination is a run."""

    def __init__(self, path, axes, config=None):
        self.path, self.axes, self.runs = path, axes, []
        combinations = [{}]
        for key, values in axes.items():
            combinations = [{**labels, key: label} for labels in combinations for label in values]
        for number, labels in enumerate(combinations):
            self.runs.append({"run": f"run-{number}-3fa2b1c0", "key": f"{number:064x}", "labels": labels})
        self.record = {
            "format": 1,
            "name": "Krum under ALIE",
            "started": "2026-01-02T03:04:05+00:00",
            "finished": None,
            "machine": {"processor": "a processor", "cores": 2},
            "versions": {"narses": "0.1.0"},
            "commit": "0123abc",
            "command": "narses run krum.toml && echo done",
            "transport": "local",
            "config": config or {"task": {"model": {"name": "mlp", "hidden": 32}, "batch": 50}, "round": {"n": 10}},
            "axes": [{"key": key, "labels": list(v), "values": list(v.values())} for key, v in axes.items()],
            "runs": self.runs,
        }
        self.write()

    def write(self):
        self.path.mkdir(exist_ok=True)
        (self.path / "experiment.json").write_text(json.dumps(self.record), encoding="utf-8")

    def find(self, **labels):
        """The runs with these labels; a double underscore stands for a dot."""
        wanted = {key.replace("__", "."): label for key, label in labels.items()}
        return [run for run in self.runs if wanted.items() <= run["labels"].items()]

    def play(
        self,
        run,
        final=0.9,
        best=None,
        *,
        curve=None,
        speed=50.0,
        outcome="completed",
        attack=None,
        byzantine=(),
        f_real=0,
        selected=(),
    ):
        folder = self.path / "runs" / run["run"]
        folder.mkdir(parents=True, exist_ok=True)
        best = final if best is None else best
        summary = {
            "run": run["run"],
            "outcome": outcome,
            "rounds": 10,
            "rounds_per_second": speed,
            "seconds": 0.2,
            "digest": run["key"][::-1],
            "final_accuracy": final,
            "final_loss": math.nan,
            "best_accuracy": best,
            "best_round": 5,
            "accuracy": [[5, best], [10, final]] if curve is None else curve,
            "config": {"round": {"n": 10, "f": 2}},
        }
        details = {
            "key": run["key"],
            "labels": run["labels"],
            "attack": attack,
            "byzantine": list(byzantine),
            "where": "own" if attack else None,
            "f_real": f_real,
            "machine": {},
            "versions": {},
            "commit": "0123abc",
            "transport": "local",
            "played": "2026-01-02T03:05:05+00:00",
        }
        lines = [{"round": i, "outcome": "completed", "selected": s, "refused": {}} for i, s in enumerate(selected)]
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "run.json").write_text(json.dumps(details))
        (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder


class Page(HTMLParser):
    """Collects what a browser would fetch, whether tags are balanced, and the text of each table's cells."""

    def __init__(self, html):
        super().__init__()
        self.fetched, self.open, self.tables, self.alts = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in FETCHING]
        self.alts += [value for name, value in attrs if name == "alt"]
        assert not any(name.startswith("on") for name, _ in attrs)
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data + " "

    def table(self, *heads):
        """The table whose first row begins with `heads`: its rows as {head: cell}."""
        for first, *rows in self.tables:
            names = [cell.strip() for cell in first]
            if tuple(names[: len(heads)]) == heads:
                return [dict(zip(names, (" ".join(cell.split()) for cell in row), strict=True)) for row in rows]
        raise AssertionError(f"no table begins with {heads}")


def markdown_table(text, *heads):
    """As Page.table, from Markdown; only for cells without escapes."""
    lines = iter(text.splitlines())
    for line in lines:
        names = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and tuple(names[: len(heads)]) == heads:
            assert set(next(lines)) <= set("|-: ")
            rows = []
            while (line := next(lines, "")).startswith("|"):
                cells = [" ".join(cell.replace("<br>", " ").split()) for cell in line.strip("|").split("|")]
                rows.append(dict(zip(names, cells, strict=True)))
            return rows
    raise AssertionError(f"no table begins with {heads}")


def rendered(folder):
    """(parsed HTML, HTML, Markdown)."""
    done = render(folder.path)
    assert (done.html, done.markdown) == (folder.path / "report.html", folder.path / "report.md")
    html = done.html.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    return page, html, done.markdown.read_text(encoding="utf-8")


ALIE = {"name": "alie", "z": 1.5}
RULE_ATTACK = {
    "round.rule": {"mean": "mean", "krum": "krum"},
    "attack": {"none": None, "alie": ALIE},
    "task.seed": {"1": 1, "2": 2, "3": 3},
}


@pytest.fixture
def folder(tmp_path):
    """Two rules, two attacks, three seeds, all played; finals all different."""
    made = Folder(tmp_path / "results", RULE_ATTACK)
    for i, run in enumerate(made.runs):
        attacked = run["labels"]["attack"] == "alie"
        made.play(
            run,
            0.5 + 0.031 * i,
            0.55 + 0.0333 * i,
            speed=10.0 + i * i,
            attack=ALIE if attacked else None,
            byzantine=(8, 9) if attacked else (),
            f_real=2 if attacked else 0,
            selected=[[9], [1], [2], [8 if i % 3 else 3]] if run["labels"]["round.rule"] == "krum" else [None] * 4,
        )
    return made


def spread(values):
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def test_every_number_of_the_main_table_is_computed_from_the_runs(folder):
    page, _, text = rendered(folder)

    for rows in (page.table("round.rule", "attack"), markdown_table(text, "round.rule", "attack")):
        assert [(row["round.rule"], row["attack"]) for row in rows] == [
            ("mean", "none"),
            ("mean", "alie"),
            ("krum", "none"),
            ("krum", "alie"),
        ]
        for i, row in enumerate(rows):
            numbers = range(3 * i, 3 * i + 3)
            assert row["final %"] == spread([0.5 + 0.031 * k for k in numbers])
            assert row["best %"] == spread([0.55 + 0.0333 * k for k in numbers])
            assert (row["runs"], row["diverged"]) == ("3", "0")
            assert row["rounds/s"] == f"{10.0 + (3 * i + 1) ** 2:.1f}"
            assert row["attackers"] == ("2 of 10 (20 %)" if row["attack"] == "alie" else "0")
        # of Krum's four choices under ALIE 9 is a liar, and for two of three seeds 8 is too
        assert [row["chosen from attackers"] for row in rows] == [
            "-",
            "-",
            "-",
            f"{100 * (0.25 + 0.5 + 0.5) / 3:.1f} %",
        ]


def test_two_axes_make_a_matrix(folder):
    page, _, text = rendered(folder)

    heads = ("round.rule \\ attack", "none", "alie")
    (mean, krum) = page.table(*heads)
    assert (
        mean["alie"]
        == f"{spread([0.5 + 0.031 * k for k in (3, 4, 5)])} best {spread([0.55 + 0.0333 * k for k in (3, 4, 5)])}"
    )
    assert krum["none"].startswith(spread([0.5 + 0.031 * k for k in (6, 7, 8)]))
    assert markdown_table(text, "round.rule \\\\ attack", "none", "alie")[1]["none"] == krum["none"]


def test_only_rounds_under_attack_count_and_unknown_attackers_are_not_guessed(tmp_path):
    made = Folder(tmp_path / "r", {"attack": {"late": 1, "short": 2, "changing": 3, "fewer": 4}})
    late, short, changing, fewer = made.runs
    selected = [[9], [9], [1], [9]]
    made.play(late, attack={**ALIE, "start_round": 2}, byzantine=[9], f_real=1, selected=selected)
    made.play(short, attack={**ALIE, "stop_round": 2}, byzantine=[9], f_real=1, selected=selected)
    made.play(changing, attack={**ALIE, "members": "random-per-round"}, byzantine=[9], f_real=1, selected=selected)
    made.play(fewer, attack=ALIE, byzantine=[8, 9], f_real=1, selected=selected)

    page, _, _ = rendered(made)

    chosen = {row["attack"]: row["chosen from attackers"] for row in page.table("attack")}
    assert chosen == {"late": "50.0 %", "short": "100.0 %", "changing": "-", "fewer": "-"}


def test_figures_are_inside_the_page_and_beside_the_markdown_and_nothing_is_fetched(folder):
    before = {path.name for path in folder.path.iterdir()}

    page, html, text = rendered(folder)

    (figure,) = page.fetched
    svg = base64.b64decode(figure.removeprefix("data:image/svg+xml;base64,"), validate=True)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert not re.search(rb"(href|src)=\"(?!#)", svg)
    assert not re.search(r"url\(|@import|https?:", html.replace(figure, ""))
    assert re.findall(r"!\[[^]]*\]\(([^)]*)\)", text) == ["report-1-rounds.svg"]
    assert (folder.path / "report-1-rounds.svg").read_bytes() == svg
    assert {path.name for path in folder.path.iterdir()} - before == {"report.html", "report.md", "report-1-rounds.svg"}


def test_the_same_results_give_the_same_bytes(folder):
    first = [render(folder.path).html.read_bytes(), (folder.path / "report.md").read_bytes()]

    assert [render(folder.path).html.read_bytes(), (folder.path / "report.md").read_bytes()] == first


def test_the_report_says_when_where_and_with_which_settings(folder):
    page, html, text = rendered(folder)

    assert "12 of 12 runs were played to their end, 0 of them diverged, 0 are missing." in text
    assert "narses run krum.toml &amp;&amp; echo done" in html
    for fact in ("2026-01-02T03:04:05+00:00", "0123abc", "0.1.0", "a processor", "not finished", "local"):
        assert fact in html
        assert fact in text
    varied = {row["varied"]: row["values"] for row in page.table("varied")}
    assert varied == {
        "round.rule": "mean, krum",
        "attack: none": "-",
        "attack: alie": "alie, z = 1.5",
        "task.seed": "1, 2, 3",
    }
    fixed = {row["the same in every run"]: row["value"] for row in page.table("the same in every run")}
    assert fixed == {"task.model": "mlp, hidden = 32", "task.batch": "50", "round.n": "10"}


def test_what_varies_is_not_among_what_is_fixed(tmp_path):
    config = {
        "name": "x",
        "title": "Does Krum hold?",
        "matrix": {"attack": {"z": [1.0, 2.0]}},
        "seeds": 1,
        "task": {"seed": 4, "batch": 50},
        "round": {"n": 10, "f": 1, "rule": {"name": "krum", "p": 2}},
        "attack": {"name": "alie", "z": 1.0},
    }
    cases = {"small": {"label": "small", "round": {"f": 2}}, "large": {"label": "large", "round": {"f": 3}}}
    made = Folder(tmp_path / "r", {"case": cases, "attack.z": {"1.0": 1.0, "2.0": 2.0}}, config)

    page, html, _ = rendered(made)

    fixed = {row["the same in every run"]: row["value"] for row in page.table("the same in every run")}
    assert fixed == {
        "task.seed": "4",
        "task.batch": "50",
        "round.n": "10",
        "round.rule": "krum, p = 2",
        "attack.name": "alie",
    }
    assert {row["varied"]: row["values"] for row in page.table("varied")} == {
        "case: small": "round.f = 2",
        "case: large": "round.f = 3",
        "attack.z": "1.0, 2.0",
    }
    assert "<p>Does Krum hold?</p>" in html


def test_runs_that_are_not_there_are_missing_and_counted(folder):
    for run in folder.find(round__rule="mean", attack="none"):
        (folder.path / "runs" / run["run"] / "summary.json").unlink()
    first, second, third = folder.find(round__rule="krum", attack="alie")
    folder.play(first, outcome="drained")
    swapped("key", "f" * 64)(
        folder.path / "runs" / folder.find(round__rule="mean", attack="alie")[0]["run"] / "run.json"
    )
    (folder.path / "runs" / second["run"] / "run.json").unlink()

    page, _, text = rendered(folder)

    for rows in (page.table("round.rule", "attack"), markdown_table(text, "round.rule", "attack")):
        gone, other, partly = rows[0], rows[1], rows[3]
        assert (other["final %"], other["runs"]) == (spread([0.5 + 0.031 * k for k in (4, 5)]), "2 1 of 3 missing")
        assert (gone["final %"], gone["best %"], gone["rounds/s"], gone["diverged"]) == ("-", "-", "-", "-")
        assert gone["runs"] == "- 3 of 3 missing"
        assert (partly["final %"], partly["runs"]) == (f"{100 * (0.5 + 0.031 * 11):.1f}", "1 2 of 3 missing")
    cell = page.table("round.rule \\ attack")[0]["none"]
    assert cell == "- best - 3 of 3 missing"
    outcomes = {row["run"]: row["outcome"] for row in page.table("run", "outcome")}
    assert len(outcomes) == 12
    assert [outcomes[run["run"]] for run in (first, second, third)] == ["interrupted", "not finished", "completed"]
    assert sorted(outcomes.values()) == ["completed"] * 6 + ["interrupted"] + ["not finished"] * 4 + [
        "of another configuration"
    ]
    assert "6 of 12 runs were played to their end, 0 of them diverged, 6 are missing." in text


@pytest.mark.parametrize("renamed", [True, False])
def test_runs_with_one_key_are_one_run(tmp_path, renamed):
    made = Folder(tmp_path / "r", {"attack": {"none": 0, "alie": 1}, "attack.z": {"1": 1, "2": 2}})
    first, second, *attacked = made.runs
    second["key"] = first["key"]
    if renamed:
        second["run"] = first["run"]
    made.write()
    for i, run in enumerate([second, *attacked]):  # under the name of either
        made.play(run, 0.5 + i / 10)

    page, _, text = rendered(made)

    assert [row["final %"] for row in page.table("attack", "attack.z")] == ["50.0", "50.0", "60.0", "70.0"]
    assert [row["run"] for row in page.table("run", "outcome")] == [run["run"] for run in (second, *attacked)]
    assert "3 of 3 runs were played to their end, 0 of them diverged, 0 are missing." in text


def test_a_diverged_run_counts_as_it_ended(tmp_path):
    made = Folder(tmp_path / "r", {"task.seed": {"1": 1, "2": 2}})
    made.play(made.runs[0], 0.9, curve=[[5, 0.5], [10, 0.9], [20, 0.9]])
    made.play(made.runs[1], 0.1, 0.4, outcome="diverged", curve=[[5, 0.4], [7, 0.1]])

    page, _, _ = rendered(made)

    (row,) = page.table("setting")
    assert (row["final %"], row["runs"], row["diverged"]) == (spread([0.9, 0.1]), "2", "1")
    (group,) = groups(Experiment.read(made.path))
    curve = mean_curve(group.runs)
    assert curve.x == (5, 7, 10, 20)
    # at 7 the first run lies on the line from 0.5 to 0.9; from then on the second stays where it ended
    assert curve.mean == pytest.approx((0.45, (0.66 + 0.1) / 2, 0.5, 0.5))
    assert curve.low == pytest.approx((0.4, 0.1, 0.1, 0.1))
    assert curve.high == pytest.approx((0.5, 0.66, 0.9, 0.9))


def test_no_accuracy_and_nan_are_told_apart_from_zero(tmp_path):
    made = Folder(tmp_path / "r", {"round.f": {"1": 1, "2": 2}, "task.seed": {"1": 1, "2": 2}})
    some, nothing, zero, number = made.runs
    made.play(some, 0.8)
    made.play(nothing, None, curve=[[5, None], [10, math.nan]])
    made.play(zero, 0.0)
    made.play(number, math.nan, curve=[[5, 0.3]])

    page, html, _ = rendered(made)

    first, second = page.table("round.f")
    assert first["final %"] == "80.0 1 measured"
    assert second["final %"] == "0.0 1 measured"
    assert [row["final %"] for row in page.table("run")] == ["80.0", "-", "0.0", "-"]
    assert "nan" not in html.split("base64")[0]


@pytest.mark.parametrize("axes", [{}, {"task.seed": {"7": 7}}])
def test_an_experiment_of_a_single_run(tmp_path, axes):
    made = Folder(tmp_path / "r", axes)
    made.play(made.runs[0], 0.912, 0.934)

    page, _, text = rendered(made)

    (row,) = page.table("setting")
    assert (row["final %"], row["best %"], row["runs"]) == ("91.2", "93.4", "1")
    assert "attackers" not in row
    assert "report-1-rounds.svg" in text


def test_nothing_played_yet(tmp_path):
    made = Folder(tmp_path / "r", RULE_ATTACK)

    page, html, _ = rendered(made)

    assert page.fetched == []
    assert "No accuracy has been measured yet." in html


def test_hostile_text_stays_text(tmp_path):
    axes = {
        HOSTILE: {HOSTILE: 1, "_": 2, "$x$": 3, "日本\n\x00": 4},
        "attack": {HOSTILE: None, "__": 1},
    }
    made = Folder(tmp_path / "r", axes, {HOSTILE: {HOSTILE: HOSTILE}, "title": HOSTILE})
    made.record |= dict.fromkeys(("name", "started", "commit", "command", "transport"), HOSTILE)
    made.record |= {"machine": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    made.write()
    for run in made.runs:
        made.play(run)

    page, html, text = rendered(made)

    assert "<script" not in html.lower()
    assert "<script" not in text.lower()
    assert not re.search(r"(?<!\\)!?(?<!\\)\[", text.replace("![Test accuracy", "").replace("![Final and best", ""))
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.fetched)
    for path in made.path.glob("report-*.svg"):
        assert ElementTree.fromstring(path.read_bytes()).tag.endswith("svg")
    label = " ".join(HOSTILE.split())
    assert page.table(label, "attack")[0][label] == label
    assert page.table("varied")[0]["varied"] == label
    for block in text.split("\n\n"):
        if block.startswith("|"):  # a bar in a label begins no cell
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}) == 1


def test_numbers_on_an_axis_make_a_second_figure(tmp_path):
    made = Folder(
        tmp_path / "r",
        {
            "attack.z": {"2": 2, "0.5": 0.5, "auto": "auto", "10": 10.0},
            "round.rule": {"mean": "mean", "krum": "krum"},
            "task.seed": {"1": 1, "2": 2},
        },
    )
    for i, run in enumerate(made.runs):
        if run["labels"]["attack.z"] != "10" or run["labels"]["round.rule"] == "mean":
            made.play(run, 0.1 + i / 50, 0.2 + i / 50)

    page, _, text = rendered(made)

    assert len(page.fetched) == 2
    assert page.alts == ["Test accuracy over rounds", "Final and best test accuracy against attack.z"]
    assert "report-2-attack-z.svg" in text
    assert "1 value (auto)" in text
    experiment = Experiment.read(made.path)
    (plan,) = over_numbers(experiment, groups(experiment))
    assert [name for name, _ in plan.lines] == ["mean", "krum"]
    mean, krum = (against(plan, members, "final") for _, members in plan.lines)
    assert mean.x == (0.5, 2.0, 10.0)
    assert mean.mean == pytest.approx((0.1 + 4.5 / 50, 0.1 + 0.5 / 50, 0.1 + 12.5 / 50))
    assert mean.low == pytest.approx((0.1 + 4 / 50, 0.1, 0.1 + 12 / 50))
    assert [math.isnan(value) for value in krum.mean] == [False, False, True]
    assert against(plan, plan.lines[0][1], "best").mean[0] == pytest.approx(0.2 + 4.5 / 50)


@pytest.mark.parametrize("values", [[1, 2], ["1", "2", "3"], [True, False, 1.0]])
def test_fewer_than_three_numbers_make_none(tmp_path, values):
    made = Folder(tmp_path / "r", {"round.f": {f"label {v!r}": v for v in values}})
    for run in made.runs:
        made.play(run)

    assert len(rendered(made)[0].fetched) == 1


def test_panels_are_attacks_and_lines_the_rest_and_what_has_no_room_is_named(tmp_path):
    axes = {
        "attack": {f"attack-{i}": i if i else None for i in range(14)},
        "round.rule": {f"rule-{i}": str(i) for i in range(10)},
    }
    made = Folder(tmp_path / "r", axes)
    for run in made.runs:
        late = run["labels"]["attack"] == "attack-3"
        made.play(run, attack={"name": "alie", "start_round": 4} if late else None)

    _, html, text = rendered(made)

    experiment = Experiment.read(made.path)
    plan = over_rounds(experiment, groups(experiment))
    assert [panel.title for panel in plan.panels] == [f"attack-{i}" for i in range(12)]
    assert plan.lines == tuple(f"rule-{i}" for i in range(8))
    assert [panel.starts for panel in plan.panels[2:5]] == [(), (4,), ()]
    assert plan.panels[5].groups[7].labels == ("attack-5", "rule-7")
    for words in (
        "2 lines (rule-8; rule-9)",
        "2 panels (attack-12; attack-13)",
        "A vertical line is where the attack starts.",
    ):
        assert words in html
        assert words in text


def test_an_attack_that_starts_late_is_marked_in_the_figure(tmp_path):
    def svg(start):
        made = Folder(tmp_path / str(start), {"round.rule": {"mean": "mean"}})
        made.play(made.runs[0], attack={"name": "alie", "start_round": start}, byzantine=[1], f_real=1)
        _, html, _ = rendered(made)
        assert ("where the attack starts" in html) is (start > 0)
        return (made.path / "report-1-rounds.svg").read_bytes()

    assert svg(4).count(b"stroke: #555555") == svg(0).count(b"stroke: #555555") + 1


def test_lines_differ_without_colour_too():
    assert len(set(COLOURS)) == len(set(map(str, DASHES))) == len(set(MARKERS)) == 8


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"no experiment\.json"):
        render(tmp_path)
    with pytest.raises(OptionError, match=r"no experiment\.json"):
        render(tmp_path / "nowhere")


def cut(path):
    path.write_text(path.read_text()[:-9])


def swapped(key, value):
    def change(path):
        tree = json.loads(path.read_text().splitlines()[0])
        path.write_text(json.dumps({**tree, key: value}))

    return change


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("experiment.json", cut, "not JSON"),
        ("experiment.json", swapped("format", 2), "format 2"),
        ("experiment.json", swapped("runs", [{"run": "../../x", "key": "", "labels": {}}]), "runs.0.run"),
        ("experiment.json", swapped("runs", [{"run": "x", "key": k, "labels": {}} for k in "ab"]), "the same name"),
        ("experiment.json", swapped("axes", [{"key": "a", "labels": ["x"], "values": []}]), "1 labels for 0 values"),
        ("experiment.json", swapped("axes", [{"key": "a", "labels": ["x"], "values": [1]}]), "labels of the axis a"),
        ("experiment.json", swapped("axes", [{"key": "a", "labels": ["x", "x"], "values": [1, 2]}]), "same label"),
        ("summary.json", cut, "damaged"),
        ("summary.json", swapped("outcome", "lost"), "outcome"),
        ("summary.json", swapped("final_accuracy", "0.9"), "final_accuracy"),
        ("run.json", swapped("attack", {"start_round": "4"}), "start_round = '4'"),
        ("rounds.jsonl", cut, "line 4"),
        ("rounds.jsonl", swapped("selected", 3), "line 1: selected"),
        ("rounds.jsonl", lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_a_damaged_file_is_named_in_one_sentence(folder, file, damage, words):
    path = folder.path / file
    if file != "experiment.json":
        path = folder.path / "runs" / folder.runs[-1]["run"] / file
    damage(path)

    with pytest.raises(OptionError) as caught:
        render(folder.path)

    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder.path / "report.html").exists()
