"""From an experiment file to its runs: every combination once, named by what varies, keyed by what its result depends on."""

from __future__ import annotations

from typing import Any

import pytest

from narses.errors import ConfigError
from narses_lab.experiment.cells import Cell, axes_of, cells_of
from narses_lab.experiment.config import ExperimentConfig
from narses_lab.experiment.layout import Layout, layouts


def config(**changes: Any) -> ExperimentConfig:
    """Eleven workers, two of whom may lie."""
    tree: dict[str, Any] = {
        "name": "test",
        "task": {"model": "softmax", "dataset": "digits", "batch": 16},
        "round": {"n": 11, "f": 2, "rounds": 20, "rule": "mean"},
        "optimizer": {"learning_rate": 0.1},
        "evaluate": {"every": 5},
    }
    return ExperimentConfig.of({**tree, **changes}, "test.toml")


def cells(**changes: Any) -> tuple[Cell, ...]:
    return cells_of(config(**changes))


def test_one_setting_is_one_run_per_seed() -> None:
    found = cells(seeds=[3, 5])
    assert [cell.run.task.seed for cell in found] == [3, 5]
    assert [cell.labels for cell in found] == [{"task.seed": "3"}, {"task.seed": "5"}]
    assert len({cell.key for cell in found}) == 2


def test_every_combination_seed_by_seed() -> None:
    found = cells(
        seeds=2,
        matrix={"round": {"rule": ["mean", "krum"]}, "attack": ["none", "alie"]},
        attack={"name": "alie", "z": 1},
    )
    assert [(c.run.task.seed, c.run.round.rule["name"], c.attack is not None) for c in found] == [
        (seed, rule, attacked) for seed in (1, 2) for rule in ("mean", "krum") for attacked in (False, True)
    ]


def test_a_quoted_path_is_the_same_as_sections() -> None:
    assert [c.key for c in cells(matrix={"round.f": [0, 1]})] == [c.key for c in cells(matrix={"round": {"f": [0, 1]}})]


def test_a_table_of_the_matrix_replaces_the_whole_one() -> None:
    (found,) = cells(
        round={"n": 11, "f": 2, "rounds": 9, "rule": {"name": "krum", "p": 1.5}},
        matrix={"round": {"rule": [{"name": "krum"}]}},
    )
    assert found.run.round.rule == {"name": "krum"}


def test_cases_change_several_keys_together_and_the_matrix_is_finer() -> None:
    cases = [
        {"label": "few", "round": {"f": 1, "rule": "krum"}, "attack": "alie"},
        {"label": "many", "round": {"f": 5}, "attack": {"name": "ipm", "epsilon": 10.0}},
    ]
    found = cells(cases=cases, matrix={"round": {"rounds": [7, 9]}}, attack={"name": "alie", "z": 1.0})
    assert [(c.labels["case"], c.run.round.f, c.run.round.rounds) for c in found] == [
        ("few", 1, 7), ("few", 1, 9), ("many", 5, 7), ("many", 5, 9)
    ]  # fmt: skip
    assert [c.attack.f_real for c in found if c.attack] == [1, 1, 5, 5]


def test_fields_of_an_attack_mean_nothing_without_one() -> None:
    matrix = {"attack": ["none", {"name": "alie"}], "attack.z": [0.5, 1.0]}
    found = cells(matrix=matrix)
    assert [(c.attack and c.attack.table.get("z")) for c in found] == [None, None, 0.5, 1.0]
    assert found[0].key == found[1].key


def test_nobody_attacks_where_f_real_is_zero() -> None:
    found = cells(attack={"name": "alie", "z": 1.0}, matrix={"attack.f_real": [0, 2]})
    assert found[0].attack is None
    assert found[0].key == cells()[0].key
    assert found[1].attack is not None


def test_the_key_is_what_the_result_depends_on() -> None:
    (base,) = cells()
    same = [
        cells(title="another", daemons=5, transport="local", device="cpu", adversary_seed=9)[0],
        cells(matrix={"round": {"rule": ["median", "mean"]}})[1],
        cells(checkpoint={"every": 3})[0],
    ]
    assert {cell.key for cell in same} == {base.key}
    other = [
        cells(seeds=[2]),
        cells(optimizer={"learning_rate": 0.2}),
        cells(attack={"name": "alie", "z": 1.0}),
        cells(attack={"name": "alie", "z": 1.0}, adversary_seed=1),
        cells(attack={"name": "alie", "z": 1.0, "where": "all"}),
        cells(attack={"name": "alie", "z": 1.0, "start_round": 3}),
    ]
    assert len({base.key, *(found[0].key for found in other)}) == 1 + len(other)


def test_names_are_folders_and_tell_what_varies() -> None:
    found = cells(matrix={"round": {"rule": ["mean", {"name": "krum", "p": 1}, {"name": "krum"}], "f": [1, 2]}})
    names = [cell.name for cell in found]
    assert names[0].startswith("mean-f=1-seed=1-")
    assert names[2].startswith("krum-p-=-1-f=1-seed=1-")
    assert len(set(names)) == 6
    assert all("/" not in name and " " not in name for name in names)


def test_where_the_attackers_stand() -> None:
    alie = {"name": "alie", "z": 1.0}
    own, everywhere, some, drawn = (
        cells(attack={**alie, **more})[0].attack
        for more in (
            {},
            {"where": "all"},
            {"where": "intercepted", "behind": "3-6"},
            {"where": "all", "members": "random-per-round", "f_real": 1},
        )
    )
    assert own
    assert everywhere
    assert some
    assert drawn
    assert (own.byzantine, own.behind) == ((0, 1), ())
    assert (everywhere.byzantine, everywhere.behind) == ((0, 1), tuple(range(11)))
    assert (some.byzantine, some.behind) == ((3, 4), (3, 4, 5, 6))
    assert (drawn.byzantine, drawn.f_real) == (tuple(range(11)), 1)


def test_warnings_have_numbers() -> None:
    (found,) = cells(
        attack={"name": "ipm", "epsilon": 1.0, "f_real": 4},
        round={"n": 7, "f": 2, "rounds": 5, "rule": "krum"},
        evaluate=None,
    )
    assert found.warnings == (
        'krum with f = 2 needs 7 of n = 7 updates: 1 silent workers stop this run under absent = "refuse"',
        "f_real = 4 workers attack but f = 2 are declared: no guarantee of the rule holds",
        "no [evaluate] section: the runs report no accuracy",
    )


ALIE: dict[str, Any] = {"name": "alie", "z": 1.0}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a rule that cannot": (
        {"matrix": {"round": {"rule": ["mean", "bulyan"], "f": [2, 3]}}},
        r"round\.rule = bulyan, round\.f = 3.*Bulyan with f = 3 needs n >= 15",
    ),
    "an unknown key": ({"round": {"n": 11, "rounds": 5, "ful": 2}}, r"unknown key round\.ful"),
    "an unknown section": (
        {"matrix": {"rule": ["mean"]}},
        r"matrix\.rule: cannot be varied; expected a key of task, round",
    ),
    "seeds in the matrix": (
        {"matrix": {"task": {"seed": [1, 2]}}},
        r"matrix\.task\.seed: cannot be varied; set seeds = ",
    ),
    "a seed in the task": (
        {"task": {"model": "softmax", "dataset": "digits", "batch": 4, "seed": 3}},
        r"task\.seed = 3: set seeds = \[3\]",
    ),
    "no list": ({"matrix": {"round": {"f": 2}}}, r"matrix\.round\.f = 2: expected a list"),
    "an empty list": ({"matrix": {"round": {"f": []}}}, r"matrix\.round\.f: the list of values is empty"),
    "a value twice": ({"matrix": {"round": {"f": [1, 1]}}}, r"round\.f: '1' is there twice"),
    "seeds twice": ({"seeds": [1, 1]}, r"seeds = \[1, 1\]: expected one or more different ones"),
    "no seed": ({"seeds": []}, r"seeds = \[\]"),
    "a case without label": ({"cases": [{"round": {"f": 1}}]}, "every one needs a label"),
    "an unknown attack": ({"attack": "alien"}, "unknown attack 'alien'"),
    "an unknown place": ({"attack": {**ALIE, "where": "here"}}, r'attack\.where = \'here\': expected "own"'),
    "behind nothing": (
        {"attack": {**ALIE, "behind": "0-3"}},
        r'attack\.behind is for where = "intercepted", got where = "own"',
    ),
    "nobody behind": ({"attack": {**ALIE, "where": "intercepted"}}, r"attack\.behind is required"),
    "too few behind": (
        {"attack": {**ALIE, "where": "intercepted", "behind": "10"}},
        r"behind names 1 worker\(s\) up to 10: expected",
    ),
    "strangers behind": ({"attack": {**ALIE, "where": "intercepted", "behind": "9-11"}}, r"ids below n = 11"),
    "too many attackers": ({"attack": {**ALIE, "f_real": 12}}, r"attack\.f_real = 12: expected 0 to n = 11"),
    "an attack after the end": (
        {"attack": {**ALIE, "start_round": 20}},
        r"start_round = 20 is not before the end, rounds = 20",
    ),
    "no z": ({"attack": {"name": "alie", "f_real": 6}}, 'z = "auto" has no value for n = 11, m = 6'),
    "poison in a proxy": ({"attack": {"name": "label-flip", "where": "all"}}, 'needs where = "own", got "all"'),
    "server momentum and parameters": (
        {
            "task": {"model": "softmax", "dataset": "digits", "batch": 4, "update": "parameters"},
            "optimizer": {"learning_rate": 0.1, "momentum": 0.9},
        },
        r"optimizer\.momentum = 0\.9 while workers push parameters.*task\.local_momentum",
    ),
    "a name that is a path": ({"name": "../x"}, "name = "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake(mistake: str) -> None:
    changes, sentence = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=sentence):
        cells(**changes)


def test_axes_keep_the_order_of_the_file_and_end_with_the_seed() -> None:
    axes = axes_of(config(matrix={"attack": ["none"], "round": {"rule": ["mean"]}}))
    assert [axis.key for axis in axes] == ["attack", "round.rule", "task.seed"]


def test_one_set_of_daemons_plays_what_it_can() -> None:
    attacks = ["none", ALIE, {**ALIE, "where": "all", "label": "all"}, {"name": "ipm", "epsilon": 1.0}]
    found = layouts(cells(matrix={"attack": attacks, "round": {"rule": ["mean", "krum"]}}))
    assert {layout: len(group) for layout, group in found.items()} == {
        Layout(11, own=(0, 1)): 6,  # the honest runs too
        Layout(11, behind=tuple(range(11))): 2,
    }
    assert Layout(11, own=(0, 1), behind=(5, 6, 7)).honest(2) == {
        "honest-1": [2, 3, 4],
        "honest-2": [8, 9, 10],
        "behind-1": [5],
        "behind-2": [6, 7],
    }
