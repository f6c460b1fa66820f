"""A 256 MiB update through the public client into a server process over loopback: python -m bench push [--repetitions 7]

Throughput and CPU of push and pull, beside a raw TCP socket and unary protobuf messages, alternately in one session; the
server's peak memory; its event-loop lag meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench.loopback import RawTcp, Transfer, UnaryProtobuf
from bench.programs import Program, console, memory_bytes
from bench.result import Figure, Result
from narses.observe.metrics import Metrics
from narses.rpc.allocator import keep_large_blocks
from narses.rpc.status import OK
from narses_worker.client import Client, Pulled, Session

# An MLP of 28 inputs, 2,164,802 hidden units and 2 classes has exactly 2^26 parameters, and its data set is tiny.
HIDDEN, DIMENSION = 2_164_802, 1 << 26
N = 2  # worker 0's push is measured while nothing else happens; worker 1's closes the round
GB = 1e9
LAG = "narses_event_loop_lag_seconds"
LAG_AIM_S = 0.05

CONFIG = """
listen = "127.0.0.1:0"
insecure = true
drain_timeout = 0.5
metrics.listen = "127.0.0.1:0"
log.format = "json"

[task]
dataset = {{ name = "synthetic", features = 28, classes = 2, train = 100, test = 10 }}
model = "softmax"
batch = 1

[round]
n = {n}
rounds = 1

[optimizer]
learning_rate = 1e-6

[[runs]]
name = "small"

[[runs]]
name = "large"
task.model = {{ name = "mlp", hidden = {hidden} }}
round.rounds = {rounds}
"""


async def measure(repetitions: int) -> Result:
    """Everything, in `repetitions` rounds after a first one; one more stays open, so that the session lasts."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "server.toml")
        config.write_text(CONFIG.format(n=N, hidden=HIDDEN, rounds=repetitions + 2), encoding="utf-8")
        async with await Program.start(console("narses_server", config)) as server:
            listening = await server.until("listening")
            with RawTcp() as tcp, UnaryProtobuf() as unary, ThreadPoolExecutor(2) as executor:
                # With metrics, as the daemon has them: counting is part of the price.
                metrics = Metrics("worker")
                async with Client(f"127.0.0.1:{listening['port']}", executor, metrics) as client:
                    bench = _Bench(client, server, int(listening["metrics"]), tcp, unary)
                    return await bench.play(repetitions)


class _Bench:
    def __init__(self, client: Client, server: Program, metrics: int, tcp: RawTcp, unary: UnaryProtobuf) -> None:
        self._client = client
        self._server = server
        self._metrics = metrics
        self._tcp = tcp
        self._unary = unary

    async def play(self, repetitions: int) -> Result:
        small = await self._join()
        idle = memory_bytes(self._server.pid)
        await self._finish(small)
        large = await self._join()
        assert large.task.dimension == DIMENSION
        row_D = np.random.default_rng(1).standard_normal(DIMENSION, np.float32)
        pulled = await large.pull(None)
        first = await self._timed(lambda: self._push(large, 0, pulled, row_D))
        await self._push(large, 1, pulled, row_D)
        before = await self._lags()
        pushes, pulls, tcps, unaries = [], [], [], []
        for _ in range(repetitions):
            pulled = await large.pull(pulled.header.round)
            # The one that counts asks for what is already there: no waiting for the round to close.
            pulls.append(await self._timed(lambda: large.pull(None)))
            tcps.append(self._tcp.send(row_D.view(np.uint8).data))
            current = pulled
            pushes.append(await self._timed(lambda pulled=current: self._push(large, 0, pulled, row_D)))  # type: ignore[misc]
            unaries.append(self._unary.send(row_D.nbytes))
            await self._push(large, 1, pulled, row_D)
        await large.pull(pulled.header.round)
        lags = {bound: count - before[bound] for bound, count in (await self._lags()).items()}
        peak = memory_bytes(self._server.pid)
        await large.leave()
        return _result(first, pushes, pulls, tcps, unaries, idle, peak, lags)

    async def _join(self) -> Session:
        session = await self._client.join(range(N), "bench")
        assert isinstance(session, Session), session
        return session

    async def _finish(self, session: Session) -> None:
        """Play the run's only round."""
        pulled = await session.pull(None)
        for worker in range(N):
            await self._push(session, worker, pulled, np.zeros(session.task.dimension, np.float32))
        async with asyncio.timeout(10):
            await session.notice
        session.close()

    async def _push(self, session: Session, worker: int, pulled: Pulled, row_D: Any) -> None:
        async with session.push(60) as push:
            await push.send(worker, pulled.header.round, pulled.header.digest, row_D)
            (verdict,) = await push.finish()
        assert verdict.code == OK, verdict

    async def _timed(self, action: Callable[[], Awaitable[Any]]) -> Transfer:
        cpu, begun = time.process_time() + self._server.cpu(), time.perf_counter()
        await action()
        seconds = time.perf_counter() - begun
        return Transfer(seconds, time.process_time() + self._server.cpu() - cpu)

    async def _lags(self) -> dict[float, float]:
        """Upper bound in seconds -> ticks of the server's loop that were at most so late."""
        text = await asyncio.to_thread(_fetch, f"http://127.0.0.1:{self._metrics}/metrics")
        buckets = re.findall(rf'^{LAG}_bucket{{le="([^"]+)"}} (\S+)$', text, re.MULTILINE)
        return {float(bound): float(count) for bound, count in buckets}


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return str(reply.read(), "utf-8")


def _result(
    first: Transfer,
    pushes: list[Transfer],
    pulls: list[Transfer],
    tcps: list[Transfer],
    unaries: list[Transfer],
    idle: int,
    peak: int,
    lags: dict[float, float],
) -> Result:
    size = DIMENSION * 4
    allowed = (N + 5) * size + 100_000_000

    def rate(transfers: list[Transfer]) -> list[float]:
        return [size / GB / t.seconds for t in transfers]

    def cpu(transfers: list[Transfer]) -> list[float]:
        return [t.cpu / (size / GB) for t in transfers]

    def ratio(others: list[Transfer]) -> list[float]:
        return [other.seconds / push.seconds for push, other in zip(pushes, others, strict=True)]

    ticks = max(lags.values())
    p99 = next(bound for bound, count in sorted(lags.items()) if count >= 0.99 * ticks)
    return Result(
        "push",
        "One update of 256 MiB (67,108,864 float32), loopback, digest BLAKE3 verified",
        (
            Figure.median("push", rate(pushes), "GB/s", at_least=1.2),
            Figure.median("push, CPU of both sides", cpu(pushes), "CPU-s/GB", at_most=1.4),
            Figure("push, the first of the run", rate([first])[0], "GB/s"),
            Figure.median("pull", rate(pulls), "GB/s"),
            Figure.median("pull, CPU of both sides", cpu(pulls), "CPU-s/GB"),
            Figure.median("raw TCP, writes of 1 MiB", rate(tcps), "GB/s"),
            Figure.median("raw TCP, CPU of both sides", cpu(tcps), "CPU-s/GB"),
            Figure.median("unary protobuf messages of 32 MiB", rate(unaries), "GB/s"),
            Figure.median("unary protobuf, CPU of both sides", cpu(unaries), "CPU-s/GB"),
            Figure.median("push / raw TCP", ratio(tcps), "x"),
            Figure.median("push / unary protobuf", ratio(unaries), "x"),
            Figure("server, idle peak (VmHWM)", idle / 1e6, "MB"),
            Figure("server, peak (VmHWM)", peak / 1e6, "MB"),
            Figure("server, peak beyond idle", (peak - idle) / 1e6, "MB", at_most=allowed / 1e6),
            Figure("server, event-loop lag p99, at most", p99 * 1e3, "ms", at_most=LAG_AIM_S * 1e3),
            Figure("server, event-loop ticks at most 50 ms late", 100 * lags[LAG_AIM_S] / ticks, "%"),
        ),
        (
            f"{len(pushes)} rounds of n = {N}; each: pull, raw TCP, push of worker 0, unary protobuf, then worker 1's push "
            "closes the round. GB = 1e9 bytes; ratios are per round.",
            "A push is timed from opening the stream to its verdict, a pull from the request to the verified digest. CPU is "
            "that of all threads of the server and of this client.",
            f"Memory: VmHWM of the server process after the last round, less VmHWM of the same process while a run of "
            f"{(28 + 1) * 2} parameters was open (Python, PyTorch and gRPC loaded). Allowed beyond it: n*D*4 + 5*D*4 + 100 MB.",
            f"Lag: histogram {LAG} over the measured rounds, aggregation included ({ticks:.0f} ticks); p99 is the smallest "
            "bucket bound that holds 99 % of the ticks.",
            "Unary protobuf: grpc.aio on both sides, generated serialisers, default malloc, 8 messages one after another.",
        ),
    )


def main(arguments: list[str]) -> Result:
    """Parse, measure."""
    parser = argparse.ArgumentParser(prog="python -m bench push", description="256 MiB through the public client")
    parser.add_argument("--repetitions", type=int, default=7, help="measured rounds")
    options = parser.parse_args(arguments)
    keep_large_blocks()  # as every daemon does
    return asyncio.run(measure(options.repetitions))
