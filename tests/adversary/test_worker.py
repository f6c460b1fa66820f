"""The corrupted cohort: honest rows for those who are honest, forged ones for the members, the same ones when asked again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from narses.observe.metrics import Metrics
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses.seeding import derive
from narses_adversary.config import AdversaryConfig
from narses_adversary.craft import Row
from narses_adversary.plan import Plan
from narses_adversary.worker import CorruptedCohort
from narses_worker.client import Pulled
from narses_worker.cohort import Cohort
from tests.adversary.rig import honest_rows, logged, round_header, small_task, value
from tests.oracles import attacks as oracle

TASK = small_task()
WORKERS = (2, 3, 5)
PARAMETERS = np.linspace(-1, 1, TASK.dimension).astype(np.float32)


@pytest.fixture
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("adversary")


def cohort(
    executor: Executor, metrics: Metrics, task: Any = TASK, before: CorruptedCohort | None = None, **tree: Any
) -> CorruptedCohort:
    config = AdversaryConfig.of({"insecure": True, "workers": list(WORKERS), "device": "cpu", **tree})
    return CorruptedCohort(config, task, executor, metrics, before)


def pulled(round_: int = 0) -> Pulled:
    return Pulled(round_header(round_), PARAMETERS)


async def produced(of: Cohort, round_: int = 0) -> dict[int, Row]:
    return {worker: row_D.copy() async for worker, row_D in of.produce(pulled(round_))}


def verdict(worker: int, round_: int, code: int = 0, reason: str = "") -> pb.PushResponse:
    return pb.PushResponse(worker=worker, round=round_, code=code, reason=reason)


async def test_alie_sends_its_own_mean_less_z_deviations(executor: Executor, metrics: Metrics) -> None:
    liar = cohort(executor, metrics, attack={"name": "alie", "z": 1.5})
    rows = await produced(liar)
    honest_KD = honest_rows(TASK, WORKERS, 0, PARAMETERS).astype(np.float64)
    expected_D = (honest_KD.mean(axis=0) - 1.5 * honest_KD.std(axis=0)).astype(np.float32)
    assert list(rows) == list(WORKERS)
    for row_D in rows.values():
        np.testing.assert_allclose(row_D, expected_D, rtol=1e-6, atol=1e-9)
        np.testing.assert_array_equal(row_D, rows[2])
    assert value(metrics, "narses_adversary_active") == 1
    assert value(metrics, "narses_adversary_colluders") == 3
    assert value(metrics, "narses_adversary_observed_updates") == 3
    assert value(metrics, "narses_adversary_strength") == 1.5
    assert value(metrics, "narses_adversary_forge_duration_seconds_count", attack="alie") == 1
    assert value(metrics, "narses_adversary_forge_duration_seconds_sum", attack="alie") > 0
    assert value(metrics, "narses_adversary_forged_distance_ratio") > 0
    assert value(metrics, "narses_adversary_info", attack="alie") == 1


async def test_only_members_lie_and_the_statistics_are_theirs(executor: Executor, metrics: Metrics) -> None:
    liar = cohort(executor, metrics, attack={"name": "alie", "z": 1.0, "f_real": 2})
    rows = await produced(liar)
    honest_KD = honest_rows(TASK, WORKERS, 0, PARAMETERS)
    np.testing.assert_array_equal(rows[5], honest_KD[2])
    expected_D = oracle.alie(honest_KD.astype(np.float64), [0, 1], 1.0, 0, -1)
    np.testing.assert_array_equal(rows[2], expected_D.astype(np.float32))
    np.testing.assert_array_equal(rows[3], rows[2])


async def test_the_attack_lasts_from_start_round_to_stop_round(executor: Executor, metrics: Metrics) -> None:
    liar = cohort(executor, metrics, attack={"name": "sign-flip", "start_round": 1, "stop_round": 3})
    active = []
    for round_ in range(4):
        rows = await produced(liar, round_)
        active.append(not np.array_equal(rows[2], honest_rows(TASK, [2], round_, PARAMETERS)[0]))
        assert value(metrics, "narses_adversary_active") == active[-1]
        assert value(metrics, "narses_adversary_colluders") == 3 * active[-1]
    assert active == [False, True, True, False]


async def test_random_members_differ_over_rounds_as_the_plan_says(executor: Executor, metrics: Metrics) -> None:
    attack = {"name": "sign-flip", "f_real": 1, "members": "random-per-round"}
    liar = cohort(executor, metrics, attack=attack, seed=4)
    drawn = set()
    for round_ in range(8):
        rows = await produced(liar, round_)
        honest_KD = honest_rows(TASK, WORKERS, round_, PARAMETERS)
        liars = tuple(w for w, row_D in zip(WORKERS, honest_KD, strict=True) if not np.array_equal(rows[w], row_D))
        assert liars == Plan.of(attack).members_of(round_, WORKERS, 3, derive(4, "run", TASK.seed))
        drawn.add(liars)
    assert len(drawn) > 1


async def test_label_flip_poisons_the_members_batches_only(executor: Executor, metrics: Metrics) -> None:
    liar = cohort(executor, metrics, attack={"name": "label-flip", "f_real": 1, "members": "random-per-round"}, seed=4)
    for round_ in range(4):
        rows = await produced(liar, round_)
        (member,) = Plan.of({"name": "label-flip", "f_real": 1, "members": "random-per-round"}).members_of(
            round_, WORKERS, 3, derive(4, "run", TASK.seed)
        )
        for worker, honest_D in zip(WORKERS, honest_rows(TASK, WORKERS, round_, PARAMETERS), strict=True):
            assert np.array_equal(rows[worker], honest_D) == (worker != member)
        liar.settled([verdict(worker, round_) for worker in WORKERS])
    assert value(metrics, "narses_adversary_updates_total", attack="label-flip", outcome="accepted") == 4


@pytest.mark.parametrize("tree", [{}, {"schedule": [{"runs": "other", "attack": "sign-flip"}]}])
async def test_without_a_plan_it_is_an_honest_cohort(
    executor: Executor, metrics: Metrics, tree: dict[str, Any]
) -> None:
    liar, honest = cohort(executor, metrics, **tree), Cohort(TASK, WORKERS, executor, device="cpu")
    for round_ in range(2):
        mine, theirs = await produced(liar, round_), await produced(honest, round_)
        assert list(mine) == list(theirs)
        for worker in WORKERS:
            np.testing.assert_array_equal(mine[worker], theirs[worker])
    liar.settled([verdict(2, 1)])
    assert value(metrics, "narses_adversary_active") == 0
    assert value(metrics, "narses_adversary_colluders") == 0
    assert value(metrics, "narses_adversary_info", attack="none") == 1
    assert value(metrics, "narses_adversary_updates_total", attack="none", outcome="accepted") == 0


async def test_a_round_asked_for_again_gets_the_same_bytes_also_after_a_new_session(
    executor: Executor, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counting(self: Any, view: Any, count: int) -> Any:
        """An attack that is different each time it is called."""
        view.memory["calls"] = view.memory.get("calls", 0) + 1
        return view.updates_HD[:1].repeat(count, 1) * view.memory["calls"]

    monkeypatch.setattr("narses_adversary.attacks.sign_flip.SignFlip.__call__", counting)
    with logged() as lines:
        liar = cohort(executor, metrics, attack="sign-flip")
        await produced(liar, 0)
        first = await produced(liar, 1)
        again = await produced(liar, 1)
        after = cohort(executor, metrics, before=liar, attack="sign-flip")
        anew = await produced(after, 1)
        later = await produced(after, 2)
    for worker in WORKERS:
        np.testing.assert_array_equal(again[worker], first[worker])
        np.testing.assert_array_equal(anew[worker], first[worker])
        assert not np.array_equal(later[worker], first[worker])
    assert value(metrics, "narses_adversary_forge_duration_seconds_count", attack="sign-flip") == 3
    assert [line["knows"] for line in lines if line["event"] == "attack"] == ["own"], "said once a run"
    other = cohort(executor, metrics, before=after, task=small_task(run_id=bytes(16)), attack="sign-flip")
    assert other.crafter is not after.crafter, "another run starts afresh"
    assert value(metrics, "narses_adversary_strength") == 0


async def test_an_attack_that_fails_leaves_the_cohort_honest(
    executor: Executor, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, view: Any, count: int) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr("narses_adversary.attacks.alie.Alie.__call__", broken)
    liar = cohort(executor, metrics, attack={"name": "alie", "z": 1.0})
    with logged() as lines:
        rows = await produced(liar)
    for worker, honest_D in zip(WORKERS, honest_rows(TASK, WORKERS, 0, PARAMETERS), strict=True):
        np.testing.assert_array_equal(rows[worker], honest_D)
    liar.settled([verdict(2, 0)])
    assert value(metrics, "narses_adversary_updates_total", attack="alie", outcome="accepted") == 0, "it did not lie"
    assert [line["event"] for line in lines] == ["attack failed"]


async def test_verdicts_on_lies_are_counted_by_outcome(executor: Executor, metrics: Metrics) -> None:
    liar = cohort(executor, metrics, attack={"name": "alie", "z": 1.0, "f_real": 2})
    await produced(liar, 4)
    liar.settled(
        [
            verdict(2, 4),
            verdict(3, 4, 10, "WRONG_ROUND"),
            verdict(3, 4, 3, "NON_FINITE"),
            verdict(5, 4),  # honest in this round
            verdict(2, 3),  # of another round
        ]
    )
    counts = {
        outcome: value(metrics, "narses_adversary_updates_total", attack="alie", outcome=outcome)
        for outcome in ("accepted", "late", "rejected")
    }
    assert counts == {"accepted": 1, "late": 1, "rejected": 1}


async def test_an_abandoned_round_ends_the_honest_computation_at_once(executor: Executor, metrics: Metrics) -> None:
    liar = cohort(executor, metrics)
    ended = asyncio.Event()
    honest = Cohort.produce

    async def watched(self: Cohort, of: Pulled) -> Any:
        try:
            async for item in honest(self, of):
                yield item
        finally:
            ended.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cohort, "produce", watched)
        async with aclosing(liar.produce(pulled())) as updates:
            await anext(updates)
        assert ended.is_set(), "not whenever the garbage collector comes by"
