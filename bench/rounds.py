"""Rounds per second with 51 logical workers in three worker processes: python -m bench rounds [--rounds 300]

The MNIST MLP (79,510 parameters), batch 83, as in the ALIE paper's size; one set of daemons plays one run per rule. Then the
same with workers that send a fixed vector: what the server, the wire and the rule take without gradient work.

`python -m bench.rounds still PORT IDS` is such a worker.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.programs import Program, console
from bench.result import Figure, Result
from narses import datasets
from narses.errors import DataError
from narses.observe.daemon import Surroundings, prepare
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses_worker.client import Pulled
from narses_worker.config import WorkerConfig
from narses_worker.daemon import Daemon

N, F, DIMENSION = 51, 12, 79_510
COHORTS = ("0-16", "17-33", "34-50")
RULES = ("mean", "median", "krum", "bulyan")
WARM_UP = 0.2  # of a run's rounds are left out
STAND_IN = 'dataset = { name = "synthetic", features = 784, train = 6000, test = 10 }'

CONFIG = """
listen = "127.0.0.1:0"
insecure = true
log.format = "json"

[task]
{dataset}
model = {{ name = "mlp", hidden = 100 }}
batch = 83

[round]
n = {n}
f = {f}
rounds = {rounds}

[optimizer]
learning_rate = 0.1
"""


async def measure(rounds: int, rules: tuple[str, ...], repetitions: int) -> Result:
    """Every rule with gradients, then without, `repetitions` times."""
    dataset, note = mnist_table()
    rates: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    for _ in range(repetitions):
        for gradients in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                played = await _play(Path(folder), dataset, rounds, rules, gradients)
            for rule, (rate, server, workers) in played.items():
                name = rule if gradients else f"{rule}, no gradient work"
                rates.setdefault(name, []).append(rate)
                cpu.setdefault(f"{name}: server", []).append(server)
                cpu.setdefault(f"{name}: three workers", []).append(workers)
    aims: dict[str, dict[str, float]] = {"mean": {"at_least": 20.0}}
    return Result(
        "rounds",
        f"Rounds per second, n = {N} logical workers in {len(COHORTS)} processes, D = {DIMENSION:,}, f = {F}, loopback",
        (
            *(Figure.median(name, values, "rounds/s", **aims.get(name, {})) for name, values in rates.items()),
            *(Figure.median(f"CPU, {name}", values, "ms/round") for name, values in cpu.items()),
        ),
        (
            note,
            f"{rounds} rounds a run, the first {WARM_UP:.0%} left out, {repetitions} repetition(s); one server and three "
            "daemons play the rules as one run after another. From the server's progress lines.",
            "No gradient work: the daemons send a fixed vector; pull, digest, push, rule and step are as ever.",
        ),
    )


def mnist_table() -> tuple[str, str]:
    """The data set's line of the configuration, and the note that says what it is: MNIST, or its stand-in if it is absent."""
    try:
        datasets.load("mnist", None)
    except DataError as error:
        print(f"MNIST is absent, random vectors of its shape stand in: {error}", file=sys.stderr)
        return STAND_IN, "MNIST was ABSENT on this machine: random inputs of its shape stand in (same arithmetic)."
    return 'dataset = "mnist"', "Gradients: MLP 784-100-10 on MNIST, batch 83, by the narses-worker daemon."


async def _play(
    folder: Path, dataset: str, rounds: int, rules: tuple[str, ...], gradients: bool
) -> dict[str, tuple[float, float, float]]:
    """rule -> rounds/s, and CPU milliseconds per round of the server and of the workers together."""
    config = folder / "server.toml"
    text = CONFIG.format(dataset=dataset if gradients else STAND_IN, n=N, f=F, rounds=rounds)
    runs = (f'[[runs]]\nname = "{rule}"\nround.rule = "{rule}"\n' for rule in rules)
    config.write_text(text + "\n".join(runs), encoding="utf-8")
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(await Program.start(console("narses_server", config)))
        port = (await server.until("listening"))["port"]
        commands = [worker_command(folder, port, ids, gradients) for ids in COHORTS]
        workers = [await stack.enter_async_context(await Program.start(command)) for command in commands]
        server.companions = workers
        for rule in rules:
            await server.until("run finished", 600.0, run=rule, outcome="completed")
    return {rule: rate_of(server.log, rule, rounds) for rule in rules}


def worker_command(folder: Path, port: int, ids: str, gradients: bool = True) -> list[str]:
    """A daemon for workers `ids`; its configuration is written to `folder`."""
    if not gradients:
        return [sys.executable, "-m", "bench.rounds", "still", str(port), ids]
    config = folder / f"worker-{ids}.toml"
    config.write_text(
        f'server = "127.0.0.1:{port}"\ninsecure = true\nworkers = "{ids}"\ndevice = "cpu"\nlog.format = "json"\n',
        encoding="utf-8",
    )
    return console("narses_worker", config)


def rate_of(log: list[dict[str, Any]], run: str, rounds: int) -> tuple[float, float, float]:
    """Rounds/s of one run, and CPU milliseconds per round of the server and of the workers together, without the warm-up."""
    lines = [e for e in log if e["event"] == "progress" and e["run"] == run and e["round"] >= WARM_UP * rounds]
    if len(lines) < 2:
        raise RuntimeError(f"{run}: {rounds} rounds are over before there are two progress lines; take more --rounds")
    first, last = lines[0], lines[-1]
    count = last["round"] - first["round"]
    return (
        count / (last["at"] - first["at"]),
        (last["cpu"] - first["cpu"]) / count * 1e3,
        (last["companions_cpu"] - first["companions_cpu"]) / count * 1e3,
    )


class Still:
    """A producer that sends the same small vector for every worker and round."""

    def __init__(self, workers: tuple[int, ...], dimension: int) -> None:
        self._workers = workers
        self._row_D = np.random.default_rng(1).standard_normal(dimension, np.float32) * np.float32(1e-3)

    async def produce(self, pulled: Pulled) -> AsyncGenerator[tuple[int, NDArray[np.float32]], None]:
        """At once."""
        for worker in self._workers:
            yield worker, self._row_D

    def settled(self, verdicts: Sequence[pb.PushResponse]) -> None:
        """Nothing."""


async def _still(config: WorkerConfig) -> None:
    surroundings = Surroundings("worker", config)
    await surroundings.start()
    try:
        await Daemon(config, config.workers, lambda task: Still(config.workers, task.dimension), surroundings).serve()
    finally:
        await surroundings.stop()


def main(arguments: list[str]) -> Result:
    """Parse, measure."""
    parser = argparse.ArgumentParser(prog="python -m bench rounds", description="rounds per second, n = 51")
    parser.add_argument("--rounds", type=int, default=300, help="rounds of each run")
    parser.add_argument("--rules", default=",".join(RULES), help="names with commas between")
    parser.add_argument("--repetitions", type=int, default=1)
    options = parser.parse_args(arguments)
    return asyncio.run(measure(options.rounds, tuple(options.rules.split(",")), options.repetitions))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["still", port, ids]:
            table = {"server": f"127.0.0.1:{port}", "insecure": True, "workers": ids, "log": {"format": "json"}}
            still = WorkerConfig.of(table)
            prepare(still)
            asyncio.run(_still(still))
        case _:
            sys.exit("usage: python -m bench.rounds still PORT IDS; the benchmark itself is python -m bench rounds")
