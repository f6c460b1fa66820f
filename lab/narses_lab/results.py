"""What the runs left behind, what it amounts to, and whether the margins were met. Accuracies are fractions, margins points."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from narses_lab.demo import ADVERSARY_IDS, ATTACKS, CLOSE_POINTS, COLLAPSE_POINTS, ROBUST, RULES, Cell
from narses_lab.errors import DaemonError


@dataclass(frozen=True)
class Result:
    """One run.

    final, best: test accuracy. curve: (rounds done, accuracy) of every evaluation. refused: updates that the server did
    not accept. liars_chosen: of the updates that the rule used whole, the share from workers 12-14; None for a rule
    that gives every update a say.
    """

    cell: Cell
    outcome: str
    rounds: int
    rounds_per_second: float
    seconds: float
    final: float
    best: float
    best_round: int
    curve: tuple[tuple[int, float], ...]
    digest: str
    refused: int
    liars_chosen: float | None

    @classmethod
    def read(cls, cell: Cell, runs: Path) -> Result:
        """From the server's files under `runs`/<run name>; DaemonError if the run is not all there."""
        folder = runs / cell.name
        try:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise DaemonError(f"run {cell.name}: its results in {folder} cannot be read ({error})") from None
        if summary["final_accuracy"] is None or summary["outcome"] not in ("completed", "diverged"):
            raise DaemonError(f"run {cell.name} was not played to its end: outcome {summary['outcome']!r}")
        chosen = [worker for line in lines for worker in line.get("selected") or ()]
        return cls(
            cell=cell,
            outcome=summary["outcome"],
            rounds=summary["rounds"],
            rounds_per_second=summary["rounds_per_second"],
            seconds=summary["seconds"],
            final=summary["final_accuracy"],
            best=summary["best_accuracy"],
            best_round=summary["best_round"],
            curve=tuple((after, accuracy) for after, accuracy in summary["accuracy"]),
            digest=summary["digest"],
            refused=sum(len(line.get("refused") or ()) for line in lines),
            liars_chosen=sum(worker in ADVERSARY_IDS for worker in chosen) / len(chosen) if chosen else None,
        )

    def table(self) -> dict[str, Any]:
        """For summary.json."""
        return {"run": self.cell.name, **asdict(self.cell), **{k: v for k, v in asdict(self).items() if k != "cell"}}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; std is None for a single one."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """`values`: one per seed, at least one."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {100 * self.std:.1f}"
        return f"{100 * self.mean:.1f}{spread}"


@dataclass(frozen=True)
class Summary:
    """One cell of the table rule x attack, over seeds."""

    rule: str
    attack: str
    final: Spread
    best: Spread
    seeds: int
    diverged: int
    liars_chosen: float | None


def summarise(results: Sequence[Result]) -> dict[tuple[str, str], Summary]:
    """(rule, attack) -> its summary, for every pair that was played, in the order of RULES and ATTACKS."""
    table = {}
    for rule in RULES:
        for attack in ATTACKS:
            same = [r for r in results if (r.cell.rule, r.cell.attack) == (rule, attack)]
            if same:
                chosen = [r.liars_chosen for r in same if r.liars_chosen is not None]
                table[rule, attack] = Summary(
                    rule=rule,
                    attack=attack,
                    final=Spread.of([r.final for r in same]),
                    best=Spread.of([r.best for r in same]),
                    seeds=len(same),
                    diverged=sum(r.outcome == "diverged" for r in same),
                    liars_chosen=statistics.fmean(chosen) if chosen else None,
                )
    return table


@dataclass(frozen=True)
class Verdict:
    """One margin: what was fixed beforehand, what was measured. passed is None where what it compares was not played."""

    claim: str
    measured: str
    passed: bool | None

    @property
    def word(self) -> str:
        """PASS, FAIL or SKIP."""
        return {True: "PASS", False: "FAIL", None: "SKIP"}[self.passed]


def verdicts(table: dict[tuple[str, str], Summary]) -> list[Verdict]:
    """Both margins, judged on final test accuracy averaged over seeds. A run that diverged counts as it ended."""
    return [_collapse(table), _defence(table)]


def _collapse(table: dict[tuple[str, str], Summary]) -> Verdict:
    claim = f"the mean under IPM ends at least {COLLAPSE_POINTS:.0f} points below the mean without attack"
    clean, attacked = table.get(("mean", "none")), table.get(("mean", "ipm"))
    if clean is None or attacked is None:
        return Verdict(claim, "the mean was not played", None)
    before, after = 100 * clean.final.mean, 100 * attacked.final.mean
    lost = before - after
    measured = f"{before:.1f} % without attack, {after:.1f} % under IPM: {lost:.1f} points lost"
    return Verdict(claim, measured, lost >= COLLAPSE_POINTS)


def _defence(table: dict[tuple[str, str], Summary]) -> Verdict:
    claim = (
        f"some robust rule ends, under every attack, at most {CLOSE_POINTS:.0f} points below the mean without attack"
    )
    clean = table.get(("mean", "none"))
    lost = {
        rule: max(100 * (clean.final.mean - table[rule, attack].final.mean) for attack in ATTACKS if attack != "none")
        for rule in ROBUST
        if clean is not None and (rule, "none") in table
    }
    if not lost:
        return Verdict(claim, "the mean or every robust rule was not played", None)
    each = ", ".join(f"{RULES[rule]} {_points(points)}" for rule, points in lost.items())
    return Verdict(claim, f"at its worst attack: {each}", min(lost.values()) <= CLOSE_POINTS)


def _points(lost: float) -> str:
    return f"{lost:.1f} points below" if lost >= 0 else f"{-lost:.1f} points above"
