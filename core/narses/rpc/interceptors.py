"""What surrounds every RPC: a guard that keeps exception texts at home, and the call metrics of gRFC A66.

Nothing here reads, counts or copies messages: handlers of all kinds and styles run as they are, in one try.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import grpc
import structlog

from narses.observe.catalogue import METHODS, OTHER
from narses.observe.logs import clip
from narses.observe.metrics import Metrics

if TYPE_CHECKING:  # generic in the stubs only
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]
    Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]
    Around = Callable[[Context], AbstractAsyncContextManager[None]]

_KINDS = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}
_STATUS_NAMES = {status.value[0]: status.name for status in grpc.StatusCode}
_log = structlog.get_logger(__name__)


def server_interceptors(metrics: Metrics) -> tuple[grpc.aio.ServerInterceptor, ...]:
    """The interceptors of every Narses server, outermost first."""
    return Guard(), CallMetrics(metrics)


class Guard(grpc.aio.ServerInterceptor):
    """Turns an exception that escapes a handler into INTERNAL with a correlation id; its text goes to the log only.

    Without it grpc.aio sends type and text of the exception to the peer. Aborts and cancellation pass untouched.
    """

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler | None:
        method = details.method

        @asynccontextmanager
        async def around(context: Context) -> AsyncIterator[None]:
            try:
                yield
            except grpc.aio.UsageError as error:
                await _refuse(context, method, error)
            except grpc.aio.BaseError:
                raise  # an abort, a connection that is gone, a server that stops: nobody to tell, or told already
            except Exception as error:
                await _refuse(context, method, error)

        try:
            handler = await continuation(details)
            return None if handler is None else _surround(handler, around)
        except Exception as error:
            return _refuser(method, error)


class CallMetrics(grpc.aio.ServerInterceptor):
    """grpc_server_call_started_total, grpc_server_call_duration_seconds; a method that is not ours is "other"."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler | None:
        method = _method_label(details.method)
        handler = await continuation(details)
        self._metrics.inc("grpc_server_call_started_total", grpc_method=method)
        if handler is None:
            self._finished(method, "UNIMPLEMENTED", 0.0)
            return None

        @asynccontextmanager
        async def around(context: Context) -> AsyncIterator[None]:
            started = perf_counter()
            status = "INTERNAL"  # what the guard makes of any exception not named here
            try:
                yield
                status = _status(context)
            except grpc.aio.AbortError:
                status = _status(context)
                raise
            except (asyncio.CancelledError, GeneratorExit, grpc.aio.InternalError):
                status = "CANCELLED"
                raise
            finally:
                self._finished(method, status, perf_counter() - started)

        return _surround(handler, around)

    def _finished(self, method: str, status: str, seconds: float) -> None:
        name = "grpc_server_call_duration_seconds"
        self._metrics.observe(name, seconds, grpc_method=method, grpc_status=status)


@contextmanager
def client_attempt(metrics: Metrics, method: str) -> Iterator[None]:
    """Count one RPC attempt on `method` ("/package.Service/Rpc") and observe how long the block took, by its status.

    A context manager and no client interceptor: with those, grpc.aio passes every written message through a queue and
    a task of its own.
    """
    label = _method_label(method)
    metrics.inc("grpc_client_attempt_started_total", grpc_method=label)
    started = perf_counter()
    status = "UNKNOWN"
    try:
        yield
        status = "OK"
    except grpc.aio.AioRpcError as error:
        status = error.code().name
        raise
    except (asyncio.CancelledError, GeneratorExit):
        status = "CANCELLED"
        raise
    finally:
        seconds = perf_counter() - started
        metrics.observe("grpc_client_attempt_duration_seconds", seconds, grpc_method=label, grpc_status=status)


def _surround(handler: Handler, around: Around) -> Handler:
    """`handler` running inside `around(context)`, in its own style: grpc.aio tells coroutines from async generators."""
    attribute, make = _KINDS[handler.request_streaming, handler.response_streaming]
    inner = getattr(handler, attribute)
    behaviour: Callable[[Any, Context], Any]
    if inspect.isasyncgenfunction(inner):

        async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
            async with around(context), aclosing(inner(request, context)) as responses:
                async for response in responses:
                    yield response

        behaviour = generate
    elif inspect.iscoroutinefunction(inner):

        async def call(request: Any, context: Context) -> Any:
            async with around(context):
                return await inner(request, context)

        behaviour = call
    else:
        raise TypeError(f"{inner!r} is neither a coroutine function nor an async generator function")
    return make(behaviour, handler.request_deserializer, handler.response_serializer)


def _refuser(method: str, error: Exception) -> Handler:
    """A handler for a call whose own handler could not be found or wrapped. It reads nothing: it fits every kind."""

    async def refuse(request: Any, context: Context) -> None:
        await _refuse(context, method, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


async def _refuse(context: Context, method: str, error: Exception) -> None:
    correlation = uuid4().hex
    _log.error("a handler failed", method=clip(method), correlation=correlation, exc_info=error)
    if context.done():
        raise error  # the status has been sent, so the text stays here
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error, correlation id {correlation}")


def _method_label(method: str) -> str:
    name = method.removeprefix("/")
    return name if name in METHODS else OTHER


def _status(context: Context) -> str:
    code: grpc.StatusCode | int | None = context.code()  # None while nobody set it; a number in some grpcio releases
    return code.name if isinstance(code, grpc.StatusCode) else _STATUS_NAMES.get(code or 0, "UNKNOWN")
