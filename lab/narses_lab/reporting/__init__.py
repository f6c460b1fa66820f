"""The report on an experiment: from a results folder to report.html and report.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from narses_lab.errors import OptionError
from narses_lab.reporting.html import html
from narses_lab.reporting.markdown import markdown
from narses_lab.reporting.page import page
from narses_lab.reporting.read import Experiment
from narses_lab.reporting.tables import Table

__all__ = ["Experiment", "Rendered", "Table", "render"]


@dataclass(frozen=True)
class Rendered:
    """What was written, and the table that says it all. The Markdown refers to report-*.svg beside it, the HTML to nothing."""

    html: Path
    markdown: Path
    results: Table


def render(folder: Path) -> Rendered:
    """Write report.html, report.md and report-*.svg into `folder`, from the results there alone.

    May be called while the experiment goes on: what is not finished is listed as missing. OptionError if `folder` holds no
    results, a file there is damaged, or nothing can be written there.
    """
    report = page(Experiment.read(folder))
    files = {drawing.name: drawing.svg for drawing in report.drawings}
    files["report.md"] = markdown(report).encode("utf-8", "replace")
    files["report.html"] = html(report).encode("utf-8", "replace")
    for name, content in files.items():
        partial = folder / f"{name}.partial"
        try:
            partial.write_bytes(content)
            partial.replace(folder / name)
        except OSError as error:
            raise OptionError(
                f"{folder / name}: cannot be written ({error.strerror}); make the folder writable"
            ) from None
    return Rendered(folder / "report.html", folder / "report.md", report.sections[0].tables[0])
