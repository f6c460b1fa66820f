"""`narses run` as a user types it: both transports, interrupted and taken up again, asked twice, asked wrongly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

NARSES = Path(sys.executable).parent / "narses"
SECONDS = 110

EXPERIMENT = """
name = "tried"
device = "cpu"

[task]
model = "softmax"
dataset = "digits"
batch = 16

[round]
n = 9
f = 2
rounds = 12
rule = "krum"

[optimizer]
learning_rate = 0.5

[evaluate]
every = 4

[matrix]
attack = [
  "none",
  { name = "alie", z = 1.5, start_round = 4 },
  { name = "ipm", epsilon = 10.0, where = "all", members = "random-per-round", start_round = 4 },
]
"""


def narses(*arguments: str | Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [NARSES, *arguments], capture_output=True, text=True, timeout=SECONDS, check=False, **settings
    )


def summaries(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("runs/*/summary.json")}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tried.toml"
    path.write_text(EXPERIMENT)
    return path


def test_daemons_and_one_process_give_the_same_parameters(file: Path, tmp_path: Path) -> None:
    done = narses("run", file, "--output", tmp_path / "grpc")
    assert done.returncode == 0, done.stdout + done.stderr
    alone = narses("run", file, "--transport", "local", "--output", tmp_path / "local", "--set", "daemons=3")
    assert alone.returncode == 0, alone.stdout + alone.stderr

    over_grpc, local = summaries(tmp_path / "grpc"), summaries(tmp_path / "local")
    assert len(over_grpc) == 3
    assert len({summary["digest"] for summary in over_grpc.values()}) == 3, "every attack changed what was learnt"
    for run, summary in over_grpc.items():
        assert (summary["digest"], summary["accuracy"]) == (local[run]["digest"], local[run]["accuracy"])
        lines = [(tmp_path / where / "runs" / run / "rounds.jsonl").read_text() for where in ("grpc", "local")]
        chosen = [[json.loads(line)["selected"] for line in text.splitlines()] for text in lines]
        assert chosen[0] == chosen[1]
        assert len(chosen[0]) == 12
    assert "about 0:" in done.stdout, "it says how long it will take"
    assert str(tmp_path / "grpc" / "report.html") in done.stdout

    again = narses("run", file, "--output", tmp_path / "grpc")
    assert again.returncode == 0
    assert "nothing to play: every run is done" in again.stdout
    assert summaries(tmp_path / "grpc") == over_grpc


@pytest.mark.parametrize("transport", ["grpc", "local"])
def test_interrupted_it_keeps_what_is_done_and_goes_on(file: Path, tmp_path: Path, transport: str) -> None:
    # So many rounds that a line of progress comes in the middle of the second run.
    rounds = {"grpc": 300, "local": 2500}[transport]
    values = (f"round.rounds={rounds}", "seeds=2", 'matrix.attack=["none"]')
    sets = ["--transport", transport, *(word for value in values for word in ("--set", value))]
    first, whole = [*sets, "--set", "checkpoint.every=1000"], tmp_path / "whole"
    process = subprocess.Popen(
        [NARSES, "run", file, "--output", tmp_path / "out", *first], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    first_is_done = False
    with process:
        for line in process.stdout:
            first_is_done |= "[1 of 2]" in line
            if first_is_done and "seed=2" in line and "round" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130
    assert "interrupted: 1 of 2 runs are done; the same command goes on" in rest

    outcomes = {name: summary["outcome"] for name, summary in summaries(tmp_path / "out").items()}
    assert sorted(outcomes.values()) == ["completed", "drained"]
    stopped = next(summary for summary in summaries(tmp_path / "out").values() if summary["outcome"] == "drained")
    assert 0 < stopped["rounds"] < rounds

    assert narses("run", file, "--output", tmp_path / "out", *first).returncode == 0
    assert narses("run", file, "--output", whole, *sets, "--transport", "local").returncode == 0
    resumed, expected = summaries(tmp_path / "out"), summaries(whole)
    for run, summary in expected.items():
        assert (resumed[run]["outcome"], resumed[run]["digest"]) == ("completed", summary["digest"])
        lines = (tmp_path / "out" / "runs" / run / "rounds.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == list(range(rounds))


def test_check_says_what_would_be_played_and_starts_nothing(file: Path, tmp_path: Path) -> None:
    done = narses("run", file, "--check", "--set", "round.n=7", "--set", "seeds=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: krum with f = 2 needs 7 of n = 7 updates: 1 silent workers stop this run" in done.stdout
    assert "ok: 6 run(s), 72 rounds in all" in done.stdout
    assert "attack: none, alie, ipm" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["tried.toml"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["run", "nowhere.toml"], "nowhere.toml: no such configuration file"),
        (
            ["run", "tried.toml", "--set", "round.n=5"],
            "attack = none, task.seed = 1: round: Krum with f = 2 needs n >= 7",
        ),
        (["run", "tried.toml", "--set", "task.dataset=mnist", "--set", "data_dir=."], "data set 'mnist'"),
        (["run", "tried.toml", "--output", "."], "--output .: the folder holds something else than an experiment"),
        (["run", "tried.toml", "--transport", "carrier-pigeon"], "tried.toml: transport = 'carrier-pigeon'"),
        (["report", "."], "."),
        (["list", "colours"], "colours"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(file: Path, arguments: list[str], why: str) -> None:
    local = ["--transport", "local"] if arguments[0] == "run" and "--transport" not in arguments else []
    done = narses(*arguments, *local, cwd=file.parent)
    assert done.returncode == 2
    assert done.stderr.startswith("error: "), done.stderr
    assert why in done.stderr
    assert done.stderr.count("\n") == 1
