"""Which lines a figure has, as numbers; nothing here draws. Accuracies are fractions."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from narses_lab.reporting.groups import Group, title
from narses_lab.reporting.read import Axis, Experiment, Played

LINES = 8
PANELS = 12
LEAST_NUMBERS = 3
NAMES = 12


@dataclass(frozen=True)
class Curve:
    """One line: the mean over seeds at every x, and the lowest and highest seed there; NaN where nothing was measured."""

    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """title: "" for the only panel. groups: line number -> its runs. starts: rounds before which an attack is still off."""

    title: str
    groups: dict[int, Group]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class OverRounds:
    """Accuracy over rounds. lines: what each line number stands for; left_out: sentences about what there is no room for."""

    panels: tuple[Panel, ...]
    lines: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class OverNumbers:
    """Accuracy over the numbers of one axis, number `index`. lines: title -> the groups along the axis."""

    axis: Axis
    index: int
    lines: tuple[tuple[str, tuple[Group, ...]], ...]
    left_out: tuple[str, ...]


def over_rounds(experiment: Experiment, groups: Sequence[Group]) -> OverRounds | None:
    """One panel per label of one axis, the attack's if there is one; None before the first evaluation."""
    axes = experiment.varied
    drawn = [group for group in groups if any(run.curve for run in group.runs)]
    if not drawn:
        return None
    across = _panel_axis(axes, drawn)
    lines = list(dict.fromkeys(_others(group, across) for group in drawn))
    number = {line: i for i, line in enumerate(lines[:LINES])}
    panels = []
    for label in [""] if across is None else axes[across].labels:
        here = [group for group in drawn if across is None or group.labels[across] == label]
        if here:
            starts = sorted({run.start_round for group in here for run in group.runs if run.start_round})
            members = {number[line]: group for group in here if (line := _others(group, across)) in number}
            panels.append(Panel("" if across is None else title(axes[across], label), members, tuple(starts)))
    titles = [_line_title(axes, line, across) for line in lines]
    return OverRounds(
        tuple(panels[:PANELS]),
        tuple(titles[:LINES]),
        (*_left_out("line", titles[LINES:]), *_left_out("panel", [panel.title for panel in panels[PANELS:]])),
    )


def over_numbers(experiment: Experiment, groups: Sequence[Group]) -> list[OverNumbers]:
    """For every axis with at least three numbers that have results: one line per combination of the other axes."""
    axes, found = experiment.varied, []
    for index, axis in enumerate(axes):
        drawn = [group for group in groups if group.labels[index] in axis.numbers and group.final is not None]
        if len({group.labels[index] for group in drawn}) < LEAST_NUMBERS:
            continue
        lines: dict[tuple[str, ...], list[Group]] = {}
        for group in drawn:
            lines.setdefault(_others(group, index), []).append(group)
        titled = [(_line_title(axes, line, index), tuple(members)) for line, members in lines.items()]
        words = [label for label in axis.labels if label not in axis.numbers]
        left_out = (*_left_out("line", [name for name, _ in titled[LINES:]]), *_left_out("value", words))
        found.append(OverNumbers(axis, index, tuple(titled[:LINES]), left_out))
    return found


def mean_curve(runs: Sequence[Played]) -> Curve:
    """Over rounds. Between two evaluations a run is where the straight line is, after a divergence where it ended."""
    measured = [run for run in runs if run.curve]
    rounds = sorted({after for run in measured for after, _ in run.curve})
    at = [[value for run in measured if (value := _value(run, after)) is not None] for after in rounds]
    return _curve([float(after) for after in rounds], at)


def against(plan: OverNumbers, groups: Sequence[Group], which: str) -> Curve:
    """Over the numbers of the axis, ascending. which: "final" or "best"."""
    by_label = {group.labels[plan.index]: group.runs for group in groups}
    numbers = sorted(plan.axis.numbers.items(), key=lambda item: item[1])
    at = [
        [value for run in by_label.get(label, ()) if (value := getattr(run, which)) is not None] for label, _ in numbers
    ]
    return _curve([number for _, number in numbers], at)


def _curve(x: list[float], at: list[list[float]]) -> Curve:
    nan = math.nan  # a gap in the line
    return Curve(
        tuple(x),
        tuple(statistics.fmean(values) if values else nan for values in at),
        tuple(min(values, default=nan) for values in at),
        tuple(max(values, default=nan) for values in at),
    )


def _value(run: Played, after: int) -> float | None:
    i = bisect_left(run.curve, after, key=lambda point: point[0])
    if i == len(run.curve):
        return run.curve[-1][1] if run.diverged else None
    t1, a1 = run.curve[i]
    if t1 == after:
        return a1
    if i == 0:
        return None
    t0, a0 = run.curve[i - 1]
    return a0 + (a1 - a0) * (after - t0) / (t1 - t0)


def _panel_axis(axes: Sequence[Axis], groups: Sequence[Group]) -> int | None:
    """The attack's axis, else the last one with which nothing has to be left out; None for a single panel."""
    if len(axes) < 2:
        return None
    order = range(len(axes))[::-1]

    def fits(index: int) -> bool:
        lines, panels = {_others(group, index) for group in groups}, {group.labels[index] for group in groups}
        return len(lines) <= LINES and len(panels) <= PANELS

    attack = next((i for i in order if axes[i].key == "attack"), None)
    return next(filter(fits, order), order[0]) if attack is None else attack


def _others(group: Group, without: int | None) -> tuple[str, ...]:
    """The labels of all axes but number `without`."""
    return tuple(label for i, label in enumerate(group.labels) if i != without)


def _line_title(axes: Sequence[Axis], line: tuple[str, ...], without: int | None) -> str:
    others = [axis for i, axis in enumerate(axes) if i != without]
    return ", ".join(title(axis, label) for axis, label in zip(others, line, strict=True)) or "all"


def _left_out(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    many = "s" if len(names) > 1 else ""
    return [f"Left out of the figure: {len(names)} {what}{many} ({'; '.join(names[:NAMES])}{more})."]
