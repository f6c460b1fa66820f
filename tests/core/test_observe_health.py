from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from narses.errors import ConfigError
from narses.observe.catalogue import SERVICE
from narses.observe.health import LIVENESS, PROCESS, READINESS, SERVICES, Health

SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


@pytest.fixture
async def health() -> AsyncIterator[Health]:
    health = Health("127.0.0.1:0")
    yield health
    await health.stop(0)


@pytest.fixture
async def stub(health: Health) -> AsyncIterator[Any]:
    port = await health.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield health_pb2_grpc.HealthStub(channel)


async def check(stub: Any, service: str) -> int:
    reply = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return int(reply.status)


def watch(stub: Any, service: str) -> Any:
    return stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=10)


async def read(call: Any) -> int:
    return int((await asyncio.wait_for(call.read(), 5)).status)


async def test_starts_alive_but_not_ready(stub: Any) -> None:
    found = {service: await check(stub, service) for service in SERVICES}

    assert found == {PROCESS: SERVING, LIVENESS: SERVING, READINESS: NOT_SERVING, SERVICE: NOT_SERVING}


async def test_set_is_seen(stub: Any, health: Health) -> None:
    await health.set(SERVICE, True)
    assert await check(stub, SERVICE) == SERVING

    await health.set(SERVICE, False)
    assert await check(stub, SERVICE) == NOT_SERVING


async def test_an_unknown_service_is_not_found(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await check(stub, "nobody")

    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    assert await read(watch(stub, "nobody")) == SERVICE_UNKNOWN


async def test_all_watchers_hear_of_changes_even_when_one_leaves(stub: Any, health: Health) -> None:
    leaver, stayer = watch(stub, READINESS), watch(stub, READINESS)
    assert await read(leaver) == await read(stayer) == NOT_SERVING

    leaver.cancel()
    # a later watch on the same connection is answered after the cancellation was handled
    assert await read(watch(stub, READINESS)) == NOT_SERVING
    await health.set(READINESS, True)

    assert await read(stayer) == SERVING


async def test_draining_is_for_good_and_leaves_liveness(stub: Any, health: Health) -> None:
    await health.set(READINESS, True)
    watcher = watch(stub, READINESS)
    assert await read(watcher) == SERVING

    await health.drain()
    await health.set(READINESS, True)

    assert await read(watcher) == NOT_SERVING
    found = {service: await check(stub, service) for service in SERVICES}
    assert found == {PROCESS: NOT_SERVING, LIVENESS: SERVING, READINESS: NOT_SERVING, SERVICE: NOT_SERVING}


async def test_stop_ends_watches_at_once(stub: Any, health: Health) -> None:
    watcher = watch(stub, LIVENESS)
    assert await read(watcher) == SERVING

    await asyncio.wait_for(health.stop(grace=30), 5)

    assert await read(watcher) == NOT_SERVING
    assert await watcher.read() is grpc.aio.EOF
    assert await watcher.code() is grpc.StatusCode.OK


async def test_an_occupied_port_is_a_configuration_error(health: Health) -> None:
    port = await health.start()

    with pytest.raises(ConfigError, match=rf"health address 127\.0\.0\.1:{port} cannot be used"):
        await Health(f"127.0.0.1:{port}").start()


def test_an_address_without_port_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match="expected host:port"):
        Health("127.0.0.1")


async def test_only_health_is_served(health: Health) -> None:
    port = await health.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        leave: Any = channel.unary_unary(f"/{SERVICE}/Leave")
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await leave(b"", timeout=10)

    assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED
