"""Whole experiments through `narses run`, both transports: python -m bench experiment [--rules mean,...] [--repetitions 3]

ALIE on MNIST (51 workers, 12 of them corrupted, batch 83, 150 rounds, evaluated every 5): seconds from the first round to the
result. CNN-S on CIFAR-10 (51 workers, batch 128): a round beside its gradients alone, measured in turn in one process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from bench import gradients
from bench.result import Figure, Result
from narses import datasets
from narses.errors import DataError
from narses.rpc.allocator import keep_large_blocks
from narses_lab.experiment.cells import cells_of
from narses_lab.experiment.config import ExperimentConfig
from narses_lab.experiment.local import LocalRun, Setup

RULES = ("mean", "median", "trimmed-mean", "mean-around-median", "krum", "bulyan")
AIMS = {"local": 7.5, "grpc": 10.0}
CNN_ROUNDS = 6
SECONDS = 900.0

ALIE = """
name = "alie"
device = "cpu"
daemons = {daemons}

[task]
model = "mlp"
dataset = {mnist}
batch = 83

[round]
n = 51
f = 12
rounds = 150

[optimizer]
learning_rate = 0.1
fading = 10000
momentum = 0.9
l2 = 1e-4

[evaluate]
every = 5

[attack]
name = "alie"
z = 1.5

[matrix]
round.rule = [{rules}]
"""


def alie(folder: Path, transport: str, rules: tuple[str, ...], mnist: str) -> dict[str, float]:
    """rule -> seconds from its first round to its summary, start-up left out."""
    file = folder / f"{transport}.toml"
    # Locally threads; as daemons two honest ones beside the adversary's.
    file.write_text(
        ALIE.format(daemons=2, mnist=mnist, rules=", ".join(f'"{rule}"' for rule in rules)), encoding="utf-8"
    )
    command = [sys.executable, "-c", "from narses_lab.app import main; main()", "run", str(file)]
    subprocess.run([*command, "--transport", transport, "--output", str(folder / transport)], check=True, timeout=SECONDS,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    moments: dict[str, dict[str, float]] = {}
    for log in (folder / transport / "logs").glob("*.log"):
        for line in log.read_text(encoding="utf-8").splitlines():
            event = _event(line)
            if event.get("event") in ("run started", "run finished"):
                at = datetime.fromisoformat(event["timestamp"]).timestamp()
                moments.setdefault(event["run"], {})[event["event"]] = at
    runs = json.loads((folder / transport / "experiment.json").read_text(encoding="utf-8"))["runs"]
    found = {}
    for run in runs:
        lines = (folder / transport / "runs" / run["run"] / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        rounds = [json.loads(line)["seconds"] for line in lines]
        whole = moments[run["run"]]["run finished"] - moments[run["run"]]["run started"]
        found[run["labels"]["round.rule"]] = whole - max(0.0, rounds[0] - statistics.median(rounds))
    return found


def cnn(folder: Path, dataset: str, repetitions: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds a round of the gradients alone, of the run, and of the run with evaluation every 5, measured in turn."""
    keep_large_blocks()
    torch.set_num_threads(1)
    case = gradients.Case("cnn-s", gradients.CIFAR, 128, gradients.N)
    floors, bare, evaluated = [], [], []
    for number in range(repetitions):
        floors.append(1 / statistics.median(gradients.floor(case, 2.0)))
        for evaluate, found in ((None, bare), ({"every": 5}, evaluated)):
            tree: dict[str, Any] = {
                "name": "cnn",
                "task": {"model": "cnn-s", "dataset": json.loads(dataset), "batch": 128},
                "round": {"n": 51, "f": 12, "rule": "mean", "rounds": CNN_ROUNDS},
                "optimizer": {"learning_rate": 0.1, "momentum": 0.9},
                "evaluate": evaluate,
            }
            (cell,) = cells_of(ExperimentConfig.of({k: v for k, v in tree.items() if v is not None}))
            setup = Setup(folder / f"{number}-{evaluate is not None}", threads=gradients.THREADS)
            summary = asyncio.run(LocalRun(cell, setup).play())
            found.append(1 / summary["rounds_per_second"])
    return floors, bare, evaluated


def main(arguments: list[str]) -> Result:
    """Parse, measure."""
    parser = argparse.ArgumentParser(prog="python -m bench experiment", description="narses run, whole")
    parser.add_argument("--rules", default=",".join(RULES), help="names with commas between")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args(arguments)
    rules = tuple(options.rules.split(","))
    mnist, cifar, notes = _data()
    seconds: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for repetition in range(options.repetitions):
            for transport in AIMS:
                folder = Path(name) / str(repetition)
                folder.mkdir(exist_ok=True)
                for rule, value in alie(folder, transport, rules, mnist).items():
                    seconds.setdefault((transport, rule), []).append(value)
        floors, bare, evaluated = cnn(Path(name), cifar, options.repetitions)
    return Result(
        "experiment",
        "Experiments: ALIE on MNIST, n = 51, f = 12, 150 rounds; CNN-S on CIFAR-10, n = 51",
        (
            *(
                Figure.median(f"ALIE on MNIST, {transport}, {rule}", values, "s", at_most=AIMS[transport])
                for (transport, rule), values in seconds.items()
            ),
            Figure.median("CNN-S, batch 128: gradients alone", floors, "s/round"),
            Figure.median("CNN-S, batch 128: the run, local", bare, "s/round"),
            Figure.median(
                "CNN-S: the run over its gradients",
                [b / f for b, f in zip(bare, floors, strict=True)],
                "x",
                at_most=1.4,
            ),
            Figure.median(
                "CNN-S: with evaluation every 5 rounds", [e / f for e, f in zip(evaluated, floors, strict=True)], "x"
            ),
        ),
        (
            "ALIE: from `run started` to `run finished` in the logs: 150 rounds, 31 evaluations of 10,000 images, summary and "
            "models written; less what round 0 took longer than the median round, in which daemons still load their data. "
            "Rules one after another in one call of narses run, the transports in turn.",
            f"CNN-S: two threads; the run's {CNN_ROUNDS} rounds by the server's own clock, in turn with the gradients alone.",
            *notes,
        ),
    )


def _data() -> tuple[str, str, tuple[str, ...]]:
    """TOML and JSON of the data sets, stand-ins of the same shape where they are absent, and a note on that."""
    try:
        datasets.load("mnist", None)
        datasets.load("cifar10", None)
    except DataError as error:
        stand_in = 'synthetic", shape = [1, 28, 28], train = 60000, test = 10000'
        other = {"name": "synthetic", "shape": [3, 32, 32], "train": 50000, "test": 10000}
        return (
            f'{{ name = "{stand_in} }}',
            json.dumps(other),
            (f"Noise of the same shapes stood in for the data: {error}",),
        )
    return '"mnist"', '"cifar10"', ()


def _event(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}
