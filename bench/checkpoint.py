"""What a checkpoint after every round costs: python -m bench checkpoint [--rounds 300] [--repetitions 5] [--folder DIR]

The MNIST MLP (79,510 parameters), 51 logical workers in three worker processes, batch 83, rule mean, momentum 0.9, evaluated
every 5 rounds: the same run without [checkpoint] and with checkpoint.every = 1, in turn. Then one checkpoint of that size
by itself. The folder has to be on a disk: in memory an fsync costs nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from bench.programs import Program, console
from bench.result import ROOT, Figure, Result
from bench.rounds import COHORTS, CONFIG, DIMENSION, N, mnist_table, rate_of, worker_command
from narses import durable
from narses_server.checkpoint import Checkpoints

FOLDER = ROOT / "narses-out" / "bench"
EVALUATE = 5
MORE = """
momentum = 0.9

[evaluate]
every = {evaluate}

[metrics]
listen = "127.0.0.1:0"
"""
CHECKPOINT = """
[checkpoint]
every = 1
"""
DURATION = "narses_server_checkpoint_duration_seconds"


class Played(NamedTuple):
    """One run. cpu: of the server, milliseconds per round. checkpoint: milliseconds each, as the server measured; 0 without."""

    rate: float
    cpu: float
    checkpoint: float


async def measure(rounds: int, repetitions: int, folder: Path) -> Result:
    """Both runs, `repetitions` times, the other one first each time; then checkpoints alone."""
    dataset, note = mnist_table()
    played: dict[bool, list[Played]] = {False: [], True: []}
    for repetition in range(repetitions):
        for durably in (False, True) if repetition % 2 == 0 else (True, False):
            with tempfile.TemporaryDirectory(dir=folder) as inside:
                played[durably].append(await _play(Path(inside), dataset, rounds, durably))
    lost = [100 * (1 - with_.rate / without.rate) for without, with_ in zip(played[False], played[True], strict=True)]
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        whole, written, size = _alone(Path(inside))
    return Result(
        "checkpoint",
        f"A checkpoint after every round, n = {N} logical workers in {len(COHORTS)} processes, D = {DIMENSION:,}, loopback",
        (
            Figure.median("without", [p.rate for p in played[False]], "rounds/s"),
            Figure.median("checkpoint.every = 1", [p.rate for p in played[True]], "rounds/s"),
            Figure.median("rounds/s lost, pair by pair", lost, "%", at_most=10.0),
            Figure.median("one checkpoint, in the run", [p.checkpoint for p in played[True]], "ms"),
            Figure.median(
                "its share of a round", [p.checkpoint * p.rate / 10 for p in played[True]], "%", at_most=10.0
            ),
            Figure.median("CPU, without: server", [p.cpu for p in played[False]], "ms/round"),
            Figure.median("CPU, checkpoint.every = 1: server", [p.cpu for p in played[True]], "ms/round"),
            Figure.median("one checkpoint, alone", whole, "ms"),
            Figure.median("of which write and fdatasync", written, "ms"),
            Figure("a checkpoint's size", size / 1e3, "kB"),
        ),
        (
            note,
            f"{rounds} rounds a run, {repetitions} pair(s) of runs, each with processes of its own; rule mean, momentum 0.9, "
            f"an evaluation every {EVALUATE} rounds beside the next ones.",
            f"The folder's file system is {_file_system(folder)}. Alone: parameters, velocity and best parameters, "
            f"{len(whole)} times.",
        ),
    )


async def _play(folder: Path, dataset: str, rounds: int, durably: bool) -> Played:
    config = folder / "server.toml"
    text = CONFIG.format(dataset=dataset, n=N, f=0, rounds=rounds) + MORE.format(evaluate=EVALUATE)
    output = f'name = "run"\noutput = "{folder}/out"\n'
    config.write_text(output + text + (CHECKPOINT if durably else ""), encoding="utf-8")
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(await Program.start(console("narses_server", config)))
        listening = await server.until("listening")
        commands = [worker_command(folder, listening["port"], ids) for ids in COHORTS]
        server.companions = [await stack.enter_async_context(await Program.start(command)) for command in commands]
        nearly = int(0.9 * rounds) // EVALUATE * EVALUATE  # while the server still answers
        await server.until("evaluated", 600.0, round=nearly)
        spent = await asyncio.to_thread(_seconds_per_checkpoint, listening["metrics"])
        await server.until("run finished", 600.0, outcome="completed")
    rate, cpu, _ = rate_of(server.log, "run", rounds)
    return Played(rate, cpu, spent * 1e3)


def _seconds_per_checkpoint(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10.0) as answer:
        lines = [line.split() for line in answer.read().decode().splitlines() if line.startswith(DURATION)]
    values = {line[0].removeprefix(DURATION): float(line[-1]) for line in lines}
    return values["_sum"] / values["_count"] if values.get("_count") else 0.0


def _alone(folder: Path, count: int = 200) -> tuple[list[float], list[float], int]:
    """Milliseconds of each of `count` checkpoints, of writing and fdatasync in each, and a checkpoint's bytes."""
    checkpoints = Checkpoints(folder, "hash", keep=3)
    tensors = {name: torch.randn(DIMENSION) for name in ("parameters", "velocity", "best")}
    whole: list[float] = []
    written: list[float] = []
    overwrite = durable.overwrite

    def timed(path: Path, content: Sequence[bytes | memoryview]) -> None:
        begun = time.perf_counter()
        overwrite(path, content)
        written.append((time.perf_counter() - begun) * 1e3)

    size = 0
    with mock.patch.object(durable, "overwrite", timed):
        for rounds in range(count):
            begun = time.perf_counter()
            size = checkpoints.save(rounds, tensors, {})
            whole.append((time.perf_counter() - begun) * 1e3)
    return whole, written, size


def _file_system(folder: Path) -> str:
    """Its type, as /proc/mounts has it."""
    lines = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    mounts = {Path(line[1]): line[2] for line in lines}
    return next((mounts[path] for path in (folder, *folder.parents) if path in mounts), "unknown")


def main(arguments: list[str]) -> Result:
    """Parse, measure."""
    parser = argparse.ArgumentParser(
        prog="python -m bench checkpoint", description="what a checkpoint every round costs"
    )
    parser.add_argument("--rounds", type=int, default=300, help="rounds of each run")
    parser.add_argument("--repetitions", type=int, default=5, help="pairs of runs")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where checkpoints are written; on a disk")
    options = parser.parse_args(arguments)
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if _file_system(folder) in ("tmpfs", "ramfs"):
        print(f"{folder} is memory and no disk: these figures say nothing; choose another --folder", file=sys.stderr)
    return asyncio.run(measure(options.rounds, options.repetitions, folder))
