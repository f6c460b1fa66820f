"""The HTML report: one file that opens without a network, and whose every number comes from the results it is given."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from narses_lab.demo import ATTACKS, BYZANTINE, RULES, WORKERS
from narses_lab.results import Result, Summary, Verdict

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; } .quiet, caption, small { color: #5a5a5a; }
table { border-collapse: collapse; } caption { caption-side: bottom; text-align: left; padding-top: .4rem; }
th, td { border-bottom: 1px solid #ddd; padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } td.low { background: #fde6dc; }
.PASS { color: #00704f; font-weight: 600; } .FAIL { color: #b3261e; font-weight: 600; } .SKIP { color: #5a5a5a; }
img { width: 100%; height: auto; } pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; }
.wide { overflow-x: auto; } @media print { details > * { display: block; } }
"""


@dataclass(frozen=True)
class Report:
    """Everything that the page shows. started: ISO 8601; seconds, first_accuracy: since the command was entered."""

    started: str
    seconds: float
    first_accuracy: float | None
    table: dict[tuple[str, str], Summary]
    verdicts: Sequence[Verdict]
    results: Sequence[Result]
    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    commands: Sequence[str]

    @property
    def failed(self) -> bool:
        """Whether a margin was missed."""
        return any(verdict.passed is False for verdict in self.verdicts)

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return {
            "passed": not self.failed,
            "verdicts": [
                {"claim": v.claim, "measured": v.measured, "verdict": v.word, "passed": v.passed} for v in self.verdicts
            ],
            "started": self.started,
            "seconds": round(self.seconds, 2),
            "first_accuracy_seconds": None if self.first_accuracy is None else round(self.first_accuracy, 2),
            "table": [
                {
                    "rule": s.rule,
                    "attack": s.attack,
                    "seeds": s.seeds,
                    "final_accuracy": {"mean": s.final.mean, "std": s.final.std},
                    "best_accuracy": {"mean": s.best.mean, "std": s.best.std},
                    "diverged": s.diverged,
                    "liars_chosen": s.liars_chosen,
                }
                for s in self.table.values()
            ],
            "runs": [result.table() for result in self.results],
            "settings": self.settings,
            "machine": self.machine,
            "versions": self.versions,
            "commands": list(self.commands),
        }

    def html(self, figure_svg: bytes) -> str:
        """The page, with the figure inside."""
        figure = base64.b64encode(figure_svg).decode("ascii")
        return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Narses demo</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Narses demo</h1>
<p class="quiet">{escape(self.started)}, {self.seconds:.0f} s, {len(self.results)} runs</p>
<p>{WORKERS} logical workers train one model on scikit-learn's handwritten digits through a parameter server. In the
attacked runs {BYZANTINE} of the {WORKERS} updates of every round are false. Server, two honest daemons, an adversary
daemon and a man-in-the-middle proxy were separate processes that spoke gRPC over loopback.</p>
<h2>What was to be shown</h2>
{self._verdicts()}
<h2>Test accuracy</h2>
{self._accuracies()}
<p><img alt="Test accuracy over rounds, one panel per attack, one line per rule"
src="data:image/svg+xml;base64,{figure}"></p>
<p class="quiet">Lines are means over seeds, shades reach from the lowest to the highest seed.</p>
{self._chosen()}
<h2>Settings</h2>
{_rows(self.settings)}
<h2>Where and with what</h2>
{_rows({**self.machine, **self.versions})}
<h2>What was run</h2>
<p>In this folder, all at the same time; the configurations are under config/, the logs under logs/, the server's results
under runs/. The server and the proxy took free ports, which the others' configurations name.</p>
<pre>{escape(chr(10).join(self.commands))}</pre>
<h2>Every run</h2>
{self._runs()}
</body>
</html>
"""

    def _verdicts(self) -> str:
        rows = ((f'<span class="{v.word}">{v.word}</span>', escape(v.claim), escape(v.measured)) for v in self.verdicts)
        return _table(
            ("", "fixed before the runs", "measured"),
            rows,
            "On final test accuracy, averaged over seeds. SKIP: the runs to compare were not played.",
        )

    def _accuracies(self) -> str:
        rows = []
        for rule, title in RULES.items():
            row = [escape(title)]
            for attack in ATTACKS:
                summary = self.table.get((rule, attack))
                row.append("" if summary is None else _accuracy(summary))
            if any(row[1:]):
                rows.append(row)
        seeds = max((s.seeds for s in self.table.values()), default=0)
        spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
        return _table(
            ("rule", *(escape(attack.title) for attack in ATTACKS.values())),
            rows,
            f"Final accuracy, after the last round, and best of all evaluations, in %: {spread}.",
        )

    def _chosen(self) -> str:
        shares = [
            f"{RULES[s.rule]} {100 * s.liars_chosen:.0f} %"
            for s in self.table.values()
            if s.attack == "alie" and s.liars_chosen is not None
        ]
        if not shares:
            return ""
        return (
            f"<p>Of the updates chosen under ALIE, those of the three lying workers were: {', '.join(shares)} "
            f"(three of fifteen are {100 * BYZANTINE / WORKERS:.0f} %).</p>"
        )

    def _runs(self) -> str:
        rows = (
            (
                escape(r.cell.name),
                escape(r.outcome),
                _number(f"{100 * r.final:.1f}"),
                _number(f"{100 * r.best:.1f}"),
                _number(str(r.best_round)),
                _number(str(r.rounds)),
                _number(f"{r.rounds_per_second:.0f}"),
                _number(str(r.refused)),
                f"<code>{escape(r.digest[:16])}</code>",
            )
            for r in self.results
        )
        heads = (
            "run",
            "outcome",
            "final %",
            "best %",
            "at round",
            "rounds",
            "rounds/s",
            "refused",
            "parameters' digest",
        )
        table = _table(heads, rows, "refused: updates that the server did not accept. digest: its first 16 digits.")
        return f"<details><summary>{len(self.results)} runs</summary>{table}</details>"


def _accuracy(summary: Summary) -> str:
    diverged = f"<br><small>{summary.diverged} of {summary.seeds} diverged</small>" if summary.diverged else ""
    return f"<strong>{summary.final}</strong><br><small>best {summary.best}</small>{diverged}"


def _number(text: str) -> str:
    return f'<div style="text-align: right">{escape(text)}</div>'


def _rows(values: dict[str, Any]) -> str:
    rows = (
        (escape(key.replace("_", " ")), escape(value if isinstance(value, str) else json.dumps(value)))
        for key, value in values.items()
    )
    return _table((), rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """Cells are HTML."""
    head = f"<thead><tr>{''.join(f'<th>{cell}</th>' for cell in heads)}</tr></thead>" if heads else ""
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    below = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{below}{head}<tbody>\n{body}\n</tbody></table></div>'
