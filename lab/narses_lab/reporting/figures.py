"""The report's figures, as SVG."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from narses_lab.reporting.curves import (
    LINES,
    Curve,
    OverNumbers,
    OverRounds,
    against,
    mean_curve,
    over_numbers,
    over_rounds,
)
from narses_lab.reporting.groups import Group
from narses_lab.reporting.read import Experiment, Played

# Okabe and Ito's palette, with grey for its yellow, which is faint on white; a dash pattern and a marker each: told apart
# without colour too
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#777777")
DASHES: tuple[Any, ...] = (
    "-",
    "--",
    "-.",
    ":",
    (0, (7, 1, 1, 1, 1, 1)),
    (0, (9, 2)),
    (0, (2, 2)),
    (0, (1, 3)),
)
MARKERS = "os^Dv*Xp"
WIDTH = 12.0
PANEL_HEIGHT = 3.4
LONGEST = 60
LOGARITHMIC_FROM = 100.0
"""Ratio of the largest to the smallest number from which an axis is logarithmic."""


@dataclass(frozen=True)
class Drawing:
    """One figure. name: of its file; about: what it shows, for those who do not see it, too; notes: sentences below it."""

    name: str
    about: str
    svg: bytes
    notes: tuple[str, ...]


def drawings(experiment: Experiment, groups: Sequence[Group]) -> list[Drawing]:
    """Accuracy over rounds and over every axis of numbers; none before anything was measured."""
    found = []
    rounds = over_rounds(experiment, groups)
    if rounds is not None:
        members = [run for panel in rounds.panels for group in panel.groups.values() for run in group.runs]
        cross = "A cross is where a run diverged; from there on it counts as it ended."
        start = "A vertical line is where the attack starts."
        notes = (
            "Lines are means over seeds, shades reach from the lowest to the highest seed.",
            *([cross] if any(run.diverged for run in members) else []),
            *([start] if any(panel.starts for panel in rounds.panels) else []),
            *rounds.left_out,
        )
        found.append(Drawing("report-1-rounds.svg", "Test accuracy over rounds", _over_rounds(rounds), notes))
    for number, plan in enumerate(over_numbers(experiment, groups), start=2):
        notes = ("Points are means over seeds, shades reach from the lowest to the highest seed.", *plan.left_out)
        slug = re.sub(r"[^a-z0-9]+", "-", plan.axis.key.lower()).strip("-")
        about = f"Final and best test accuracy against {plan.axis.key}"
        found.append(Drawing(f"report-{number}-{slug}.svg", about, _over_numbers(plan), notes))
    return found


def _over_rounds(plan: OverRounds) -> bytes:
    count = len(plan.panels)
    columns = count if count <= 3 else 2 if count == 4 else 3 if count <= 9 else 4
    rows = -(-count // columns)
    figure, grid = _figure(rows, columns)
    for panel in grid[count:]:
        panel.set_visible(False)
    drawn: dict[int, Any] = {}
    for axes, panel in zip(grid, plan.panels, strict=False):
        for number, group in panel.groups.items():
            drawn[number] = _line(axes, number, mean_curve(group.runs), shade=len(group.runs) > 1)
            _crosses(axes, number, group.runs)
        for start in panel.starts:
            axes.axvline(start, color="#555555", lw=1, ls=(0, (1, 2)))
        axes.set_title(_short(panel.title), fontsize=11, parse_math=False)
    for axes in grid[max(0, count - columns) : count]:
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in grid[:count:columns]:
        axes.set_ylabel("test accuracy, %")
    _legend(figure, drawn, plan.lines)
    return _svg(figure)


def _over_numbers(plan: OverNumbers) -> bytes:
    figure, grid = _figure(1, 2)
    drawn: dict[int, Any] = {}
    values = plan.axis.numbers.values()
    for axes, which in zip(grid, ("final", "best"), strict=True):
        for number, (_, groups) in enumerate(plan.lines):
            curve = against(plan, groups, which)
            seeds = max(len(group.runs) for group in groups)
            drawn[number] = _line(axes, number, curve, shade=seeds > 1, marker=MARKERS[number])
        if min(values) > 0 and max(values) / min(values) >= LOGARITHMIC_FROM:
            axes.set_xscale("log")
        elif all(value.is_integer() for value in values):
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(f"{which} accuracy", fontsize=11)
        axes.set_xlabel(_short(plan.axis.key), parse_math=False)
    grid[0].set_ylabel("test accuracy, %")
    _legend(figure, drawn, [name for name, _ in plan.lines])
    return _svg(figure)


def _figure(rows: int, columns: int) -> tuple[Any, list[Any]]:
    # here, because the import costs a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, PANEL_HEIGHT * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in grid:
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.3)
    return figure, grid


def _line(axes: Any, number: int, curve: Curve, *, shade: bool, marker: str = "") -> Any:
    colour, dashes = COLOURS[number], DASHES[number]
    mean, low, high = ([100 * value for value in values] for values in (curve.mean, curve.low, curve.high))
    if shade:
        axes.fill_between(curve.x, low, high, color=colour, alpha=0.15, lw=0)
    # a single evaluation is no line: show the point
    marker = marker or (MARKERS[number] if len(curve.x) == 1 else "")
    (line,) = axes.plot(curve.x, mean, color=colour, ls=dashes, marker=marker, ms=5, lw=1.8)
    return line


def _crosses(axes: Any, number: int, runs: Sequence[Played]) -> None:
    ends = [run.curve[-1] for run in runs if run.diverged and run.curve]
    axes.plot([after for after, _ in ends], [100 * a for _, a in ends], "x", color=COLOURS[number], ms=8, mew=2)


def _legend(figure: Any, drawn: dict[int, Any], names: Sequence[str]) -> None:
    if len(names) < 2:
        return
    assert len(names) <= LINES
    numbers = sorted(drawn)
    titles = [_short(names[number]) for number in numbers]
    columns = max(1, min(len(titles), int(120 / (max(map(len, titles)) + 8))))
    legend = figure.legend(
        [drawn[number] for number in numbers],
        [str(number) for number in numbers],
        loc="outside lower center",
        ncols=columns,
        handlelength=4,
    )
    # afterwards, because matplotlib drops labels that begin with an underscore, and takes dollars for formulas
    for text, name in zip(legend.get_texts(), titles, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def _short(text: str) -> str:
    """On one line, not too long, and without what has no glyph: labels are the user's."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def _svg(figure: Any) -> bytes:
    import matplotlib as mpl

    svg = io.BytesIO()
    # the same results give the same bytes
    with mpl.rc_context({"svg.hashsalt": "narses"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()
