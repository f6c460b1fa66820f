"""A demo of one rule and one seed, as a user would start it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

NARSES = Path(sys.executable).parent / "narses"


def test_a_small_demo_from_the_command_line_to_the_report(tmp_path):
    folder = tmp_path / "out"
    command = [NARSES, "demo", "--output", folder, "--seeds", "1", "--rounds", "20", "--rule", "mean"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert [v["verdict"] for v in summary["verdicts"]] == ["PASS", "SKIP"]
    assert [(r["run"], r["rounds"], r["refused"]) for r in summary["runs"]] == [
        ("mean/none/seed-1", 20, 0),
        ("mean/alie/seed-1", 20, 0),
        ("mean/ipm/seed-1", 20, 0),
    ]
    assert len({r["digest"] for r in summary["runs"]}) == 3  # both attacks changed what was learnt
    assert "final accuracy" in done.stdout
    assert str(folder / "report.html") in done.stdout
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--rule", "mode"], "--rule mode: expected one of mean, median, krum, bulyan"),
        (["--output", "."], "--output .: the folder is not empty"),
    ],
)
def test_a_wrong_option_is_one_sentence(tmp_path, arguments, why):
    (tmp_path / "something").touch()

    done = subprocess.run(
        [NARSES, "demo", *arguments], capture_output=True, text=True, timeout=30, check=False, cwd=tmp_path
    )

    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {why}")
    assert done.stderr.count("\n") == 1


def test_the_version():
    done = subprocess.run([NARSES, "--version"], capture_output=True, text=True, timeout=30, check=True)

    assert done.stdout.startswith("narses 0.")
