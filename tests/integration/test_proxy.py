"""The man in the middle over real gRPC: what it rewrites, what it must leave alone, and how long it may hold."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import numpy as np
import pytest

from narses.rpc.codec import chunk_frame, chunk_frames
from narses.rpc.convert import task_to_wire
from narses.rpc.status import ALREADY_EXISTS, PERMISSION_DENIED, REASON_KEY, TOKEN_KEY
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses_adversary.hold import Traffic
from narses_adversary.plan import Plan
from tests.adversary.rig import (
    RULE,
    Rows,
    finishes,
    honest_rows,
    logged,
    man_in_the_middle,
    remembered,
    small_task,
)
from tests.cluster import cluster, undisturbed
from tests.oracles import attacks as oracle
from tests.raw import SERVICE, RawSession, refusal, trailer_frame

IPM = {"name": "ipm", "epsilon": 2.0}
SETTINGS: dict[str, Any] = {"n": 6, "f": 2, "rounds": 3}


def forged_ipm(honest_ND: Rows, seen: list[int], members: list[int], epsilon: float = 2.0) -> Rows:
    """What every member sends, from the papers' formula."""
    rows_HD = honest_ND[seen].astype(np.float64)
    remaining = [i for i, worker in enumerate(seen) if worker not in members]
    return oracle.ipm(rows_HD, remaining, epsilon).astype(np.float32)


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
                members = list(plan.members_of(index, [1, 2, 3, 4], 2, seed=3))
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


# -- the hold rule -------------------------------------------------------------------------------------------------------


async def test_updates_are_held_until_all_were_seen() -> None:
    async with cluster(daemons=[[4, 5]], **SETTINGS) as c, man_in_the_middle(c, attack=IPM) as man:
        first, second = await man.raw_session([0, 1]), await man.raw_session([2, 3])
        pulled = await first.pull()
        push = first.push()
        await push.write(*first.update(0, pulled), *first.update(1, pulled))
        hold = await man.until_held(0, 1)
        await c.until(lambda: c.counted() == {"accepted": 2}, "the two workers who do not pass")
        assert not hold.decided.is_set()
        await second.pull()
        other = second.push()
        await other.write(*second.update(2, pulled))
        await man.until_held(0, 1, 2)
        assert not hold.decided.is_set()
        await other.write(*second.update(3, pulled))
        answers = [*await push.finish(), *await other.finish()]
        assert [(answer.worker, answer.reason) for answer in answers] == [(0, ""), (1, ""), (2, ""), (3, "")]
        assert man.pushed() == {"forwarded": 2, "rewritten": 2}
        await c.until_round(1)


async def test_a_client_that_never_waits_for_verdicts_and_one_that_reads_none() -> None:
    async with cluster(daemons=[], **SETTINGS) as c, man_in_the_middle(c, attack=IPM) as man:
        raw = await man.raw_session(list(range(6)))
        pulled = await raw.pull()
        push = raw.push()
        await push.write(*(frame for worker in range(6) for frame in raw.update(worker, pulled)))
        await c.until_round(1)
        push.cancel()
        await raw.play(after=0)
        assert (await c.summary())["outcome"] == "completed"


@pytest.mark.parametrize("held", [True, False], ids=["after its updates were held", "before it sent any"])
async def test_a_killed_daemon_releases_the_hold_at_once_and_costs_no_round(held: bool) -> None:
    # Quorum 5 of 6: without worker 0 the deadline closes the round, with it the round closes at once.
    round_ = {"quorum": 4, "deadline": 4.0}
    async with (
        cluster(daemons=[[5]], **{**SETTINGS, "rounds": 1}, round_=round_) as c,
        man_in_the_middle(c, attack={**IPM, "f_real": 1}, push_timeout=60.0) as man,
    ):
        dies, late, lives = await man.raw_session([0]), await man.raw_session([4]), await man.raw_session([1, 2, 3])
        pulled = await lives.pull()
        alive = lives.push()
        await alive.write(*(frame for worker in (1, 2, 3) for frame in lives.update(worker, pulled)))
        if held:
            await dies.pull()
            dying = dies.push()
            await dying.write(*dies.update(0, pulled))
        hold = await man.until_held(*(0, 1, 2, 3) if held else (1, 2, 3))
        await asyncio.sleep(0)
        assert not hold.decided.is_set(), "worker 4 is waited for"
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await dies.vanish()
        await finishes(hold.decided.wait())
        assert [answer.reason for answer in await alive.finish()] == [""] * 3
        assert loop.time() - begun < 1.5, "half of the deadline would be 2 s"
        if held:
            # It was complete before the daemon died: the server gets it, rewritten, as it would have without a proxy.
            await c.until(lambda: c.counted().get("accepted") == 5, "the dead daemon's update")
        assert [answer.reason for answer in await late.send(late.update(4, await late.pull()))] == [""]
        summary = await c.summary()
        assert (summary["rounds"], summary["outcome"]) == (1, "completed")
        assert man.pushed().get("rewritten", 0) == (1 if held else 0)
        await c.until_joined(0)


async def test_a_worker_killed_while_held_can_join_again_at_once_and_the_round_is_whole() -> None:
    settings = {**SETTINGS, "rounds": 2}
    async with cluster(daemons=[], **settings) as c, man_in_the_middle(c, attack=IPM) as man:
        other = await man.raw_session([3, 4, 5])
        (member,) = await man.carries([0, 1, 2])
        await man.until_held(0, 1, 2)
        await c.kill(member)
        await c.until(lambda: c.counted() == {"accepted": 3}, "what had been sent to be delivered")
        await c.until_joined(3)
        await man.carries([0, 1, 2])
        # The restarted daemon sends the same again: duplicates, because what was forged once is not forged anew.
        await c.until(lambda: c.counted().get("duplicate") == 3, "the same updates again")
        await other.play()
        summary = await c.summary()
        assert summary["outcome"] == "completed"
        assert c.counted() == {"accepted": 12, "duplicate": 3}


async def test_half_of_the_deadline_opens_the_hold_with_what_was_seen() -> None:
    round_ = {"deadline": 2.0, "quorum": 5}
    attack = {**IPM, "f_real": 1}
    async with (
        cluster(daemons=[], **{**SETTINGS, "rounds": 1}, round_=round_, rule=RULE) as c,
        man_in_the_middle(c, attack=attack) as man,
    ):
        with remembered() as rounds:
            silent, raw = await man.raw_session([5]), await man.raw_session([0, 1, 2, 3, 4])
            pulled = await raw.pull()
            task = c.run.task
            push = raw.push()
            await push.write(*(frame for worker in range(5) for frame in raw.update(worker, pulled)))
            hold = await man.until_held(0, 1, 2, 3, 4)
            loop = asyncio.get_running_loop()
            await finishes(hold.decided.wait())
            assert -0.05 < loop.time() - hold.until < 0.5
            opened = hold.until - pulled.header.closes_in_ms / 2000
            assert 0.7 < hold.until - opened <= 1.0
            assert [answer.reason for answer in await push.finish()] == [""] * 5
            assert (await c.summary())["rounds"] == 1
            parameters_D, got_ND = rounds[0]
            honest_ND = honest_rows(task, range(6), 0, parameters_D)
            np.testing.assert_array_equal(got_ND[1:], honest_ND[1:5])
            np.testing.assert_allclose(got_ND[0], forged_ipm(honest_ND, [0, 1, 2, 3, 4], [0]), rtol=1e-6, atol=0)
        await silent.close()


async def test_one_row_is_too_few_and_passes_untouched() -> None:
    async with cluster(daemons=[[1, 2, 3, 4, 5]], **SETTINGS) as c, man_in_the_middle(c, attack=IPM) as man:
        with logged() as lines:
            await man.carries([0])
            assert (await c.summary())["digest"] == await undisturbed(**SETTINGS)
        assert man.pushed() == {"forwarded": 3}
        assert [line["log_level"] for line in lines if line["event"].startswith("too few")] == [
            "warning",
            "info",
            "info",
        ]


@pytest.mark.parametrize("error", [ZeroDivisionError("boom"), MemoryError(), StopIteration(), KeyError("x")])
async def test_an_attack_that_raises_costs_nothing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(self: Any, view: Any, count: int) -> Any:
        raise error

    monkeypatch.setattr("narses_adversary.attacks.ipm.Ipm.__call__", broken)
    async with cluster(daemons=[], **SETTINGS) as c, man_in_the_middle(c, attack=IPM) as man:
        with logged() as lines:
            await man.carries([0, 1, 2], [3, 4, 5])
            assert (await c.summary())["digest"] == await undisturbed(**SETTINGS)
        assert man.pushed() == {"forwarded": 18}
        assert [line["round"] for line in lines if line["event"] == "attack failed"] == [0, 1, 2]


async def test_a_row_that_is_not_finite_is_left_out_of_the_view_and_passes() -> None:
    round_ = {"quorum": 5, "deadline": 3.0}
    async with (
        cluster(daemons=[[4, 5]], **{**SETTINGS, "rounds": 1}, round_=round_, rule=RULE) as c,
        man_in_the_middle(c, attack={**IPM, "f_real": 1}) as man,
    ):
        with remembered() as rounds:
            raw = await man.raw_session([0, 1, 2, 3])
            pulled = await raw.pull()
            task = c.run.task
            nan = np.full(650, np.nan, np.float32).tobytes()
            frames = [frame for worker in (0, 1, 2) for frame in raw.update(worker, pulled)]
            answers = await raw.send([*frames, *raw.update(3, pulled, payload=nan)])
            assert [answer.reason for answer in answers] == ["", "", "", "NON_FINITE"]
            await c.summary()
            parameters_D, got_ND = rounds[0]
            honest_ND = honest_rows(task, range(6), 0, parameters_D)
            np.testing.assert_allclose(got_ND[0], forged_ipm(honest_ND, [0, 1, 2], [0]), rtol=1e-6, atol=0)


# -- streams -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 1000, 2600, 100_000])
async def test_chunks_of_any_size_are_rewritten_alike(size: int) -> None:
    async with (
        cluster(daemons=[], **{**SETTINGS, "rounds": 1}, rule=RULE) as c,
        man_in_the_middle(c, attack=IPM) as man,
    ):
        with remembered() as rounds:
            raw = await man.raw_session(list(range(6)))
            pulled = await raw.pull()
            task = c.run.task
            frames: list[bytes] = []
            for worker in range(6):
                header, *_, trailer = raw.update(worker, pulled)
                frames += [header, *chunk_frames(memoryview(raw.honest(worker, pulled)), size), trailer]
            assert [answer.reason for answer in await raw.send(frames)] == [""] * 6
            await c.summary()
            parameters_D, got_ND = rounds[0]
            honest_ND = honest_rows(task, range(6), 0, parameters_D)
            np.testing.assert_array_equal(got_ND[2:], honest_ND[2:])
            np.testing.assert_allclose(
                got_ND[:2], [forged_ipm(honest_ND, list(range(6)), [0, 1])] * 2, rtol=1e-6, atol=0
            )


async def test_large_updates_go_through_the_threads_and_arrive_whole() -> None:
    settings = {"n": 4, "f": 1, "rounds": 2, "model": {"name": "mlp", "hidden": 4000}, "chunk_bytes": 1 << 20}
    async with cluster(daemons=[], **settings, rule=RULE) as c, man_in_the_middle(c, attack=IPM) as man:
        with remembered() as rounds:
            await c.until(lambda: c.server._service._run is not None, "the run to open")
            task = c.run.task
            await man.carries([0, 1], [2, 3])
            await c.summary()
            for index, (parameters_D, got_ND) in rounds.items():
                honest_ND = honest_rows(task, range(4), index, parameters_D)
                np.testing.assert_array_equal(got_ND[1:], honest_ND[1:])
                np.testing.assert_allclose(got_ND[0], forged_ipm(honest_ND, [0, 1, 2, 3], [0]), rtol=1e-6, atol=0)


def odd(raw: RawSession, worker: int, pulled: Any) -> list[list[bytes]]:
    """Streams that no client of ours sends."""
    good = raw.update(worker, pulled)
    return [
        [good[0], good[1], good[-1]],
        [*good[:-1], chunk_frame(b"more"), good[-1]],
        [good[0], good[1], good[0]],
        [good[0], good[1], b"\xff\xff\xff"],
        [good[0], b"", good[-1]],
        [good[1]],
        [good[-1]],
        [good[0], good[1]],
        [b""],
        [],
        raw.update(worker, pulled, payload=bytes(4)),
        raw.update(worker, pulled, worker=3),
        raw.update(worker, pulled, worker=999),
        raw.update(worker, pulled, round=7),
        raw.update(worker, pulled, base_digest=bytes(32)),
        raw.update(worker, pulled, run_id=bytes(16)),
        raw.update(worker, pulled, dtype=0),
    ]


async def test_odd_frames_of_an_attacked_round_are_the_servers_to_judge() -> None:
    settings = {**SETTINGS, "rounds": 1}
    async with cluster(daemons=[[5]], **settings) as c, man_in_the_middle(c, attack=IPM) as man:
        raw, other = await man.raw_session([0, 1]), await man.raw_session([2, 3])
        direct = await c.raw_session([4])
        pulled, same = await raw.pull(), await direct.pull()
        # These come while the others are waited for: nothing may be held for long, or be repaired in passing.
        for through, straight in zip(odd(raw, 0, pulled), odd(direct, 4, same), strict=True):
            got = await finishes(raw.send(through))
            expected = await direct.send(straight)
            assert [(a.reason, a.code) for a in got] == [(a.reason, a.code) for a in expected]
            assert all(a.worker in (None, 0, 3, 999) for a in got)
        hold = man.hold
        assert hold is not None
        assert not hold.decided.is_set()
        push = other.push()
        await push.write(*other.update(2, pulled), *other.update(3, pulled))
        answers = await raw.send([*raw.update(0, pulled), *raw.update(1, pulled)])
        assert [a.reason for a in answers] == ["", ""]
        assert [a.reason for a in await push.finish()] == ["", ""]
        await direct.play()
        assert (await c.summary())["outcome"] == "completed"


async def test_who_spoke_unreadably_is_not_waited_for() -> None:
    settings = {**SETTINGS, "rounds": 1}
    async with cluster(daemons=[[5]], **settings) as c, man_in_the_middle(c, attack=IPM) as man:
        raw, other = await man.raw_session([0]), await man.raw_session([1, 2, 3, 4])
        pulled = await raw.pull()
        assert (await raw.send(raw.update(0, pulled)[:2]))[-1:] != [("", 0, "", False, 0)]
        answers = await finishes(other.send([f for w in other.workers for f in other.update(w, pulled)]))
        assert [a.reason for a in answers] == [""] * 4
        assert [a.reason for a in await raw.send(raw.update(0, pulled))] == [""]
        assert man.pushed() == {"forwarded": 4, "rewritten": 2}, "a member that comes late is rewritten too"


async def test_a_client_that_vanishes_in_an_update_ends_its_stream_upstream() -> None:
    async with cluster(daemons=[[1, 2, 3, 4, 5]], **SETTINGS) as c, man_in_the_middle(c) as man:
        raw = await man.raw_session([0])
        pulled = await raw.pull()
        push = raw.push()
        await push.write(*raw.update(0, pulled)[:2])
        received = 5 * 2600 + 1024
        await c.until(lambda: c.metric("narses_server_received_bytes_total", rpc="push") == received, "its first chunk")
        await raw.vanish()
        await c.until(lambda: c.metric("narses_server_requests_in_progress", rpc="push") == 0, "the stream's end")
        await c.until(lambda: c.counted().get("incomplete") == 1)
        await c.until_joined(5)
        await man.carries([0])
        assert (await c.summary())["digest"] == await undisturbed(**SETTINGS)


async def test_the_server_going_away_reaches_daemons_as_unavailable_and_they_come_back() -> None:
    async with cluster(daemons=[], **SETTINGS) as gone, man_in_the_middle(gone, attack=IPM) as man:
        raw = await man.raw_session([3, 4, 5])
        (member,) = await man.carries([0, 1, 2])
        await man.until_held(0, 1, 2)
        pull, listening = asyncio.create_task(raw.pull(after=0)), asyncio.create_task(raw.stream.read())
        await gone.until(lambda: gone.metric("narses_server_requests_in_progress", rpc="pull") == 1, "the long poll")
        port = gone.server.port
        await gone.server._server.stop(None)
        for task in (pull, listening):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await finishes(task)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        async with cluster(daemons=[], **SETTINGS, listen=f"127.0.0.1:{port}") as back:
            other = await back.start([3, 4, 5], address=man.address)
            summary = await back.summary()
            assert summary["outcome"] == "completed"
            for daemon in (member, other):
                assert await daemon.ended() is None
                assert daemon.metric("narses_worker_rounds_total", outcome="pushed") == 9


# -- stopping ------------------------------------------------------------------------------------------------------------


async def test_the_proxy_stops_within_two_seconds_and_leaves_nothing_running() -> None:
    before = asyncio.all_tasks()
    async with cluster(daemons=[[4, 5]], **SETTINGS) as c:
        loop = asyncio.get_running_loop()
        async with man_in_the_middle(c, attack=IPM) as man:
            first, second = await man.raw_session([0, 1]), await man.raw_session([2, 3])
            pulled = await first.pull()
            pull = asyncio.create_task(second.pull(after=0))
            push = first.push()
            await push.write(*first.update(0, pulled))
            hold = await man.until_held(0)
            begun = loop.time()
            await man.server.stop()
            assert loop.time() - begun < 3.5
            assert hold.decided.is_set()
            await c.until(lambda: c.counted() == {"accepted": 3}, "what was held was let go")
            with pytest.raises(grpc.aio.AioRpcError):
                await finishes(pull)
        assert not [task for task in asyncio.all_tasks() if "narses_adversary" in repr(task)]
        await c.until_joined(2)
    assert asyncio.all_tasks() <= before


async def test_a_stopped_proxy_is_not_ready_and_its_address_is_free_again() -> None:
    async with cluster(daemons=[], **SETTINGS) as c, man_in_the_middle(c) as man:
        port = man.server.port
        await man.server.stop()
        async with man_in_the_middle(c, listen=f"127.0.0.1:{port}") as again:
            assert again.server.port == port


# -- memory --------------------------------------------------------------------------------------------------------------


async def test_a_flood_behind_a_hold_is_not_read_beyond_the_budget() -> None:
    settings = {**SETTINGS, "rounds": 1, "model": {"name": "mlp", "hidden": 2000}, "chunk_bytes": 1 << 20}
    async with cluster(daemons=[], **settings) as c, man_in_the_middle(c, attack=IPM) as man:
        raw, other = await man.raw_session([0]), await man.raw_session([1, 2, 3, 4, 5])
        pulled = await raw.pull()
        update = raw.update(0, pulled)
        junk = chunk_frame(bytes(1 << 20))
        pushes = [raw.push() for _ in range(3)]

        async def flood(push: Any) -> None:
            await push.write(*update, *[junk] * 64)

        (carried,) = [s for s in man.proxy._sessions.values() if s.workers == frozenset([0])]
        flooding = [asyncio.create_task(flood(push)) for push in pushes]
        await man.until_held(0)
        budget = carried.budget
        await c.until(lambda: budget.used + (1 << 20) > budget.limit, "the budget to be used up")
        received = man.metric("narses_proxy_received_bytes_total", direction="upstream")
        row = len(raw.honest(0, pulled))
        assert budget.used <= budget.limit < 1 * row + (9 << 20)
        assert received <= budget.limit + 3 * (1 << 20), "a frame of each stream may wait for its turn"
        assert not any(task.done() for task in flooding), "three times 64 MiB do not fit"
        for push in pushes:
            push.cancel()
        await asyncio.gather(*flooding, return_exceptions=True)
        assert [a.reason for a in await other.send([f for w in other.workers for f in other.update(w, pulled)])] == [
            ""
        ] * 5
        await raw.play()
        assert (await c.summary())["outcome"] == "completed"
        await c.until(lambda: budget.used == 0, "the budget to be given back")


async def test_rows_are_let_go_when_the_hold_is_decided() -> None:
    async with cluster(daemons=[], **SETTINGS) as c, man_in_the_middle(c, attack=IPM) as man:
        raw = await man.raw_session(list(range(6)))
        pulled = await raw.pull()
        await raw.send([frame for worker in range(6) for frame in raw.update(worker, pulled)])
        hold = man.hold
        assert isinstance(man.traffic, Traffic)
        assert hold is not None
        assert not hold.seen
        assert hold.forged is not None
        assert set(hold.forged.rows) == {0, 1}
