"""The man in the middle: the whole service on both sides. Daemons take it for the server, the server for its daemons."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from typing import Any, NoReturn

import grpc
import numpy as np
import structlog

from narses.errors import ConfigError
from narses.observe.metrics import Metrics
from narses.rpc.codec import DecodeError, parse_pull
from narses.rpc.convert import task_from_wire
from narses.rpc.intake import Intake
from narses.rpc.options import CHANNEL_OPTIONS
from narses.rpc.status import OK, REASON_KEY, REFUSALS, TOKEN_KEY, trailing
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses_adversary.config import ProxyConfig
from narses_adversary.hold import Traffic
from narses_adversary.stream import Forwarder

log = structlog.get_logger("narses.proxy")

SERVICE = "narses.rpc.v1.ParameterServerService"
Context = grpc.aio.ServicerContext[Any, Any]

PULL_SECONDS = 30.0
UNARY_SECONDS = 10.0


class Carried:
    """One session that passes through: its run and workers."""

    def __init__(self, traffic: Traffic, workers: frozenset[int]) -> None:
        self.traffic = traffic
        self.workers = workers


class Proxy:
    """The service downstream, and one channel upstream. Sessions, tokens and verdicts pass as they are."""

    def __init__(self, config: ProxyConfig, executor: Executor, metrics: Metrics) -> None:
        self._config = config
        self._executor = executor
        self._metrics = metrics
        self._sessions: dict[bytes, Carried] = {}
        self._traffic: dict[bytes, Traffic] = {}  # by run id
        self._channel = grpc.aio.insecure_channel(config.server, options=CHANNEL_OPTIONS)
        method = f"/{SERVICE}/"
        self._join: Any = self._channel.unary_stream(method + "Join")
        self._pull: Any = self._channel.unary_stream(method + "Pull")
        self._push: Any = self._channel.stream_stream(method + "Push")
        self._leave: Any = self._channel.unary_unary(method + "Leave")

    def handler(self) -> grpc.GenericRpcHandler:
        """The service's methods, every message as raw bytes."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Join": grpc.unary_stream_rpc_method_handler(self.join),
                "Pull": grpc.unary_stream_rpc_method_handler(self.pull),
                "Push": grpc.stream_stream_rpc_method_handler(self.push),
                "Leave": grpc.unary_unary_rpc_method_handler(self.leave),
            },
        )

    async def close(self) -> None:
        """Drop the upstream channel, which ends every session that passes through here."""
        for traffic in self._traffic.values():
            traffic.close()
        await self._channel.close()

    async def join(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        """A session: the server's stream, message by message; we learn the Task and who speaks."""
        call = self._join(request)
        carried: Carried | None = None
        token = b""
        self._metrics.inc("narses_proxy_connections", 1, side="downstream")
        self._metrics.inc("narses_proxy_connections", 1, side="upstream")
        try:
            while (raw := await call.read()) is not grpc.aio.EOF:
                response = pb.JoinResponse.FromString(raw)
                if response.WhichOneof("message") == "task":
                    workers = frozenset(pb.JoinRequest.FromString(request).workers)
                    carried, token = Carried(self._run(response.task), workers), response.session
                    self._sessions[token] = carried
                    carried.traffic.joined(workers)
                    log.info("joined", run=carried.traffic.task.run_name, workers=sorted(workers))
                yield raw
            await self._finish(call, context)
        except grpc.aio.AioRpcError as error:
            await self._fail(error, context)
        finally:
            call.cancel()
            self._metrics.inc("narses_proxy_connections", -1, side="downstream")
            self._metrics.inc("narses_proxy_connections", -1, side="upstream")
            self._sessions.pop(token, None)
            if carried is not None:
                carried.traffic.left(carried.workers)

    async def pull(self, request: bytes, context: Context) -> None:
        """Parameters on their way down; what an attack may know of a round is taken from here."""
        carried = self._carried(context)
        call = self._pull(request, metadata=_token(context), timeout=PULL_SECONDS)
        try:
            header, intake, row_D = None, None, None
            while (raw := await call.read()) is not grpc.aio.EOF:
                self._metrics.inc("narses_proxy_received_bytes_total", len(raw), direction="upstream")
                if carried is not None and carried.traffic.attacking:
                    message = parse_pull(raw)
                    if not isinstance(message, memoryview):
                        header = message.header
                        carried.traffic.opened(header)
                        row_D = np.empty(carried.traffic.task.dimension, np.float32)
                        intake = Intake(row_D, carried.traffic.task.digest)
                    elif intake is not None and intake.fits(message):
                        intake.absorb(message)
                await context.write(raw)
                self._metrics.inc("narses_proxy_sent_bytes_total", len(raw), direction="downstream")
            if (
                carried is not None
                and header is not None
                and row_D is not None
                and intake is not None
                and intake.complete
            ):
                carried.traffic.published(header, row_D)
            self._metrics.inc("narses_proxy_messages_total", rpc="pull", action="forwarded")
            await self._finish(call, context)
        except DecodeError:
            await context.abort(grpc.StatusCode.INTERNAL, "the server's answer cannot be parsed")
        except grpc.aio.AioRpcError as error:
            await self._fail(error, context)
        finally:
            call.cancel()

    async def push(self, _: object, context: Context) -> None:
        """Updates on their way up. All downstream streams are read at once; verdicts come back as they are decided."""
        carried = self._carried(context)
        call = self._push(metadata=_token(context), timeout=self._config.push_timeout)
        if carried is None:
            call.cancel()
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                "no live session has this token; join first",
                trailing("NO_SESSION"),
            )
            return
        forwarder = Forwarder(carried.traffic, carried.workers, call, self._metrics)
        up = asyncio.create_task(forwarder.run(context.read))
        try:
            while (raw := await call.read()) is not grpc.aio.EOF:
                self._verdict(raw, forwarder)
                await context.write(raw)
            await self._finish(call, context)
        except grpc.aio.AioRpcError as error:
            await self._fail(error, context)
        finally:
            up.cancel()
            await asyncio.gather(up, return_exceptions=True)
            call.cancel()

    async def leave(self, request: bytes, context: Context) -> bytes:
        """Passed on."""
        call = self._leave(request, metadata=_token(context), timeout=UNARY_SECONDS)
        try:
            answer: bytes = await call
            self._metrics.inc("narses_proxy_messages_total", rpc="leave", action="forwarded")
            return answer
        except grpc.aio.AioRpcError as error:
            return await self._fail(error, context)

    # -- shared ----------------------------------------------------------------------------------------------------------

    def _run(self, message: pb.Task) -> Traffic:
        """The traffic of the task's run; runs that nobody carries any more are let go."""
        try:
            task = task_from_wire(message)
        except ConfigError as error:
            raise RuntimeError(f"the server sent a task that this proxy cannot read: {error}") from None
        if task.run_id not in self._traffic:
            carried = {id(c.traffic) for c in self._sessions.values()}
            for run_id, traffic in list(self._traffic.items()):
                if id(traffic) not in carried:
                    traffic.close()
                    del self._traffic[run_id]
            self._traffic[task.run_id] = Traffic(task, self._config, self._executor, self._metrics)
        return self._traffic[task.run_id]

    def _carried(self, context: Context) -> Carried | None:
        return next((self._sessions.get(bytes(value)) for _, value in _token(context)), None)

    def _verdict(self, raw: bytes, forwarder: Forwarder) -> None:
        verdict = pb.PushResponse.FromString(raw)
        if (verdict.worker, verdict.round) in forwarder.rewritten:
            outcome = "accepted" if verdict.code == OK else "rejected"
            self._metrics.inc("narses_proxy_rewritten_outcomes_total", outcome=outcome)

    async def _finish(self, call: Any, context: Context) -> None:
        """End the downstream RPC as the upstream one has ended."""
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            await _abort(code, await call.details(), await call.trailing_metadata(), context)

    async def _fail(self, error: grpc.aio.AioRpcError, context: Context) -> NoReturn:
        self._metrics.inc("narses_proxy_upstream_failures_total", grpc_status=error.code().name)
        await _abort(error.code(), error.details(), error.trailing_metadata(), context)


async def _abort(code: grpc.StatusCode, details: str | None, metadata: Any, context: Context) -> NoReturn:
    reasons = tuple((k, v) for k, v in metadata or () if k == REASON_KEY and v in REFUSALS)
    await context.abort(code, details or "", reasons)
    raise AssertionError("abort raises")


def _token(context: Context) -> tuple[tuple[str, bytes], ...]:
    """The session token among the caller's metadata, as metadata for the upstream call."""
    metadata = context.invocation_metadata() or ()
    return tuple((key, value) for key, value in metadata if key == TOKEN_KEY and isinstance(value, bytes))[:1]
