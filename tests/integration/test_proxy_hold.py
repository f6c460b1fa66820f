"""The hold rule over real gRPC: who is waited for, what ends it, and what a dead daemon costs."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from tests.adversary.rig import (
    IPM,
    RULE,
    finishes,
    forged_ipm,
    honest_rows,
    logged,
    man_in_the_middle,
    remembered,
)
from tests.cluster import cluster, undisturbed

SETTINGS: dict[str, Any] = {"n": 6, "f": 2, "rounds": 3}


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
