"""The man in the middle over real gRPC: what it rewrites, and what it must leave alone."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import numpy as np
import pytest

from narses.rpc.codec import chunk_frame
from narses.rpc.convert import task_to_wire
from narses.rpc.status import ALREADY_EXISTS, PERMISSION_DENIED, REASON_KEY, TOKEN_KEY
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses.seeding import derive
from narses_adversary.plan import Plan
from tests.adversary.rig import (
    IPM,
    RULE,
    finishes,
    forged_ipm,
    honest_rows,
    logged,
    man_in_the_middle,
    remembered,
    small_task,
)
from tests.cluster import cluster, undisturbed
from tests.raw import SERVICE, refusal, trailer_frame

SETTINGS: dict[str, Any] = {"n": 6, "f": 2, "rounds": 3}


# -- vantage point: intercepted, and all ---------------------------------------------------------------------------------


async def test_ipm_sends_the_mean_of_what_was_seen_of_others_backwards() -> None:
    async with cluster(daemons=[[4, 5]], **SETTINGS, rule=RULE) as c, man_in_the_middle(c, attack=IPM) as man:
        with remembered() as rounds, logged() as lines:
            await c.until(lambda: c.server._service._run is not None, "the run to open")
            task = c.run.task
            await man.carries([0, 1], [2, 3])
            await c.summary()
            assert len(rounds) == 3
            for index, (parameters_D, got_ND) in rounds.items():
                honest_ND = honest_rows(task, range(6), index, parameters_D)
                expected_ND = honest_ND.copy()
                # f = 2 members, the smallest ids that pass; 4 and 5 do not pass and must not enter the mean
                expected_ND[[0, 1]] = forged_ipm(honest_ND, [0, 1, 2, 3], [0, 1])
                np.testing.assert_array_equal(got_ND[2:], expected_ND[2:], "others' bytes changed")
                np.testing.assert_allclose(got_ND[:2], expected_ND[:2], rtol=1e-6, atol=0)
                np.testing.assert_array_equal(got_ND[0], got_ND[1])
        assert man.pushed() == {"forwarded": 6, "rewritten": 6}
        assert man.metric("narses_proxy_rewritten_outcomes_total", outcome="accepted") == 6
        assert man.metric("narses_proxy_rewritten_outcomes_total", outcome="rejected") == 0
        assert man.metric("narses_proxy_rewrite_duration_seconds_count", attack="ipm") == 3
        assert man.metric("narses_proxy_injected_delay_seconds_count") == 12
        said = [line for line in lines if line["event"] == "attack"]
        assert [(line["knows"], line["estimate"]) for line in said] == [("intercepted", False)]


async def test_where_all_pass_the_proxy_knows_all_and_rewrites_only_its_own() -> None:
    attack = {**IPM, "f_real": 2, "members": "random-per-round"}
    plan = Plan.of(attack)
    settings: dict[str, Any] = {"workers": "1-4", "attack": attack, "seed": 3}
    async with (
        cluster(daemons=[], **{**SETTINGS, "rounds": 6}, rule=RULE) as c,
        man_in_the_middle(c, **settings) as man,
    ):
        with remembered() as rounds, logged() as lines:
            await c.until(lambda: c.server._service._run is not None, "the run to open")
            task = c.run.task
            await man.carries([0, 1, 2], [3, 4, 5])
            await c.summary()
            attackers = set()
            for index, (parameters_D, got_ND) in rounds.items():
                honest_ND = honest_rows(task, range(6), index, parameters_D)
                members = list(plan.members_of(index, [1, 2, 3, 4], 2, derive(3, "run", task.seed)))
                changed = [i for i in range(6) if not np.array_equal(got_ND[i], honest_ND[i])]
                assert changed == members
                expected_D = forged_ipm(honest_ND, list(range(6)), members)
                np.testing.assert_allclose(got_ND[members[0]], expected_D, rtol=1e-6, atol=0)
                attackers.add(tuple(members))
        assert len(attackers) > 1, "drawn afresh each round"
        assert [line["knows"] for line in lines if line["event"] == "attack"] == ["all"]


async def test_the_attack_lasts_from_start_round_to_stop_round() -> None:
    attack = {**IPM, "start_round": 1, "stop_round": 3}
    settings = {**SETTINGS, "rounds": 4}
    async with cluster(daemons=[], **settings, rule=RULE) as c, man_in_the_middle(c, attack=attack) as man:
        with remembered() as rounds:
            await c.until(lambda: c.server._service._run is not None, "the run to open")
            task = c.run.task
            await man.carries(list(range(6)))
            await c.summary()
            attacked = [
                not np.array_equal(got_ND, honest_rows(task, range(6), index, parameters_D))
                for index, (parameters_D, got_ND) in rounds.items()
            ]
    assert attacked == [False, True, True, False]
    assert man.metric("narses_proxy_injected_delay_seconds_count") == 12, "nothing is held in the other rounds"


@pytest.mark.parametrize(
    "settings",
    [{}, {"schedule": [{"runs": "other-*", "attack": IPM}]}, {"attack": {**IPM, "f_real": 0}}],
    ids=["no attack", "another run's", "nobody attacks"],
)
async def test_without_a_matching_plan_the_run_is_the_run_without_proxy(settings: dict[str, Any]) -> None:
    async with cluster(daemons=[], **SETTINGS) as c, man_in_the_middle(c, **settings) as man:
        members = await man.carries([0, 1, 2], [3, 4, 5])
        assert (await c.summary())["digest"] == await undisturbed(**SETTINGS)
        assert c.counted() == {"accepted": 18}
        for member in members:
            assert await member.ended() is None
            assert member.metric("narses_worker_rounds_total", outcome="pushed") == 9
        payload = 4 * 650 * 6 * 3
        assert man.pushed() == {"forwarded": 18}
        assert man.metric("narses_proxy_injected_delay_seconds_count") == 0
        assert man.metric("narses_proxy_received_bytes_total", direction="upstream") == payload
        assert man.metric("narses_proxy_sent_bytes_total", direction="upstream") == payload
        down = man.metric("narses_proxy_received_bytes_total", direction="downstream")
        assert down == man.metric("narses_proxy_sent_bytes_total", direction="downstream")
        assert down in [4 * 650 * pulls for pulls in (6, 7, 8)], (
            "three sets for each of two daemons, at most a last one"
        )
        assert man.metric("narses_proxy_messages_total", rpc="pull", action="forwarded") >= 6
        assert man.metric("narses_proxy_messages_total", rpc="join", action="forwarded") == 2
        await c.until(lambda: man.metric("narses_proxy_connections", side="upstream") == 0)
        assert man.metric("narses_proxy_connections", side="downstream") == 0


async def test_run_after_run_each_by_its_own_plan() -> None:
    runs = [{"name": "a"}, {"name": "ipm-1"}, {"name": "b"}]
    schedule = [{"runs": "ipm-*", "attack": IPM}]
    async with cluster(daemons=[], **SETTINGS, runs=runs) as c, man_in_the_middle(c, schedule=schedule) as man:
        await man.carries([0, 1, 2], [3, 4, 5])
        digests = [summary["digest"] for summary in await c.summaries()]
        honest = await undisturbed(**SETTINGS)
        assert digests[0] == digests[2] == honest
        assert digests[1] != honest
        assert man.pushed() == {"forwarded": 18 + 12 + 18, "rewritten": 6}
        assert len(man.proxy._traffic) == 1, "runs that are over are let go"


# -- what passes as it is ------------------------------------------------------------------------------------------------


async def test_join_is_refused_through_the_proxy_as_by_the_server() -> None:
    async with cluster(daemons=[], **SETTINGS) as c, man_in_the_middle(c, attack=IPM) as man:
        raw = await man.raw_session([0, 1])
        for workers, reason, code in (
            ([1], "SESSION_ALIVE", ALREADY_EXISTS),
            ([6], "UNKNOWN_WORKER", PERMISSION_DENIED),
        ):
            direct = await c.raw_session([])
            with pytest.raises(grpc.aio.AioRpcError) as plain:
                await direct.join(workers)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await man.raw_session(workers)
            got, expected = refusal(caught.value), refusal(plain.value)
            assert (got.reason, got.code) == (expected.reason, expected.code) == (reason, code)
            if reason == "UNKNOWN_WORKER":
                assert got.message == expected.message
        assert man.metric("narses_proxy_upstream_failures_total", grpc_status="ALREADY_EXISTS") == 1
        assert set(man.traffic._live) == {0, 1}, "who was refused is not waited for"
        await raw.leave()
        await c.until_joined(0)
        await man.raw_session([0, 1])


async def test_pulls_pass_with_their_refusals_and_not_modified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narses_server.service.POLL_SECONDS", 0.2)
    async with cluster(daemons=[[2, 3, 4, 5]], **SETTINGS) as c, man_in_the_middle(c, attack=IPM) as man:
        raw = await man.raw_session([0, 1])
        direct = await c.raw_session([])
        direct.task, direct.metadata = raw.task, raw.metadata
        there, here = await direct.pull(), await raw.pull()
        there.header.closes_in_ms = here.header.closes_in_ms
        assert here.header == there.header
        np.testing.assert_array_equal(here.parameters_D, there.parameters_D)
        again = await raw.pull(after=0)
        assert (again.header.not_modified, again.header.round) == (True, 0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw.pull(run_id=bytes(16))
        assert refusal(caught.value).reason == "UNKNOWN_RUN"
        raw.metadata = ((TOKEN_KEY, b"nobody's"),)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw.pull()
        assert refusal(caught.value).reason == "NO_SESSION"
        assert (await raw.send([]))[-1].reason == "NO_SESSION"


class Odd:
    """A server that says what ours never does."""

    def __init__(self) -> None:
        self.over = asyncio.Event()

    async def join(self, request: bytes, context: Any) -> None:
        await context.write(pb.JoinResponse(task=task_to_wire(small_task()), session=b"odd").SerializeToString())
        await self.over.wait()
        context.set_trailing_metadata((("another-key", "kept"),))

    async def pull(self, request: bytes, context: Any) -> None:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "so they say", ((REASON_KEY, "NEW"), ("x-bin", b"\0")))

    async def push(self, request: Any, context: Any) -> None:
        await context.write(b"")
        context.set_trailing_metadata((("of-push", "kept"),))

    async def leave(self, request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.DATA_LOSS, "lost", (("retry-in", "5"),))
        return b""


async def test_status_details_and_trailing_metadata_pass() -> None:
    odd, server = Odd(), grpc.aio.server()
    handlers: dict[str, Any] = {
        "Join": grpc.unary_stream_rpc_method_handler(odd.join),
        "Pull": grpc.unary_stream_rpc_method_handler(odd.pull),
        "Push": grpc.stream_stream_rpc_method_handler(odd.push),
        "Leave": grpc.unary_unary_rpc_method_handler(odd.leave),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.strip("/"), handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    token: Any = ((TOKEN_KEY, b"odd"),)
    try:
        async with (
            cluster(daemons=[], **SETTINGS) as c,
            man_in_the_middle(c, server=f"127.0.0.1:{port}") as man,
            grpc.aio.insecure_channel(man.address) as plain,
        ):
            channel: Any = plain
            join = channel.unary_stream(SERVICE + "Join")(b"")
            assert await join.read() is not grpc.aio.EOF
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_stream(SERVICE + "Pull")(b"", metadata=token).read()
            error = caught.value
            assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "so they say")
            assert {(REASON_KEY, "NEW"), ("x-bin", b"\0")} <= {*(error.trailing_metadata() or ())}
            push = channel.stream_stream(SERVICE + "Push")(metadata=token)
            assert await push.read() == b""
            assert await push.read() is grpc.aio.EOF
            assert ("of-push", "kept") in tuple(await push.trailing_metadata())
            odd.over.set()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(SERVICE + "Leave")(b"", metadata=token)
            assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.DATA_LOSS, "lost")
            assert ("retry-in", "5") in tuple(caught.value.trailing_metadata() or ())
            assert await join.read() is grpc.aio.EOF
            assert ("another-key", "kept") in tuple(await join.trailing_metadata())
    finally:
        await server.stop(None)


class Caller:
    """The context of an RPC that has the session's token, and keeps how it was aborted."""

    def __init__(self, token: bytes) -> None:
        self.token = token
        self.aborted: tuple[Any, ...] = ()

    def invocation_metadata(self) -> Any:
        return ((TOKEN_KEY, self.token),)

    async def abort(self, *status: Any) -> None:
        self.aborted = status
        raise grpc.aio.AbortError


async def test_a_daemon_that_leaves_hears_the_servers_last_word_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(daemons=[], **SETTINGS) as c, man_in_the_middle(c) as man:
        await man.raw_session([0])
        ((token, carried),) = man.proxy._sessions.items()

        async def answered(*_: Any, **__: Any) -> bytes:
            return b"gone"

        monkeypatch.setattr(man.proxy, "_leave", answered)
        leaving = asyncio.create_task(man.proxy.leave(b"", cast(Any, Caller(token))))
        await asyncio.wait((leaving,), timeout=0.05)
        assert not leaving.done()
        carried.over.set()
        assert await finishes(leaving) == b"gone"


async def test_a_server_that_goes_after_its_last_word_has_ended_the_session() -> None:
    async with cluster(daemons=[], **SETTINGS) as c, man_in_the_middle(c) as man:
        await man.raw_session([0])
        ((token, carried),) = man.proxy._sessions.items()
        for finished, code, reasons in (
            (False, grpc.StatusCode.UNAVAILABLE, []),
            (True, grpc.StatusCode.FAILED_PRECONDITION, [(REASON_KEY, "NO_SESSION")]),
        ):
            carried.finished = finished
            for status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                caller = Caller(token)
                error = grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(), "gone")
                with pytest.raises(grpc.aio.AbortError):
                    await man.proxy._fail(error, cast(Any, caller), carried)
                assert caller.aborted[0] is code
                assert list(caller.aborted[2]) == reasons


async def test_every_refusal_of_an_update_passes_and_honest_work_goes_on() -> None:
    async with cluster(daemons=[[2, 3, 4, 5]], **SETTINGS) as c, man_in_the_middle(c) as man:
        raw = await man.raw_session([0, 1])
        pulled = await raw.pull()
        good = raw.update(0, pulled)
        bad = [
            (raw.update(0, pulled, round=7), "ROUND_NOT_OPEN"),
            (raw.update(0, pulled, base_digest=bytes(32)), "WRONG_BASE"),
            (raw.update(0, pulled, dtype=0), "WRONG_DTYPE"),
            (raw.update(3, pulled, payload=bytes(2600)), "UNKNOWN_WORKER"),
            (raw.update(0, pulled, payload=bytes(4)), "WRONG_LENGTH"),
            (raw.update(0, pulled, payload=b"\xff" * 2600), "NON_FINITE"),
            ([*good[:-1], trailer_frame(bytes(32))], "CHECKSUM"),
            ([good[0], good[1], good[-1]], "WRONG_LENGTH"),
            ([*good[:-1], chunk_frame(b"more"), good[-1]], "TOO_LARGE"),
        ]
        for frames, reason in bad:
            assert [answer.reason for answer in await raw.send(frames)] == [reason]
        for frames in ([good[1]], [good[0], good[0]], [b"\xff\xff"], [b""], [good[-1]], [good[0], b"\x0f"]):
            assert (await raw.send(frames))[-1].reason == "PROTOCOL"
        await raw.play()
        assert (await c.summary())["digest"] == await undisturbed(**SETTINGS)
