from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import structlog

from narses.observe.catalogue import SERVICE
from narses.observe.metrics import Metrics
from narses.rpc.interceptors import CallMetrics, client_attempt, server_interceptors

SECRET = "the-private-text"
CHUNK = bytes(range(256)) * 4096  # 1 MiB
Methods = dict[str, Any]


class Spy(Metrics):
    """Metrics that tell when a call has been recorded."""

    def __init__(self, role: Any) -> None:
        super().__init__(role)
        self.recorded: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        super().observe(name, value, **labels)
        self.recorded.put_nowait((labels["grpc_method"], labels["grpc_status"]))

    async def next(self) -> tuple[str, str]:
        method, status = await asyncio.wait_for(self.recorded.get(), 10)
        return method.rpartition("/")[2], status


class Handlers:
    """Every arity and style, all registered generically with identity serialisers. What they do is set by `fail`."""

    def __init__(self) -> None:
        self.hanging, self.cancelled = asyncio.Event(), asyncio.Event()

    async def fail(self, how: bytes, context: Any) -> None:
        match how:
            case b"raise":
                raise ValueError(SECRET)
            case b"abort":
                await context.abort(grpc.StatusCode.ABORTED, "round 3 is closed", (("narses-reason", "WRONG_ROUND"),))
            case b"swallow":
                try:
                    await context.abort(grpc.StatusCode.ABORTED, "round 3 is closed")
                except grpc.aio.AbortError:
                    raise ValueError(SECRET) from None
            case b"code":
                context.set_code(grpc.StatusCode.NOT_FOUND)
            case b"usage":
                raise grpc.aio.UsageError(SECRET)
            case b"group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(self.fail(b"raise", context))
            case b"hang":
                self.hanging.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.set()

    async def unary_unary(self, request: bytes, context: Any) -> bytes:
        await self.fail(request, context)
        return request

    async def unary_stream_generator(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield request
        await self.fail(request, context)
        yield request

    async def unary_stream_writer(self, request: bytes, context: Any) -> None:
        await context.write(request)
        await self.fail(request, context)
        await context.write(request)

    async def stream_unary(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        read = []
        async for request in requests:
            read.append(request)
            await self.fail(request, context)
        return b"".join(read)

    async def stream_stream_generator(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request
            await self.fail(request, context)

    async def stream_stream_reader_writer(self, _: object, context: Any) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(request)
            await self.fail(request, context)

    def synchronous(self, request: bytes, context: Any) -> bytes:
        return request


STYLES = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream_generator": grpc.unary_stream_rpc_method_handler,
    "unary_stream_writer": grpc.unary_stream_rpc_method_handler,
    "stream_unary": grpc.stream_unary_rpc_method_handler,
    "stream_stream_generator": grpc.stream_stream_rpc_method_handler,
    "stream_stream_reader_writer": grpc.stream_stream_rpc_method_handler,
}
EVERY_STYLE = pytest.mark.parametrize("style", STYLES)


class Broken(grpc.GenericRpcHandler):
    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method == "/test.Broken/Call":
            raise ValueError(SECRET)
        return None


@pytest.fixture
def handlers() -> Handlers:
    return Handlers()


@pytest.fixture
def metrics() -> Spy:
    return Spy("proxy")


@pytest.fixture
async def channel(handlers: Handlers, metrics: Spy) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=server_interceptors(metrics), options=[("grpc.so_reuseport", 0)])
    methods: Methods = {style: make(getattr(handlers, style)) for style, make in STYLES.items()}
    methods["synchronous"] = grpc.unary_unary_rpc_method_handler(handlers.synchronous)
    ours: Methods = {
        "Leave": grpc.unary_unary_rpc_method_handler(handlers.unary_unary),
        "Push": grpc.stream_stream_rpc_method_handler(handlers.stream_stream_reader_writer),
    }
    server.add_generic_rpc_handlers(
        (
            Broken(),
            grpc.method_handlers_generic_handler("test.Styles", methods),
            grpc.method_handlers_generic_handler(SERVICE, ours),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


async def call(channel: Any, style: str, request: bytes, service: str = "test.Styles") -> list[bytes]:
    """Send `request` once, collect what comes back; raises AioRpcError for any status but OK."""
    method = f"/{service}/{style}"
    if style.startswith(("unary_stream", "stream_stream")):
        if style.startswith("unary_stream"):
            rpc = channel.unary_stream(method)(request, timeout=10)
        else:
            rpc = channel.stream_stream(method)(one(request), timeout=10)
        try:
            return [reply async for reply in rpc]
        finally:
            rpc.cancel()  # a reader that is cancelled between two reads does not cancel its call
    if style == "stream_unary":
        return [await channel.stream_unary(method)(one(request), timeout=10)]
    return [await channel.unary_unary(method)(request, timeout=10)]


async def one(request: bytes) -> AsyncIterator[bytes]:
    yield request


async def failure(channel: grpc.aio.Channel, style: str, request: bytes, service: str = "test.Styles") -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, style, request, service)
    return caught.value


@EVERY_STYLE
async def test_messages_pass_untouched(channel: grpc.aio.Channel, metrics: Spy, style: str) -> None:
    replies = await call(channel, style, CHUNK)

    assert replies == [CHUNK] * (2 if style.startswith("unary_stream") else 1)
    assert await metrics.next() == ("other", "OK")


@EVERY_STYLE
@pytest.mark.parametrize("how", [b"raise", b"usage", b"group"])
async def test_an_exception_stays_at_home(channel: grpc.aio.Channel, metrics: Spy, style: str, how: bytes) -> None:
    with structlog.testing.capture_logs() as log:
        error = await failure(channel, style, how)
        recorded = await metrics.next()

    assert error.code() is grpc.StatusCode.INTERNAL
    found = re.fullmatch(r"internal error, correlation id ([0-9a-f]{32})", error.details())
    assert found
    [entry] = log
    assert entry["correlation"] == found[1]
    assert entry["method"] == f"/test.Styles/{style}"
    assert SECRET in repr(getattr(entry["exc_info"], "exceptions", entry["exc_info"]))
    assert SECRET not in repr(error)
    assert recorded == ("other", "INTERNAL")


@EVERY_STYLE
async def test_an_abort_passes_untouched(channel: grpc.aio.Channel, metrics: Spy, style: str) -> None:
    with structlog.testing.capture_logs() as log:
        error = await failure(channel, style, b"abort")
        recorded = await metrics.next()

    assert (error.code(), error.details()) == (grpc.StatusCode.ABORTED, "round 3 is closed")
    assert ("narses-reason", "WRONG_ROUND") in tuple(error.trailing_metadata())
    assert recorded == ("other", "ABORTED")
    assert log == []


@EVERY_STYLE
async def test_an_exception_after_an_abort_is_logged_only(channel: grpc.aio.Channel, style: str) -> None:
    with structlog.testing.capture_logs() as log:
        error = await failure(channel, style, b"swallow")
        # the handler is still unwinding when the client has its answer; a second call comes after
        await failure(channel, "unary_unary", b"abort")

    assert (error.code(), error.details()) == (grpc.StatusCode.ABORTED, "round 3 is closed")
    assert SECRET in repr(log)
    assert SECRET not in repr(error)


@EVERY_STYLE
async def test_a_code_set_by_the_handler_is_counted(channel: grpc.aio.Channel, metrics: Spy, style: str) -> None:
    error = await failure(channel, style, b"code")

    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert await metrics.next() == ("other", "NOT_FOUND")


@EVERY_STYLE
async def test_a_client_that_leaves_cancels(
    channel: grpc.aio.Channel, handlers: Handlers, metrics: Spy, style: str
) -> None:
    with structlog.testing.capture_logs() as log:
        waiting = asyncio.create_task(call(channel, style, b"hang"))
        await asyncio.wait_for(handlers.hanging.wait(), 10)
        waiting.cancel()
        await asyncio.wait_for(handlers.cancelled.wait(), 10)
        recorded = await metrics.next()

    assert recorded == ("other", "CANCELLED")
    assert log == []
    assert waiting.cancelling()


@pytest.mark.parametrize(("service", "method"), [("test.Broken", "Call"), ("test.Styles", "synchronous")])
async def test_a_handler_that_cannot_be_used_tells_nothing(
    channel: grpc.aio.Channel, service: str, method: str
) -> None:
    with structlog.testing.capture_logs() as log:
        error = await failure(channel, method, b"", service)

    assert error.code() is grpc.StatusCode.INTERNAL
    assert re.fullmatch(r"internal error, correlation id [0-9a-f]{32}", error.details())
    assert [entry["method"] for entry in log] == [f"/{service}/{method}"]


async def test_broken_metrics_tell_nothing_either(
    channel: grpc.aio.Channel, metrics: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(metrics, "observe", broken)
    with structlog.testing.capture_logs():
        error = await failure(channel, "unary_unary", b"")

    assert error.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in error.details()


async def test_our_methods_are_counted_by_name_and_nothing_else_is(channel: grpc.aio.Channel, metrics: Spy) -> None:
    await call(channel, "Leave", b"", SERVICE)
    assert await metrics.next() == ("Leave", "OK")

    push: Any = channel.stream_stream(f"/{SERVICE}/Push")(timeout=10)
    await push.write(b"1")
    assert await push.read() == b"1"
    await push.done_writing()
    assert await push.read() is grpc.aio.EOF
    assert await metrics.next() == ("Push", "OK")

    for unregistered in ("Erase", "Pull"):
        error = await failure(channel, unregistered, b"", SERVICE)
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert await metrics.next() == ("other", "UNIMPLEMENTED")
    assert await metrics.next() == ("Pull", "UNIMPLEMENTED")

    count = {
        sample.labels["grpc_method"].rpartition("/")[2]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "grpc_server_call_started_total"
    }
    assert count == {"Join": 0, "Pull": 1, "Push": 1, "Leave": 1, "other": 1}


async def test_client_attempts_are_counted_by_status(channel: Any) -> None:
    metrics = Spy("worker")
    method = f"/{SERVICE}/Leave"

    with client_attempt(metrics, method):
        await call(channel, "Leave", b"", SERVICE)
    assert await metrics.next() == ("Leave", "OK")

    with pytest.raises(grpc.aio.AioRpcError), client_attempt(metrics, method):
        await call(channel, "Leave", b"abort", SERVICE)
    assert await metrics.next() == ("Leave", "ABORTED")

    with pytest.raises(grpc.aio.AioRpcError), client_attempt(metrics, method):
        await channel.unary_unary(method)(b"hang", timeout=0.05)
    assert await metrics.next() == ("Leave", "DEADLINE_EXCEEDED")

    with pytest.raises(asyncio.CancelledError), client_attempt(metrics, "/a.peer/ChoseThis"):
        raise asyncio.CancelledError
    assert await metrics.next() == ("other", "CANCELLED")

    started = metrics.registry.get_sample_value("grpc_client_attempt_started_total", {"grpc_method": method[1:]})
    assert started == 3


async def test_a_server_that_stops_cancels_its_calls(handlers: Handlers, metrics: Spy) -> None:
    server = grpc.aio.server(interceptors=server_interceptors(metrics))
    methods: Methods = {"Leave": grpc.unary_unary_rpc_method_handler(handlers.unary_unary)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with structlog.testing.capture_logs() as log:
            waiting = asyncio.create_task(failure(channel, "Leave", b"hang", SERVICE))
            await asyncio.wait_for(handlers.hanging.wait(), 10)
            await server.stop(0)
            error = await waiting
            recorded = await metrics.next()

    assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert recorded == ("Leave", "CANCELLED")
    assert log == []


def test_a_call_without_interceptors_would_leak() -> None:
    """The reason for the guard: this is what grpc.aio does by itself."""

    async def exchange() -> str:
        server = grpc.aio.server(interceptors=[CallMetrics(Metrics("server"))])
        methods: Methods = {"unary_unary": grpc.unary_unary_rpc_method_handler(Handlers().unary_unary)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Styles", methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            error = await failure(channel, "unary_unary", b"raise")
        await server.stop(0)
        return str(error.details())

    assert SECRET in asyncio.run(exchange())
