"""What the adversary's tests stand on: a small task, a rule that remembers what the server got, and a running proxy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from pydantic import dataclasses as checked

from narses import combine, datasets, flat, models
from narses.config import STRICT
from narses.observe.daemon import Surroundings
from narses.observe.metrics import Metrics
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses.rules import Aggregation, Context
from narses.task import LearningRate, Task
from narses.updates import Updates
from narses_adversary.app import ProxyServer, corrupted
from narses_adversary.config import AdversaryConfig, ProxyConfig
from narses_adversary.hold import Hold, Traffic
from narses_adversary.proxy import Proxy
from narses_worker.trainer import Trainer
from tests.cluster import Cluster, Member, Waking
from tests.oracles import attacks as oracle
from tests.raw import RawSession, Wire

Rows = NDArray[np.float32]
RULE = {"name": "tests.adversary.rig:Remembering"}
IPM = {"name": "ipm", "epsilon": 2.0}


@checked.dataclass(frozen=True, config=STRICT)
class Remembering:
    """The mean, which keeps what it was given: (parameters_D, updates_ND) of every round, last run only."""

    rounds: ClassVar[dict[int, tuple[Rows, Rows]]] = {}

    def min_updates(self, f: int) -> int:
        return 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        assert context is not None
        assert context.parameters_D is not None
        everything = updates.columns(torch.arange(updates.dimension))
        self.rounds[context.round] = (context.parameters_D.numpy().copy(), everything.numpy().copy())
        return Aggregation(updates.per_coordinate(combine.Mean()))


@contextlib.contextmanager
def remembered() -> Iterator[dict[int, tuple[Rows, Rows]]]:
    """What `Remembering` has remembered, emptied first."""
    Remembering.rounds.clear()
    yield Remembering.rounds


def honest_rows(task: Task, workers: Sequence[int], round_: int, parameters_D: Rows) -> Rows:
    """(K, D): what honest workers compute."""
    trainer = Trainer(task, workers, device="cpu")
    rows_KD = np.empty((len(workers), task.dimension), np.float32)
    for row_D, worker in zip(rows_KD, workers, strict=True):
        trainer.update(worker, round_, parameters_D, row_D)
    return rows_KD


def forged_ipm(honest_ND: Rows, seen: list[int], members: list[int], epsilon: float = 2.0) -> Rows:
    """What every member sends, from the papers' formula."""
    rows_HD = honest_ND[seen].astype(np.float64)
    remaining = [i for i, worker in enumerate(seen) if worker not in members]
    return oracle.ipm(rows_HD, remaining, epsilon).astype(np.float32)


def small_task(**changes: Any) -> Task:
    """Softmax regression on blobs: D = 15."""
    dataset = {"name": "synthetic", "features": 4, "classes": 3, "train": 60, "test": 6}
    data = datasets.load(dataset, None)
    module = models.make({"name": "softmax"}).build(data.shape, data.classes, 0)
    fields: dict[str, Any] = {
        "run_id": bytes(range(16)),
        "run_name": "test",
        "n": 6,
        "rounds": 10,
        "model": {"name": "softmax"},
        "dataset": dataset,
        "batch": 5,
        "seed": 5,
        "learning_rate": LearningRate(initial=0.1),
        "dimension": flat.count(module),
        "layout": flat.layout_hash(module),
        "chunk_bytes": 16,
    }
    return Task(**{**fields, **changes})


def round_header(round_: int = 0, **changes: Any) -> pb.RoundHeader:
    """Of an open round that has plenty of time."""
    fields: dict[str, Any] = {"run_id": bytes(range(16)), "n": 6, "f": 2, "rule": '{"name":"median"}'}
    fields |= {"closes_in_ms": 120_000, "digest": bytes([round_]) * 32}
    return pb.RoundHeader(round=round_, **{**fields, **changes})


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """The current value of one series."""
    found = metrics.registry.get_sample_value(name, labels)
    assert found is not None, f"no series {name}{labels}"
    return found


@contextlib.contextmanager
def logged() -> Iterator[list[Any]]:
    """Every log line written meanwhile, as dictionaries."""
    with structlog.testing.capture_logs() as lines:
        yield lines


async def corrupt(cluster: Cluster, workers: Sequence[int], address: str = "", **settings: Any) -> Member:
    """An adversary daemon for `workers`, one of the cluster's daemons from then on."""
    wire = await Wire(address or cluster.address).open()
    tree = {"server": wire.address, "insecure": True, "workers": list(workers), "device": "cpu", "drain_timeout": 2.0}
    config = AdversaryConfig.of({**tree, "keep_large_blocks": False, **settings})
    surroundings = Surroundings("adversary", config)
    member = Member(workers, wire, corrupted(config, surroundings), surroundings)
    cluster.daemons.append(member)
    return member


class Man(Waking):
    """A running proxy. Its waits, and its cluster's, are woken by what either of them counts, and by what the proxy sees."""

    def __init__(self, server: ProxyServer, cluster: Cluster) -> None:
        super().__init__(server.surroundings)
        self.changed = cluster.changed
        self.server = server
        self.cluster = cluster
        self._raw: list[RawSession] = []

    @property
    def address(self) -> str:
        """What daemons are told."""
        return f"127.0.0.1:{self.server.port}"

    @property
    def proxy(self) -> Proxy:
        """The service."""
        assert self.server._proxy is not None
        return self.server._proxy

    @property
    def traffic(self) -> Traffic:
        """Of the run that is open."""
        return list(self.proxy._traffic.values())[-1]

    @property
    def hold(self) -> Hold | None:
        """The hold of the open round."""
        return self.traffic._hold if self.proxy._traffic else None

    async def carries(self, *cohorts: Sequence[int]) -> list[Member]:
        """Honest daemons behind the proxy."""
        return [await self.cluster.start(workers, address=self.address) for workers in cohorts]

    async def raw_session(self, workers: Sequence[int]) -> RawSession:
        """A hand-driven session behind the proxy; without workers it has only connected."""
        raw = await RawSession.connect(self.address)
        self._raw.append(raw)
        return await raw.join(workers) if workers else raw

    async def until_held(self, *workers: int, round_: int = 0) -> Hold:
        """Wait until the updates of exactly these workers are held in round `round_`."""

        def held() -> bool:
            hold = self.hold
            return hold is not None and hold.header.round == round_ and set(hold.seen) == set(workers)

        await self.until(held, f"updates of {workers} in round {round_} to be held")
        assert self.hold is not None
        return self.hold

    def pushed(self) -> dict[str, int]:
        """What became of the updates that passed."""
        return {
            action: int(count)
            for action in ("forwarded", "rewritten")
            if (count := self.metric("narses_proxy_messages_total", rpc="push", action=action))
        }


@contextlib.asynccontextmanager
async def man_in_the_middle(cluster: Cluster, server: str = "", **settings: Any) -> AsyncIterator[Man]:
    """A proxy in front of the cluster (or of `server`), whose events wake the cluster's waits too."""
    tree = {"server": server or cluster.address, "listen": "127.0.0.1:0", "insecure": True, "keep_large_blocks": False}
    proxy = ProxyServer(ProxyConfig.of({**tree, **settings}))
    man = Man(proxy, cluster)
    saw = Traffic.saw

    def seen(self: Traffic, hold: Hold, worker: int, row_D: Rows | None) -> None:
        saw(self, hold, worker, row_D)
        man.changed.set()

    Traffic.saw = seen  # type: ignore[method-assign]
    try:
        await proxy.start()
        yield man
    finally:
        Traffic.saw = saw  # type: ignore[method-assign]
        for raw in man._raw:
            await raw.close()
        await proxy.stop()


async def soon(condition: Callable[[], bool]) -> None:
    """Let the loop run until `condition()`; for what takes a few of its turns and no time."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not become so")


async def finishes(awaitable: Awaitable[Any], within: float = 5.0) -> Any:
    """Its result, or AssertionError."""
    try:
        return await asyncio.wait_for(awaitable, within)
    except TimeoutError:
        raise AssertionError(f"not finished within {within} s") from None
