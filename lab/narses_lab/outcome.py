"""The end of the demo: results read, judged, written down, shown."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from narses_lab import demo as plan
from narses_lab.demo import ATTACKS, RULES, Demo
from narses_lab.figures import curves
from narses_lab.live import Board
from narses_lab.machine import machine, versions
from narses_lab.report import Report
from narses_lab.results import Result, Summary, summarise, verdicts

COLOURS = {"PASS": "green", "FAIL": "bold red", "SKIP": "yellow"}


def write(demo: Demo, folder: Path, board: Board, commands: Sequence[str], started: datetime) -> Report:
    """Read the runs under `folder` and put summary.json, plot.png and report.html beside them."""
    results = [Result.read(cell, folder / "runs") for cell in demo.cells()]
    svg = curves(results, folder / "plot.png")
    table = summarise(results)
    report = Report(
        started=started.isoformat(timespec="seconds"),
        seconds=time.monotonic() - board.begun,
        first_accuracy=board.first_accuracy,
        table=table,
        verdicts=verdicts(table),
        results=results,
        settings=settings(demo),
        machine=machine(),
        versions=versions(),
        commands=commands,
    )
    (folder / "report.html").write_text(report.html(svg), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(report.summary(), indent=2) + "\n", encoding="utf-8")
    return report


def settings(demo: Demo) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    return {
        "workers": plan.WORKERS,
        "declared_byzantine_f": plan.BYZANTINE,
        "daemons": f"honest-a {plan.HONEST['honest-a']} and honest-b {plan.HONEST['honest-b']} behind the proxy, "
        f"adversary {plan.ADVERSARY}",
        "rules": list(demo.rules),
        "attacks": {attack.name: attack.table for attack in ATTACKS.values() if attack.table},
        "seeds": demo.seeds,
        "rounds": demo.rounds,
        "data": plan.DATASET,
        "model": plan.MODEL,
        "partition": "shards",
        "batch_per_worker": plan.BATCH,
        "learning_rate": plan.LEARNING_RATE,
        "momentum": plan.MOMENTUM,
        "margins_in_points": {"collapse": plan.COLLAPSE_POINTS, "close": plan.CLOSE_POINTS},
    }


def show(report: Report, folder: Path, console: Console) -> None:
    """The table, the verdicts, and where everything is."""
    seeds = max(summary.seeds for summary in report.table.values())
    spread = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    table = Table(title=f"test accuracy in %{spread}", title_justify="left")
    table.add_column("rule")
    for attack in ATTACKS.values():
        table.add_column(attack.title, justify="right")
    for rule in (rule for rule in RULES if (rule, "none") in report.table):
        table.add_row(RULES[rule], *(_cell(report.table[rule, attack]) for attack in ATTACKS), end_section=True)
    console.print(table)
    for verdict in report.verdicts:
        console.print(f"[{COLOURS[verdict.word]}]{verdict.word}[/]  {verdict.claim}")
        console.print(f"      {verdict.measured}")
    first = "" if report.first_accuracy is None else f"first accuracy after {report.first_accuracy:.1f} s, "
    console.print(f"\n{first}everything after {report.seconds:.1f} s; written to {folder}")
    console.print(f"  {folder / 'report.html'}", soft_wrap=True)
    for name in ("plot.png", "summary.json"):
        console.print(f"  {folder / name}", soft_wrap=True)


def _cell(summary: Summary) -> str:
    diverged = f"\n{summary.diverged} of {summary.seeds} diverged" if summary.diverged else ""
    return f"{summary.final}\nbest {summary.best}{diverged}"
