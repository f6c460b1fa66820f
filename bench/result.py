"""The one form in which a benchmark leaves its figures: docs/results/<name>.json for programs, <name>.md for people."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
LIBRARIES = ("narses", "torch", "numpy", "grpcio", "protobuf", "blake3", "llvmlite")


@dataclass(frozen=True)
class Figure:
    """One measured number. low, high: the smallest and largest repetition; at_least, at_most: what was aimed at."""

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @classmethod
    def median(cls, name: str, values: Sequence[float], unit: str, **aims: float) -> Figure:
        """The median of repetitions, with their range."""
        return cls(name, statistics.median(values), unit, min(values), max(values), **aims)

    @property
    def reached(self) -> bool | None:
        """Whether the aim was reached; None where there was none."""
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )


@dataclass(frozen=True)
class Result:
    """A benchmark's figures and what must be known to read them. notes: one sentence each."""

    name: str
    title: str
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {
            "name": self.name,
            "title": self.title,
            "figures": [{**asdict(figure), "reached": figure.reached} for figure in self.figures],
            "notes": list(self.notes),
            "command": command(),
            "machine": machine(),
            "versions": versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
        }

    def write(self, folder: Path = RESULTS) -> Path:
        """Write both files; the path of the Markdown one."""
        folder.mkdir(parents=True, exist_ok=True)
        tree = self.as_dict()
        (folder / f"{self.name}.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        path = folder / f"{self.name}.md"
        path.write_text(markdown(tree), encoding="utf-8")
        return path


def markdown(tree: dict[str, Any]) -> str:
    """The same for people; `tree` is what the JSON file holds."""
    machine_, versions_ = tree["machine"], tree["versions"]
    lines = [f"# {tree['title']}", "", "| figure | median | range | aim | |", "|---|---:|---|---|---|"]
    for figure in tree["figures"]:
        span = "" if figure["low"] is None else f"{_short(figure['low'])} - {_short(figure['high'])}"
        aims = (("at least", figure["at_least"]), ("at most", figure["at_most"]))
        aim = ", ".join(f"{word} {_short(value)}" for word, value in aims if value is not None)
        reached = {None: "", True: "reached", False: "**missed**"}[figure["reached"]]
        lines.append(f"| {figure['name']} | {_short(figure['value'])} {figure['unit']} | {span} | {aim} | {reached} |")
    lines += ["", *(f"- {note}" for note in tree["notes"]), ""]
    lines += [
        f"`{tree['command']}` on {tree['date']}, commit {tree['commit']}.",
        f"{machine_['cores']} cores, {machine_['cpu']}, {machine_['memory_gb']} GB, Linux {machine_['kernel']}, "
        f"load average {machine_['load']} at the end; "
        + ", ".join(f"{name} {version}" for name, version in versions_.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def command() -> str:
    """How this process was started, as one would type it."""
    program = Path(sys.argv[0])
    name = "python -m bench" if program.name == "__main__.py" else f"python -m bench.{program.stem}"
    return shlex.join([*name.split(), *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """What it ran on; load is the one-minute average: others may have used the cores at the same time."""
    cpu = _first("/proc/cpuinfo", "model name") or platform.machine()
    memory = _first("/proc/meminfo", "MemTotal")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(memory.split()[0]) / 1e6, 1) if memory else None,
        "kernel": platform.release(),
        "load": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Python and the libraries on the way of an update."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in LIBRARIES}}


def commit() -> str:
    """The checked-out commit, with "+" where files differ from it; "unknown" outside a repository."""
    try:
        text = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return text + ("+" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _first(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
