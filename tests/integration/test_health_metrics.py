"""Watching a run from outside: grpc.health.v1 and /metrics, over their own ports, tell the truth."""

from __future__ import annotations

import asyncio
import contextlib
import time
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from blockbuster import BlockingError, blockbuster_ctx
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from narses.observe.catalogue import SERVICE, of_role
from narses.observe.health import LIVENESS, PROCESS, READINESS
from narses_server.app import Server
from tests.cluster import Cluster, cluster, experiment, undisturbed
from tests.raw import SECONDS

FOUR: dict[str, Any] = {"n": 4, "rounds": 6}
WATCHED: dict[str, Any] = {
    **FOUR,
    "health": {"listen": "127.0.0.1:0"},
    "metrics": {"listen": "127.0.0.1:0"},
    "daemons": [[0, 1, 2]],
}
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@contextlib.asynccontextmanager
async def health(c: Cluster) -> AsyncIterator[Any]:
    """A stub of the cluster's health service."""
    address = f"127.0.0.1:{c.server.surroundings.ports['health']}"
    async with grpc.aio.insecure_channel(address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


async def scrape(c: Cluster) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """/metrics as Prometheus reads it: sample name -> labels -> value."""
    url = f"http://127.0.0.1:{c.server.surroundings.ports['metrics']}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=SECONDS).read().decode())
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return samples


async def test_check_follows_a_run() -> None:
    async with cluster(**WATCHED) as c, health(c) as stub:

        async def check(service: str) -> int:
            response = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=SECONDS)
            return int(response.status)

        raw = await c.raw_session([3])
        await c.until_round(0)
        assert [await check(service) for service in (PROCESS, LIVENESS, READINESS, SERVICE)] == [SERVING] * 4
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await check("another.Service")
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        await raw.play()
        await c.summary()
        assert [await check(service) for service in (READINESS, SERVICE)] == [NOT_SERVING] * 2, "no run, no pushes"
        assert await check(LIVENESS) == SERVING, "nobody should restart it"


@pytest.mark.parametrize("service", [READINESS, SERVICE])
async def test_watch_follows_a_run_to_its_drain(service: str) -> None:
    async with cluster(**{**WATCHED, "daemons": []}) as c, health(c) as stub:
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=service))

        async def following() -> int:
            response = await asyncio.wait_for(watch.read(), SECONDS)
            return int(response.status)

        first = await following()
        if first == NOT_SERVING:  # the run was not open yet
            first = await following()
        assert first == SERVING
        await c.raw_session([0])
        c.server.stop.set()
        assert await following() == NOT_SERVING
        assert (await c.summary())["outcome"] == "drained"


async def test_metrics_count_the_run() -> None:
    async with cluster(**WATCHED) as c:
        raw = await c.raw_session([3])
        await c.until(lambda: c.counted().get("accepted") == 3, "the honest updates")
        during = await scrape(c)
        assert during["narses_server_round"][()] == 0
        assert during["narses_server_workers"][("state", "registered"),] == 4
        assert during["narses_server_workers"][("state", "connected"),] == 4
        assert during["narses_server_requests_in_progress"][("rpc", "join"),] == 2
        assert during["narses_server_update_buffer_bytes"][()] == c.run.matrix.bytes_reserved
        assert during["narses_server_model_parameters"][()] == 650
        assert during["narses_server_quorum_required"][()] == 4
        await raw.send(raw.update(3, await raw.pull(), byte_length=1))
        await raw.play()
        await c.summary()
        for rpc in ("join", "pull", "push", "leave"):
            await c.until(lambda rpc=rpc: c.metric("narses_server_requests_in_progress", rpc=rpc) == 0, f"every {rpc}")
        after = await scrape(c)
        assert after["narses_server_runs_total"][("outcome", "completed"),] == 1
        assert after["narses_server_rounds_total"][("outcome", "completed"),] == 6
        assert after["narses_server_round_duration_seconds_count"][()] == 6
        assert after["narses_server_pushes_total"][("outcome", "accepted"),] == 24
        assert after["narses_server_pushes_total"][("outcome", "rejected"),] == 1
        assert after["narses_server_pushes_rejected_total"][("reason", "wrong_length"),] == 1
        assert sum(after["narses_server_pushes_rejected_total"].values()) == 1
        assert after["narses_server_worker_pushes_total"][("outcome", "accepted"), ("worker", "3")] == 6
        assert sum(after["narses_server_worker_pushes_total"].values()) == 25
        assert sum(after["narses_server_worker_considered_total"].values()) == 24
        assert after["narses_server_received_bytes_total"][("rpc", "push"),] == 24 * 650 * 4
        pulls = after["narses_server_pulls_total"][("outcome", "ok"),]
        assert after["narses_server_sent_bytes_total"][("rpc", "pull"),] == pulls * 650 * 4
        push = ("grpc_method", f"{SERVICE}/Push")
        assert after["grpc_server_call_duration_seconds_count"][push, ("grpc_status", "OK")] == 13
        for phase in ("collect", "aggregate", "apply", "publish"):
            assert after["narses_server_round_phase_duration_seconds_count"][("phase", phase),] == 6
        assert after["narses_server_worker_push_lag_seconds"][("worker", "3"),] > 0


async def test_every_metric_of_the_catalogue_is_exported() -> None:
    async with cluster(**WATCHED) as c:
        await c.until(lambda: c.server._service._run is not None, "the roster, which names the workers")
        text = await scrape(c)
        for metric in of_role("server"):
            suffix = "_count" if metric.kind == "histogram" else ""
            if metric.preset and metric.kind != "info":
                assert text.get(metric.name + suffix), metric.name


async def test_a_workers_own_metrics() -> None:
    async with cluster(**FOUR, daemons=[[0, 1, 2, 3]]) as c:
        await c.summary()
        (member,) = c.daemons
        await member.ended()
        assert member.metric("narses_worker_rounds_total", outcome="pushed") == 24
        assert member.metric("narses_worker_samples_total") == 24 * 16
        assert member.metric("narses_worker_sent_bytes_total", rpc="push") == 24 * 650 * 4
        pulled = member.metric("narses_worker_received_bytes_total", rpc="pull") / (650 * 4)
        assert pulled in (6, 7), "the final parameters may be missed: the session ends with the run"
        assert member.metric("narses_worker_step_duration_seconds_count", phase="push") == 6
        assert member.metric("narses_worker_connected") == 0
        assert member.metric("narses_worker_train_loss") > 0
        assert member.metric("narses_worker_gradient_norm") > 0
        assert member.metric("narses_worker_round") == 5
        for rpc, count in (("Pull", pulled), ("Push", 6)):
            labels = {"grpc_method": f"{SERVICE}/{rpc}", "grpc_status": "OK"}
            assert member.metric("grpc_client_attempt_duration_seconds_count", **labels) == count


async def test_nothing_blocks_the_loop() -> None:
    """No sleep, lock, file or socket call that could block is made on the loop's thread while rounds are played.

    Start-up and shutdown, when nobody waits, and the buffered lines of the result files are left out.
    """
    expected = await undisturbed(**FOUR)
    async with cluster(**WATCHED, evaluate=2) as c:
        raw = await c.raw_session([3])
        raw.honest(3, await raw.pull())  # loads what it needs
        await c.until(lambda: c.counted().get("accepted") == 3, "the honest updates")
        with blockbuster_ctx():
            await raw.play()
            assert (await c.summary())["digest"] == expected


async def test_the_detector_of_blocking_calls_works_here() -> None:
    with blockbuster_ctx(), pytest.raises(BlockingError):
        time.sleep(0.001)  # noqa: ASYNC251 - to be caught


async def test_an_address_that_is_taken() -> None:
    async with cluster(**WATCHED) as c:
        taken = {
            "listen": c.address,
            "metrics": {"listen": f"127.0.0.1:{c.server.surroundings.ports['metrics']}"},
            "health": {"listen": f"127.0.0.1:{c.server.surroundings.ports['health']}"},
        }
        for key, value in taken.items():
            with pytest.raises(Exception, match="cannot be used") as error:
                await Server(experiment(**FOUR, **{key: value})).serve()
            assert type(error.value).__name__ == "ConfigError"
            assert "choose another" in str(error.value)
