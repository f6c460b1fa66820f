"""A real server process that gets SIGKILL at fifty random instants, while workers train, ends as if nothing had happened.

Some kills hit a server that is still starting, resuming or waiting for its workers, most hit any instant of a round.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from narses.observe.daemon import Surroundings
from narses_worker.app import honest
from narses_worker.config import WorkerConfig
from tests.zygote import Life, Zygote, zygote

pytestmark = pytest.mark.e2e

KILLS, ROUNDS = 50, 700
SECONDS = 30.0
COHORTS = ("0-1", "2-3")

CONFIG = """
listen = "127.0.0.1:{port}"
insecure = true
output = "{output}"
start_timeout = 30.0
keep_large_blocks = false
metrics.listen = ""
health.listen = ""
log.format = "json"

[task]
model = "softmax"
dataset = "digits"
batch = 16

[round]
n = 4
f = 1
rule = "median"
rounds = {rounds}

[optimizer]
learning_rate = 0.1
momentum = 0.9

[evaluate]
every = 10

[checkpoint]
every = 1
"""


class Workers:
    """Daemons in this process, which outlive every server.

    seen: the round of every Pull that brought parameters, in order of arrival at any of them.
    """

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._news = asyncio.Event()

    def watch(self, surroundings: Surroundings) -> None:
        """Take note of what a daemon pulls."""
        set_ = surroundings.metrics.set

        def noting(name: str, value: float, /, **labels: str) -> None:
            set_(name, value, **labels)
            if name == "narses_worker_round":
                self.seen.append(int(value))
                self._news.set()

        surroundings.metrics.set = noting  # type: ignore[method-assign]

    @property
    def newest(self) -> int:
        """The latest round that any of them has seen; -1 before the first."""
        return self.seen[-1] if self.seen else -1

    async def until(self, round_: int) -> None:
        """Wait until `round_` is published."""
        async with asyncio.timeout(SECONDS):
            while self.newest < round_:
                self._news.clear()
                await self._news.wait()


@contextlib.asynccontextmanager
async def _workers(port: int) -> AsyncIterator[Workers]:
    """A daemon per cohort, which end when the server says that there are no more runs."""
    workers, daemons, tasks = Workers(), [], []
    with (
        mock.patch("narses_worker.daemon.BACKOFF_FIRST", 0.01),
        mock.patch("narses_worker.daemon.BACKOFF_LAST", 0.05),
    ):
        for ids in COHORTS:
            config = WorkerConfig.of(
                {
                    "server": f"127.0.0.1:{port}",
                    "insecure": True,
                    "workers": ids,
                    "keep_large_blocks": False,
                    "device": "cpu",
                }
            )
            surroundings = Surroundings("worker", config)
            workers.watch(surroundings)
            daemons.append(honest(config, surroundings))
            tasks.append(asyncio.create_task(daemons[-1].serve()))
        try:
            yield workers
            await asyncio.wait_for(asyncio.gather(*tasks), SECONDS)
        finally:
            for task, daemon in zip(tasks, daemons, strict=True):
                task.cancel()
                await asyncio.wait((task,))
                daemon.executor.shutdown(wait=True, cancel_futures=True)


def _free_port() -> int:
    """Below the ports that the kernel gives to connections: none of them can take it between two servers."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(10_000, max(first, 20_000)), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


async def _play(z: Zygote, folder: Path, kills: int) -> tuple[list[int], list[int]]:
    """One run to its end, with so many kills on the way: the rounds its workers saw, and after which of them it was killed."""
    port, choose = _free_port(), random.Random(7)
    config, log = folder / "server.toml", folder / "server.log"
    config.write_text(CONFIG.format(port=port, output=folder / "out", rounds=ROUNDS))

    async def start() -> Life:
        return await z.start(["--config", str(config)], log)

    killed_after = []
    try:
        async with _workers(port) as workers:
            for _ in range(kills):
                life = await start()
                if choose.random() < 0.3:
                    delay = choose.uniform(0, 0.4)  # about what it takes to resume
                else:
                    await workers.until(workers.newest + choose.randint(1, 8))
                    delay = choose.uniform(0, 0.02)  # a few rounds
                assert not await life.ended(within=delay), "every kill falls inside the run"
                life.kill()
                assert await life.reap() == -9
                killed_after.append(workers.newest)
            life = await start()
            assert await life.ended(within=SECONDS)
            assert await life.reap() == 0
    finally:
        text = log.read_text()
        print(text[-3000:])
    assert "Traceback" not in text
    return workers.seen, killed_after


def _summary(folder: Path) -> dict[str, Any]:
    whole = json.loads((folder / "out" / "run" / "summary.json").read_text())
    return {key: whole[key] for key in ("outcome", "rounds", "digest", "accuracy", "best_accuracy", "best_round")}


async def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    async with zygote() as z:
        await _play(z, tmp_path / "undisturbed", kills=0)
        seen, killed_after = await _play(z, tmp_path / "killed", kills=KILLS)

    assert len(set(killed_after)) > KILLS / 2, "the kills are spread over the run"
    assert _summary(tmp_path / "killed") == _summary(tmp_path / "undisturbed")
    assert seen == sorted(seen), "no round is opened again after its successor was"
    assert set(seen) == set(range(ROUNDS))
    for run in ("undisturbed", "killed"):
        lines = (tmp_path / run / "out" / "run" / "rounds.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == list(range(ROUNDS)), "every round is there, and once"
