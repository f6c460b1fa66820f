"""A whole cluster in the test's own loop: a real server and real daemons over real gRPC on loopback, and its faults.

    async with cluster(n=4, rounds=5, daemons=[[0, 1], [2, 3]]) as c:
        await c.until_round(2)
        await c.kill(c.daemons[0])
        await c.restart(c.daemons[0])
        assert (await c.summary())["outcome"] == "completed"

Every daemon talks through a wire of its own (a TCP relay), and killing one cuts the wire first: the server sees what it
would see of a process that got SIGKILL, and not the farewell that a cancelled task still sends. Nothing here sleeps: waits
are woken by the server's own metrics and have a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from unittest import mock

from narses.observe.daemon import Surroundings
from narses_server.app import Server
from narses_server.config import ServerConfig
from narses_server.coordinator import Run
from narses_worker.app import honest
from narses_worker.cohort import Make
from narses_worker.config import WorkerConfig
from narses_worker.daemon import Daemon
from tests.raw import SECONDS, RawSession, Wire


def experiment(
    n: int = 4,
    f: int = 0,
    rule: Any = "mean",
    rounds: int = 3,
    *,
    model: Any = "softmax",
    seed: int = 1,
    batch: int = 16,
    chunk_bytes: int = 1024,
    learning_rate: float = 0.5,
    runs: Sequence[dict[str, Any]] = (),
    evaluate: int | None = None,
    round_: dict[str, Any] | None = None,
    **top: Any,
) -> ServerConfig:
    """The configuration of a small experiment on scikit-learn's digits; `round_` and `top` add whatever else."""
    return ServerConfig.of(
        {
            "listen": "127.0.0.1:0",
            "insecure": True,
            "start_timeout": SECONDS,
            "drain_timeout": 0.5,
            "keep_large_blocks": False,
            "task": {
                "model": model,
                "dataset": "digits",
                "batch": batch,
                "seed": seed,
                "chunk_bytes": chunk_bytes,
            },
            "round": {"n": n, "f": f, "rule": rule, "rounds": rounds, **(round_ or {})},
            "optimizer": {"learning_rate": learning_rate},
            **({} if evaluate is None else {"evaluate": {"every": evaluate}}),
            "runs": list(runs),
            **top,
        }
    )


@contextlib.asynccontextmanager
async def cluster(*, daemons: Sequence[Sequence[int]] | None = None, **settings: Any) -> AsyncIterator[Cluster]:
    """A running cluster of `experiment(**settings)`; daemons: the workers of each (default: one with all of them)."""
    config = experiment(**settings)
    # Workers that the test has killed cannot be told that the runs are over.
    with mock.patch("narses_server.app.FAREWELL_SECONDS", 0.5):
        c = Cluster(config)
        await c.open()
        try:
            for workers in [range(config.round.n)] if daemons is None else daemons:
                await c.start(workers)
            yield c
        finally:
            await c.close()


async def undisturbed(**settings: Any) -> str:
    """The digest of the last parameters of `experiment(**settings)` where nothing goes wrong; each is run once."""
    key = json.dumps(settings, sort_keys=True)
    if key not in _undisturbed:
        async with cluster(**settings) as c:
            _undisturbed[key] = (await c.summary())["digest"]
    return _undisturbed[key]


_undisturbed: dict[str, str] = {}


class Waking:
    """Wakes whoever waits for a condition on `metrics`, each time anything is counted."""

    def __init__(self, surroundings: Surroundings) -> None:
        self.surroundings = surroundings
        self.changed = asyncio.Event()
        for name in ("inc", "set", "observe"):
            setattr(surroundings.metrics, name, self._waking(getattr(surroundings.metrics, name)))

    def _waking(self, function: Callable[..., None]) -> Callable[..., None]:
        loop = asyncio.get_running_loop()

        def wrapped(*arguments: Any, **labels: Any) -> None:
            function(*arguments, **labels)
            loop.call_soon_threadsafe(self.changed.set)

        return wrapped

    async def until(self, condition: Callable[[], bool], what: str = "the condition") -> None:
        """Wait until `condition()`, asked again whenever this process' part counts anything."""
        try:
            async with asyncio.timeout(SECONDS):
                while not condition():
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            raise AssertionError(f"waited {SECONDS:.0f} s for {what}") from None

    def metric(self, name: str, **labels: str) -> float:
        """The current value of one series."""
        value = self.surroundings.metrics.registry.get_sample_value(name, labels)
        assert value is not None, f"no series {name}{labels}"
        return value


class Member(Waking):
    """A daemon of the cluster."""

    def __init__(self, workers: Sequence[int], wire: Wire, daemon: Daemon, surroundings: Surroundings) -> None:
        super().__init__(surroundings)
        self.workers = tuple(workers)
        self.wire = wire
        self.daemon = daemon
        self.task = asyncio.create_task(daemon.serve())
        self.forgiven = False  # its failure is what the test is about

    async def ended(self) -> BaseException | None:
        """How it ended: None if it returned."""
        self.forgiven = True
        await asyncio.wait_for(asyncio.wait((self.task,)), SECONDS)
        return asyncio.CancelledError() if self.task.cancelled() else self.task.exception()


class Cluster(Waking):
    """See the module. Create it with `cluster(...)`."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.server = Server(config)
        super().__init__(self.server.surroundings)
        self.daemons: list[Member] = []
        self._raw: list[RawSession] = []

    async def open(self) -> None:
        """Listen, and play the runs in a task."""
        await self.server.startup()
        self._main = asyncio.create_task(self.server.main_loop())
        self._main.add_done_callback(lambda _: self.changed.set())

    async def close(self) -> None:
        """Stop everything; a daemon that failed without the test having asked fails the test."""
        for raw in self._raw:
            await raw.close()
        for member in self.daemons:
            member.daemon.stop.set()
        self.server.stop.set()
        tasks = [member.task for member in self.daemons]
        _, hanging = await asyncio.wait((self._main, *tasks), timeout=SECONDS)
        for task in hanging:
            task.cancel()
        await self.server.shutdown()
        for member in self.daemons:
            await member.wire.cut()
            member.daemon.executor.shutdown(wait=True, cancel_futures=True)
        assert not hanging, "still running although told to stop"
        self._main.result()
        for member in self.daemons:
            if not member.forgiven:
                member.task.result()

    # -- faults ----------------------------------------------------------------------------------------------------------

    async def start(
        self, workers: Sequence[int], address: str | None = None, make: Make | None = None, **settings: Any
    ) -> Member:
        """A daemon for `workers`, honest unless `make` says otherwise; address: the server's if not given."""
        wire = await Wire(address or self.address).open()
        surroundings = Surroundings("worker", experiment())
        tree = {"server": wire.address, "insecure": True, "workers": list(workers), "device": "cpu", **settings}
        config = WorkerConfig.of({"keep_large_blocks": False, "drain_timeout": 2.0, **tree})
        daemon = honest(config, surroundings) if make is None else Daemon(config, workers, make, surroundings)
        member = Member(workers, wire, daemon, surroundings)
        self.daemons.append(member)
        return member

    async def kill(self, member: Member) -> None:
        """As kill -9: the connection is gone, and the daemon with all its memory."""
        member.forgiven = True
        await member.wire.cut()
        member.task.cancel()
        await asyncio.wait((member.task,))

    async def restart(self, member: Member) -> Member:
        """A new daemon for the workers of a killed one."""
        return await self.start(member.workers)

    async def raw_session(self, workers: Sequence[int]) -> RawSession:
        """A hand-driven client that has joined for `workers`; with none it has only connected."""
        raw = await RawSession.connect(self.address)
        self._raw.append(raw)
        return await raw.join(workers) if workers else raw

    # -- waiting and looking ---------------------------------------------------------------------------------------------

    async def until_round(self, index: int) -> None:
        """Wait until round `index` of the open run is open."""
        await self.until(lambda: self._round_is(index), f"round {index}")

    def _round_is(self, index: int) -> bool:
        run = self.server._service._run
        return run is not None and run.round is not None and run.round.index >= index

    async def until_joined(self, count: int) -> None:
        """Wait until `count` logical workers are connected."""
        await self.until(
            lambda: self.metric("narses_server_workers", state="connected") == count, f"{count} connected workers"
        )

    async def summaries(self) -> list[dict[str, Any]]:
        """Wait for the end of the last run: the summary of each."""
        await asyncio.wait_for(asyncio.shield(self._main), 2 * SECONDS)
        return self.server.summaries

    async def summary(self) -> dict[str, Any]:
        """Wait for the end: the summary of the last run."""
        return (await self.summaries())[-1]

    @property
    def address(self) -> str:
        """Where the server listens."""
        return f"127.0.0.1:{self.server.port}"

    @property
    def run(self) -> Run:
        """The open run."""
        run = self.server._service._run
        assert run is not None
        return run

    def counted(self) -> dict[str, int]:
        """How every update so far ended: accepted, duplicate, and the refused ones by reason in lower case, if any.

        Asserts that outcomes and reasons tell the same story.
        """
        counts: dict[str, int] = {}
        for family in self.server.surroundings.metrics.registry.collect():
            for sample in family.samples:
                if sample.name == "narses_server_pushes_total":
                    counts[sample.labels["outcome"]] = int(sample.value)
                elif sample.name == "narses_server_pushes_rejected_total":
                    counts["reason " + sample.labels["reason"]] = int(sample.value)
        reasons = {key.removeprefix("reason "): n for key, n in counts.items() if key.startswith("reason ") and n}
        assert counts["rejected"] + counts["late"] == sum(reasons.values())
        assert counts["late"] == reasons.get("wrong_round", 0)
        return {key: counts[key] for key in ("accepted", "duplicate") if counts[key]} | reasons
