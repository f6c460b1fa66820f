"""Adversary daemons among honest ones over real gRPC: what the server gets from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from narses.seeding import derive
from narses_adversary.plan import Plan
from tests.adversary.rig import RULE, corrupt, honest_rows, man_in_the_middle, remembered
from tests.cluster import cluster, undisturbed
from tests.oracles import attacks as oracle

SETTINGS: dict[str, Any] = {"n": 6, "f": 3, "rounds": 4}
ALIE = {"name": "alie", "z": 1.5}
LIARS = [3, 4, 5]


async def test_alie_reaches_the_server_as_its_own_mean_less_z_deviations() -> None:
    async with cluster(daemons=[[0, 1, 2]], **SETTINGS, rule=RULE) as c:
        with remembered() as rounds:
            await c.until(lambda: c.server._service._run is not None, "the run to open")
            task = c.run.task
            liar = await corrupt(c, LIARS, attack={**ALIE, "start_round": 1, "stop_round": 3})
            await c.summary()
            assert sorted(rounds) == [0, 1, 2, 3]
            for index, (parameters_D, got_ND) in rounds.items():
                honest_ND = honest_rows(task, range(6), index, parameters_D)
                np.testing.assert_array_equal(got_ND[:3], honest_ND[:3])
                if index in (1, 2):
                    # of 3, 4, 5 alone: it has seen nobody else's
                    forged_D = oracle.alie(honest_ND.astype(np.float64), LIARS, 1.5, 0, -1).astype(np.float32)
                    np.testing.assert_allclose(got_ND[3], forged_D, rtol=1e-6, atol=0)
                    np.testing.assert_array_equal(got_ND[4], got_ND[3])
                    np.testing.assert_array_equal(got_ND[5], got_ND[3])
                else:
                    np.testing.assert_array_equal(got_ND[3:], honest_ND[3:])
        assert await liar.ended() is None
        assert liar.metric("narses_adversary_updates_total", attack="alie", outcome="accepted") == 6
        assert liar.metric("narses_adversary_forge_duration_seconds_count", attack="alie") == 2
        assert liar.metric("narses_adversary_observed_updates") == 3
        assert liar.metric("narses_adversary_active") == 0, "the last round was not attacked"
        assert liar.metric("narses_worker_rounds_total", outcome="pushed") == 12


@pytest.mark.parametrize(
    "settings", [{}, {"schedule": [{"runs": "other", "attack": ALIE}]}, {"attack": {**ALIE, "f_real": 0}}]
)
async def test_without_a_matching_plan_it_is_an_honest_daemon(settings: dict[str, Any]) -> None:
    async with cluster(daemons=[[0, 1, 2]], **SETTINGS) as c:
        liar = await corrupt(c, LIARS, **settings)
        assert (await c.summary())["digest"] == await undisturbed(**SETTINGS)
        assert await liar.ended() is None
        assert liar.metric("narses_adversary_active") == 0
        assert liar.metric("narses_adversary_colluders") == 0


async def test_run_after_run_each_by_its_own_plan() -> None:
    runs = [{"name": "a"}, {"name": "alie-1"}, {"name": "b"}, {"name": "flip"}]
    schedule = [{"runs": "alie-*", "attack": ALIE}, {"runs": "flip", "attack": "label-flip"}]
    async with cluster(daemons=[[0, 1, 2]], **SETTINGS, runs=runs) as c:
        liar = await corrupt(c, LIARS, schedule=schedule)
        digests = [summary["digest"] for summary in await c.summaries()]
        honest = await undisturbed(**SETTINGS)
        assert digests[0] == digests[2] == honest
        assert len({*digests}) == 3
        for attack in ("alie", "label-flip"):
            assert await liar.ended() is None
            assert liar.metric("narses_adversary_updates_total", attack=attack, outcome="accepted") == 12


@pytest.mark.parametrize("name", ["sign-flip", "label-flip"])
async def test_members_drawn_per_round_differ_and_others_stay_honest(name: str) -> None:
    attack = {"name": name, "f_real": 1, "members": "random-per-round"}
    async with cluster(daemons=[[0, 1, 2]], **{**SETTINGS, "rounds": 6}, rule=RULE) as c:
        with remembered() as rounds:
            await c.until(lambda: c.server._service._run is not None, "the run to open")
            task = c.run.task
            await corrupt(c, LIARS, attack=attack, seed=2)
            await c.summary()
            drawn = set()
            for index, (parameters_D, got_ND) in rounds.items():
                honest_ND = honest_rows(task, range(6), index, parameters_D)
                liars = tuple(i for i in range(6) if not np.array_equal(got_ND[i], honest_ND[i]))
                assert liars == Plan.of(attack).members_of(index, LIARS, 3, derive(2, "run", 1))
                if name == "sign-flip":
                    np.testing.assert_array_equal(got_ND[liars[0]], -honest_ND[liars[0]])
                drawn.add(liars)
        assert len(drawn) > 1


async def test_noise_forged_before_the_connection_broke_is_the_same_noise_after_it() -> None:
    async with cluster(daemons=[], **SETTINGS) as c:
        raw = await c.raw_session([0, 1, 2])
        liar = await corrupt(c, LIARS, attack="gaussian")
        await c.until(lambda: c.counted() == {"accepted": 3}, "the forged updates of round 0")
        liar.wire.break_connections()
        await c.until(lambda: c.counted() == {"accepted": 3, "duplicate": 3}, "the same updates again")
        await raw.play()
        assert (await c.summary())["outcome"] == "completed"
        assert await liar.ended() is None
        assert c.counted() == {"accepted": 24, "duplicate": 3}
        assert liar.metric("narses_adversary_forge_duration_seconds_count", attack="gaussian") == 4


async def test_a_restarted_adversary_forges_the_same_again() -> None:
    async with cluster(daemons=[], **SETTINGS) as c:
        raw = await c.raw_session([0, 1, 2])
        liar = await corrupt(c, LIARS, attack=ALIE, seed=3)
        await c.until(lambda: c.counted() == {"accepted": 3}, "the forged updates of round 0")
        await c.kill(liar)
        await c.until_joined(3)
        await corrupt(c, LIARS, attack=ALIE, seed=3)
        await c.until(lambda: c.counted() == {"accepted": 3, "duplicate": 3}, "the same updates again")
        await raw.play()
        assert (await c.summary())["outcome"] == "completed"


async def test_an_adversary_and_a_proxy_in_one_run_each_see_their_own() -> None:
    settings = {**SETTINGS, "f": 4}
    async with cluster(daemons=[], **settings, rule=RULE) as c:
        attack = {"name": "ipm", "epsilon": 2.0, "f_real": 1}
        with remembered() as rounds:
            await c.until(lambda: c.server._service._run is not None, "the run to open")
            task = c.run.task
            async with man_in_the_middle(c, attack=attack) as man:
                await man.carries([0, 1, 2])
                await corrupt(c, LIARS, attack=ALIE)
                await c.summary()
            for index, (parameters_D, got_ND) in rounds.items():
                honest_ND = honest_rows(task, range(6), index, parameters_D).astype(np.float64)
                expected_ND = honest_ND.copy()
                expected_ND[0] = oracle.ipm(honest_ND, [1, 2], 2.0)
                expected_ND[3:] = oracle.alie(honest_ND, LIARS, 1.5, 0, -1)
                np.testing.assert_allclose(got_ND, expected_ND.astype(np.float32), rtol=1e-6, atol=0)


async def test_what_an_adversary_sends_through_the_proxy_is_rewritten_like_anyones() -> None:
    attack = {"name": "ipm", "epsilon": 2.0, "f_real": 1}
    async with (
        cluster(daemons=[[0, 1, 2]], **{**SETTINGS, "rounds": 2}) as c,
        man_in_the_middle(c, attack=attack) as man,
    ):
        liar = await corrupt(c, LIARS, man.address, attack=ALIE)
        assert (await c.summary())["outcome"] == "completed"
        assert await liar.ended() is None
        assert man.pushed() == {"forwarded": 4, "rewritten": 2}
        assert liar.metric("narses_adversary_updates_total", attack="alie", outcome="accepted") == 6
