"""Faults: killed daemons, broken connections, missing and lying workers, a server that drains."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narses.errors import RefusedError, UnreachableError
from narses.rpc.v1 import parameter_server_pb2 as pb
from tests.cluster import cluster, undisturbed

LONG: dict[str, Any] = {"n": 6, "f": 1, "rule": "median", "rounds": 50}
SHORT: dict[str, Any] = {"n": 4, "rounds": 4}


# -- killed and restarted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victims", [[0], [1], [0, 1]], ids=["first", "second", "both"])
async def test_a_daemon_killed_and_restarted_does_not_change_a_bit(victims: list[int]) -> None:
    async with cluster(**LONG, daemons=[[0, 1, 2, 3], [4, 5]]) as c:
        await c.until_round(7)
        for victim in victims:
            await c.kill(c.daemons[victim])
        await c.until_joined(6 - sum(len(c.daemons[victim].workers) for victim in victims))
        assert c.run.current_round < 50
        for victim in victims:
            await c.restart(c.daemons[victim])
        summary = await c.summary()
    assert (summary["outcome"], summary["rounds"]) == ("completed", 50)
    assert summary["digest"] == await undisturbed(**LONG)


async def test_killed_again_and_again() -> None:
    async with cluster(**LONG, daemons=[[0, 1, 2], [3, 4, 5]]) as c:
        for index in (3, 9, 10, 11, 30):
            await c.until_round(index)
            await c.kill(c.daemons[-1])
            await c.restart(c.daemons[-1])
        assert (await c.summary())["digest"] == await undisturbed(**LONG)


async def test_a_killed_worker_may_return_in_another_daemon() -> None:
    async with cluster(**LONG, daemons=[[0, 1, 2], [3, 4, 5]]) as c:
        await c.until_round(5)
        await c.kill(c.daemons[1])
        for workers in ([3], [4, 5]):
            await c.start(workers)
        assert (await c.summary())["digest"] == await undisturbed(**LONG)


async def test_a_daemon_reconnects_by_itself() -> None:
    async with cluster(**LONG, daemons=[[0, 1, 2], [3, 4, 5]]) as c:
        for index in (3, 10, 20):
            await c.until_round(index)
            c.daemons[0].wire.break_connections()
        assert (await c.summary())["digest"] == await undisturbed(**LONG)
        assert await c.daemons[0].ended() is None
        assert c.daemons[0].metric("narses_worker_rpc_retries_total", rpc="join", reason="unreachable") >= 3


async def test_updates_of_before_and_after_a_crash_are_one_vote() -> None:
    """Worker 3 is in, its daemon dies and computes it again: the same bytes, so a duplicate."""
    async with cluster(**SHORT, daemons=[[0, 1]]) as c:
        silent = await c.raw_session([2])
        mortal = await c.raw_session([3])
        await mortal.send(mortal.update(3, await mortal.pull()))
        await mortal.vanish()
        await c.until_joined(3)
        await c.start([3])
        await c.until(lambda: c.counted().get("duplicate") == 1, "the repeated update")
        await silent.play()
        assert (await c.summary())["digest"] == await undisturbed(**SHORT)
        assert c.counted() == {"accepted": 16, "duplicate": 1}


# -- the same id twice -----------------------------------------------------------------------------------------------------


async def test_a_second_daemon_for_a_live_worker_gives_up() -> None:
    async with cluster(**SHORT, daemons=[[0, 1, 2]]) as c:
        raw = await c.raw_session([3])
        begun = time.monotonic()
        second = await c.start([2], session_timeout=0.3)
        error = await second.ended()
        assert isinstance(error, RefusedError)
        assert error.reason == "SESSION_ALIVE"
        assert error.message.startswith("worker 2 already has a live session from ipv4:127.0.0.1:")
        assert time.monotonic() - begun > 0.3
        assert second.metric("narses_worker_rpc_retries_total", rpc="join", reason="refused") >= 1
        await raw.play()
        assert (await c.summary())["digest"] == await undisturbed(**SHORT)


async def test_a_second_daemon_takes_over_when_the_first_dies() -> None:
    async with cluster(**SHORT, daemons=[[0, 1, 2]]) as c:
        raw = await c.raw_session([3])
        second = await c.start([0, 1, 2])
        await second.until(lambda: second.metric("narses_worker_rpc_retries_total", rpc="join", reason="refused") > 0)
        await c.kill(c.daemons[0])
        await raw.play()
        assert (await c.summary())["digest"] == await undisturbed(**SHORT)
        assert await second.ended() is None


# -- missing workers -------------------------------------------------------------------------------------------------------


async def test_wait_restarts_the_deadline_until_the_worker_comes() -> None:
    policy = {"deadline": 0.1, "on_deadline": "wait"}
    async with cluster(**SHORT, round_=policy, daemons=[[0, 1, 2]]) as c:
        raw = await c.raw_session([3])
        await c.until(lambda: c.metric("narses_server_rounds_total", outcome="quorum_timeout") >= 3, "three deadlines")
        assert c.run.current_round == 0
        assert len(c.run.round.accepted) == 3, "rows are kept"
        await raw.play()
        assert (await c.summary())["digest"] == await undisturbed(**SHORT)


async def test_skip_opens_the_next_round_on_the_same_parameters(tmp_path: Path) -> None:
    policy = {"deadline": 0.6, "on_deadline": "skip"}
    async with cluster(**SHORT, round_=policy, output=str(tmp_path), daemons=[[0, 1, 2]]) as c:
        raw = await c.raw_session([3])
        first = await raw.pull()
        second = await raw.pull(after=0)
        assert (second.header.round, second.header.digest) == (1, first.header.digest)
        # The missing worker is late for the skipped round, and then in time.
        (late,) = await raw.send(raw.update(3, first))
        assert late.reason == "WRONG_ROUND"
        await raw.play(after=0)
        summary = await c.summary()
        assert (summary["outcome"], summary["rounds"]) == ("completed", 4)
        skipped = c.metric("narses_server_rounds_total", outcome="quorum_timeout")
        assert skipped >= 1
        assert c.metric("narses_server_rounds_total", outcome="completed") == 4 - skipped
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert lines[0] == {"round": 0, "outcome": "skipped", "why": "3 of 4 at the deadline, quorum is 4"}
    assert [line["round"] for line in lines] == [0, 1, 2, 3]


async def test_skip_with_nobody_ends_where_it_began() -> None:
    policy = {"deadline": 0.02, "on_deadline": "skip"}
    async with cluster(**SHORT, round_=policy, start_timeout=0.05, daemons=[]) as c:
        nothing = await c.summary()
    async with cluster(**SHORT, daemons=[]) as c:
        await c.until(lambda: c.server._service._run is not None, "the run to open")
        c.server.stop.set()
        assert (await c.summary())["digest"] == nothing["digest"]
    assert nothing["outcome"] == "completed"


async def test_absent_workers_count_among_the_liars() -> None:
    """Krum with n = 7 and f = 2 has no slack; with one worker absent it is called with n = 6 and f = 1."""
    seven: dict[str, Any] = {"n": 7, "rule": "krum", "rounds": 3, "start_timeout": 0.2, "daemons": [range(6)]}
    policy = {"deadline": 0.2, "quorum": 6}
    digests = []
    for f, absent in ((2, "byzantine"), (1, "refuse")):
        async with cluster(**seven, f=f, round_={**policy, "absent": absent}) as c:
            summary = await c.summary()
            assert (summary["outcome"], summary["rounds"]) == ("completed", 3)
            assert c.metric("narses_server_round_participants") == 6
            assert c.metric("narses_server_worker_considered_total", worker="6") == 0
            digests.append(summary["digest"])
    assert digests[0] == digests[1], "the same rows and the same f"


# -- lying workers ---------------------------------------------------------------------------------------------------------


async def test_non_finite_updates_of_the_few_are_absent_ones(tmp_path: Path) -> None:
    """One liar sends NaN in every round: the deadline closes each without it, and the record says why."""
    policy = {"deadline": 0.2, "quorum": 3}
    four: dict[str, Any] = {"n": 4, "f": 1, "rule": "median", "rounds": 2, "round_": policy}
    async with cluster(**four, output=str(tmp_path), daemons=[[0, 1, 2]]) as c:
        raw = await c.raw_session([3])
        for index in range(2):
            pulled = await raw.pull(after=index - 1 if index else None)
            poison = np.full(650, np.nan, np.float32).tobytes()
            (answer,) = await raw.send(raw.update(3, pulled, poison))
            assert answer.reason == "NON_FINITE"
        summary = await c.summary()
        assert summary["outcome"] == "completed"
        assert c.counted() == {"accepted": 6, "non_finite": 2}
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [line["refused"] for line in lines] == [{"3": "NON_FINITE"}] * 2
    assert [line["participants"] for line in lines] == [3, 3]


async def test_non_finite_updates_of_many_mean_divergence() -> None:
    async with cluster(n=4, f=1, rule="median", rounds=2, daemons=[[0, 1]]) as c:
        raw = await c.raw_session([2, 3])
        pulled = await raw.pull()
        poison = np.full(650, np.inf, np.float32).tobytes()
        await raw.send([frame for worker in (2, 3) for frame in raw.update(worker, pulled, poison)])
        summary = await c.summary()
        assert (summary["outcome"], summary["rounds"]) == ("diverged", 0)
        assert c.metric("narses_server_runs_total", outcome="failed") == 1


# -- a server that stops ---------------------------------------------------------------------------------------------------


async def test_a_drain_finishes_the_open_round_and_tells_everybody() -> None:
    async with cluster(**{**LONG, "rounds": 10_000}, daemons=[[0, 1, 2], [3, 4]]) as c:
        raw = await c.raw_session([5])
        pulled = await raw.pull()
        c.server.stop.set()
        await c.until(lambda: c.run._drain_at is not None, "the drain")
        await raw.send(raw.update(5, pulled))
        summary = await c.summary()
        assert (summary["outcome"], summary["rounds"]) == ("drained", 1)
        assert summary["digest"] == await undisturbed(**{**LONG, "rounds": 1})
        assert (await raw.notice()).kind == pb.NOTICE_KIND_DRAINING
        for member in c.daemons:
            member.daemon.stop.set()
            assert await member.ended() is None


async def test_a_drain_cuts_a_round_that_does_not_end() -> None:
    async with cluster(**SHORT, drain_timeout=0.2, daemons=[[0, 1, 2]]) as c:
        await c.raw_session([3])
        await c.until_round(0)
        c.server.stop.set()
        summary = await c.summary()
        assert (summary["outcome"], summary["rounds"]) == ("drained", 0)


async def test_a_drain_before_anybody_came() -> None:
    async with cluster(**SHORT, runs=[{"name": "a"}, {"name": "b"}], daemons=[]) as c:
        c.server.stop.set()
        summaries = await c.summaries()
        assert [summary["outcome"] for summary in summaries] in ([], ["drained"]), "the second run is not begun"


async def test_a_server_that_is_gone_is_given_up_on() -> None:
    async with cluster(**SHORT, daemons=[[0, 1, 2]]) as c:
        lonely = await c.start([3], connect_timeout=0.3)
        await c.until_round(1)
        await lonely.wire.cut()
        error = await lonely.ended()
        assert isinstance(error, UnreachableError)
        assert "no server answered at 127.0.0.1:" in str(error)
        assert "check the address and that the server runs" in str(error)
        await c.start([3])
        assert (await c.summary())["digest"] == await undisturbed(**SHORT)
