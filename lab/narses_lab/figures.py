"""The accuracy curves, drawn once for plot.png and once, as SVG, for the report."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from narses_lab.demo import ATTACKS, RULES
from narses_lab.results import Result

# Okabe and Ito's palette, and a dash pattern each: told apart without colour too
STYLES = {"mean": ("#D55E00", "-"), "median": ("#0072B2", "--"), "krum": ("#009E73", "-."), "bulyan": ("#CC79A7", "-")}


def curves(results: Sequence[Result], png: Path) -> bytes:
    """One panel per attack, one line per rule: the mean over seeds, shaded from the lowest to the highest.

    Writes `png` and returns the same figure as SVG.
    """
    # here, because the import costs a second that the daemons need at the start
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(ATTACKS), sharey=True, squeeze=False)[0]
    for panel, attack in zip(panels, ATTACKS.values(), strict=True):
        for rule, title in RULES.items():
            same = [r for r in results if (r.cell.rule, r.cell.attack) == (rule, attack.name)]
            if same:
                _line(panel, same, title, *STYLES[rule])
        panel.set_title(attack.title, fontsize=11)
        panel.set_xlabel("round")
        panel.set_ylim(0, 100)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend(loc="lower right")
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, dpi=110)
    return svg.getvalue()


def _line(panel: Any, same: Sequence[Result], title: str, colour: str, dashes: str) -> None:
    at: dict[int, list[float]] = {}
    for result in same:
        for after, accuracy in result.curve:
            at.setdefault(after, []).append(100 * accuracy)  # a run that diverged has no later points
    rounds = sorted(at)
    panel.fill_between(
        rounds, [min(at[t]) for t in rounds], [max(at[t]) for t in rounds], color=colour, alpha=0.15, lw=0
    )
    panel.plot(rounds, [statistics.fmean(at[t]) for t in rounds], color=colour, ls=dashes, lw=1.8, label=title)
