"""When an adversary attacks and as whom."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narses.errors import ConfigError
from narses_adversary import attacks
from narses_adversary.plan import Plan, Schedule


def test_a_table_holds_the_attack_and_its_schedule() -> None:
    plan = Plan.of({"name": "alie", "z": 1.5, "start_round": 5, "stop_round": 8, "f_real": 3})
    assert plan.attack == attacks.make({"name": "alie", "z": 1.5})
    assert (plan.name, plan.start_round, plan.stop_round, plan.members, plan.f_real) == ("alie", 5, 8, "fixed", 3)
    assert [round_ for round_ in range(12) if plan.active(round_)] == [5, 6, 7]


def test_defaults_attack_from_the_first_round_for_ever() -> None:
    plan = Plan.of("sign-flip")
    assert plan == Plan.of({"name": "sign-flip", "stop_round": None, "f_real": None})
    assert plan.active(0)
    assert plan.active(10**9)


def test_fixed_members_are_the_smallest_ids_in_every_round() -> None:
    plan = Plan.of({"name": "sign-flip", "f_real": 3})
    assert {plan.members_of(t, [9, 2, 7, 4, 11], 5, seed=t) for t in range(20)} == {(2, 4, 7)}


@pytest.mark.parametrize(("f", "expected"), [(0, ()), (2, (2, 4)), (3, (2, 4, 7)), (12, (2, 4, 7))])
def test_without_f_real_the_caller_decides(f: int, expected: tuple[int, ...]) -> None:
    assert Plan.of("sign-flip").members_of(0, [7, 4, 2], f, seed=1) == expected


def test_nobody_may_attack() -> None:
    assert Plan.of({"name": "sign-flip", "f_real": 0}).members_of(0, [1, 2], 2, seed=1) == ()


@given(
    candidates=st.lists(st.integers(0, 1000), min_size=1, max_size=30, unique=True),
    seed=st.integers(0, 2**63 - 1),
    round_=st.integers(0, 10**6),
    data=st.data(),
)
def test_random_members_are_a_function_of_seed_round_and_candidates(
    candidates: list[int], seed: int, round_: int, data: st.DataObject
) -> None:
    f = data.draw(st.integers(0, len(candidates)))
    plan = Plan.of({"name": "sign-flip", "members": "random-per-round", "f_real": f})
    chosen = plan.members_of(round_, candidates, 0, seed)
    assert len(set(chosen)) == f
    assert set(chosen) <= set(candidates)
    assert list(chosen) == sorted(chosen)
    assert plan.members_of(round_, data.draw(st.permutations(candidates)), 0, seed) == chosen
    assert (
        Plan.of({"name": "gaussian", "members": "random-per-round"}).members_of(round_, candidates, f, seed) == chosen
    )


def test_random_members_are_fresh_and_uniform() -> None:
    plan = Plan.of({"name": "sign-flip", "members": "random-per-round"})
    chosen = [plan.members_of(t, range(10), 3, seed=1) for t in range(2000)]
    counts = Counter(worker for members in chosen for worker in members)
    assert all(500 < counts[worker] < 700 for worker in range(10))  # 600 expected, five deviations are 102
    pairs = Counter(plan.members_of(t, range(5), 2, seed=1) for t in range(2000))
    assert len(pairs) == 10
    assert all(130 < count < 270 for count in pairs.values())  # 200 expected, five deviations are 67
    assert [plan.members_of(t, range(10), 3, seed=2) for t in range(20)] != chosen[:20]


def test_more_attackers_than_workers_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="attack 'sign-flip': f_real = 4 exceeds the 3 workers this adversary speaks for"
    ):
        Plan.of({"name": "sign-flip", "f_real": 4}).members_of(0, [1, 2, 3], 3, seed=1)


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"name": "alie", "start_rond": 3}, "attack 'alie': unknown key start_rond (value 3)"),
        ({"name": "alie", "start_round": -1}, "attack 'alie': start_round = -1"),
        ({"name": "alie", "start_round": "3"}, "attack 'alie': start_round = '3'"),
        ({"name": "alie", "start_round": 5, "stop_round": 5}, "stop_round = 5 is not after start_round = 5"),
        ({"name": "alie", "members": "all"}, "attack 'alie': members = 'all'"),
        ({"name": "alie", "f_real": -2}, "attack 'alie': f_real = -2"),
        ({"name": "ipm", "f_real": 2}, "attack 'ipm': epsilon is required"),
        ({"f_real": 2}, "expected a table with a name"),
        ("flatter", "unknown attack 'flatter'"),
        (3, "attack: expected a name or a table with a name, got 3"),
    ],
)
def test_a_wrong_plan_is_one_sentence(table: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Plan.of(table)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        Schedule.of([{"runs": "*", "attack": table}])
    assert str(caught.value).startswith("schedule[0] (runs = '*'): ")
    assert text in str(caught.value)


def test_the_first_matching_glob_decides() -> None:
    schedule = Schedule.of(
        [
            {"runs": "alie-z1-*", "attack": {"name": "alie", "z": 1}},
            {"runs": "alie-*", "attack": {"name": "alie", "z": 1.5, "start_round": 10}},
            {"runs": "flip-[ab]", "attack": "label-flip"},
        ]
    )
    assert schedule.plan_for("alie-z1-krum") == Plan.of({"name": "alie", "z": 1})
    assert schedule.plan_for("alie-krum") == Plan.of({"name": "alie", "z": 1.5, "start_round": 10})
    assert schedule.plan_for("flip-b") == Plan.of("label-flip")
    for honest in ("clean-krum", "ALIE-krum", "flip-c", "my-alie-krum", ""):
        assert schedule.plan_for(honest) is None
    assert Schedule.of([]).plan_for("anything") is None


@pytest.mark.parametrize(
    ("tables", "text"),
    [
        ({"runs": "*", "attack": "alie"}, "schedule: expected a list of tables"),
        ("alie", "schedule: expected a list of tables with runs and attack, got 'alie'"),
        (["alie"], "schedule[0]: expected a table with runs and attack, got 'alie'"),
        ([{"runs": "*", "attack": "alie"}, {"runs": "a*"}], "schedule[1]: attack is required"),
        ([{"attack": "alie"}], "schedule[0]: runs is required"),
        ([{"runs": 3, "attack": "alie"}], "schedule[0]: runs = 3 is not a glob"),
        ([{"runs": "*", "attack": "alie", "f": 3}], "schedule[0]: unknown key f (value 3)"),
    ],
)
def test_a_wrong_schedule_is_one_sentence(tables: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Schedule.of(tables)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_import_strings_are_refused_where_the_table_is_not_ones_own() -> None:
    table = {"name": "narses_adversary.attacks.ipm:Ipm", "epsilon": 1}
    assert Plan.of(table).name == "narses_adversary.attacks.ipm:Ipm"
    with pytest.raises(ConfigError, match="own configuration only"):
        Schedule.of([{"runs": "*", "attack": table}], trusted=False)
