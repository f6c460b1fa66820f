"""Streams through the proxy: chunks of any size, odd frames, vanished clients, floods, and the end."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest

from narses.rpc.codec import chunk_frame, chunk_frames
from narses_adversary.hold import Traffic
from tests.adversary.rig import (
    IPM,
    RULE,
    finishes,
    forged_ipm,
    honest_rows,
    man_in_the_middle,
    remembered,
)
from tests.cluster import cluster, undisturbed
from tests.raw import RawSession

SETTINGS: dict[str, Any] = {"n": 6, "f": 2, "rounds": 3}


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


async def test_what_a_broken_stream_had_of_the_budget_is_given_back() -> None:
    async with cluster(daemons=[[2, 3, 4, 5]], **SETTINGS) as c, man_in_the_middle(c, attack=IPM) as man:
        raw = await man.raw_session([0, 1])
        pulled = await raw.pull()
        (carried,) = man.proxy._sessions.values()
        push = raw.push()
        await push.write(*raw.update(0, pulled)[:2])
        await man.until(lambda: carried.budget.used > 2600, "the beginning of an update")
        push.cancel()
        await man.until(lambda: carried.budget.used == 0, "its room to be given back")


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
