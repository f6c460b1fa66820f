"""Reading the runs, and the verdict on the margins."""

import json
import statistics

import pytest

from narses_lab.demo import ATTACKS, RULES, Cell
from narses_lab.errors import DaemonError
from narses_lab.results import Result, Spread, summarise, verdicts
from tests.lab.results_for import everything, result

COLLAPSED = {("mean", "ipm"): 0.1}


def judged(finals, seeds=1):
    return [verdict.passed for verdict in verdicts(summarise(everything(finals, seeds)))]


def test_collapse_and_defence_pass():
    assert judged(COLLAPSED) == [True, True]


@pytest.mark.parametrize(("attacked", "passed"), [(0.69, True), (0.71, False), (0.95, False)])
def test_the_mean_must_lose_twenty_points_under_ipm(attacked, passed):
    assert judged({("mean", "ipm"): attacked})[0] is passed


def test_the_mean_under_alie_has_no_say_in_the_collapse():
    assert judged({("mean", "alie"): 0.1})[0] is False


@pytest.mark.parametrize("rule", ["median", "krum", "bulyan"])
@pytest.mark.parametrize(("attacked", "passed"), [(0.86, True), (0.84, False)])
def test_one_robust_rule_within_five_points_suffices(rule, attacked, passed):
    others = {(other, "alie"): 0.2 for other in ("median", "krum", "bulyan") if other != rule}

    assert judged({**COLLAPSED, **others, (rule, "ipm"): attacked}) == [True, passed]


def test_two_rules_that_each_survive_one_attack_do_not_suffice():
    broken = {("median", "alie"): 0.2, ("krum", "ipm"): 0.2, ("bulyan", "ipm"): 0.2}

    assert judged({**COLLAPSED, **broken}) == [True, False]


def test_the_mean_is_no_robust_rule_however_well_it_does():
    broken = {(rule, "alie"): 0.2 for rule in ("median", "krum", "bulyan")}

    assert judged(broken)[1] is False


def test_the_yardstick_is_the_mean_without_attack():
    # Krum loses nothing of its own clean accuracy, but its own is ten points below the mean's
    krum = {("krum", attack): 0.8 for attack in ATTACKS}
    broken = {(rule, "alie"): 0.2 for rule in ("median", "bulyan")}

    assert judged({**krum, **broken})[1] is False


def test_seeds_are_averaged_before_judging():
    results = [result("mean", "none", seed, 0.9) for seed in (1, 2)]
    results += [result("mean", "ipm", 1, 0.5), result("mean", "ipm", 2, 0.8)]  # 40 and 10 points lost: 25

    assert verdicts(summarise(results))[0].passed is True


def test_what_was_not_played_is_not_judged():
    only_krum = [result("krum", attack) for attack in ATTACKS]
    only_mean = [result("mean", attack) for attack in ATTACKS]

    assert [v.passed for v in verdicts(summarise(only_krum))] == [None, None]
    assert [v.word for v in verdicts(summarise(only_mean))] == ["FAIL", "SKIP"]


def test_summary_is_the_mean_and_sample_deviation_over_seeds():
    finals = [0.91, 0.87, 0.95]
    results = [result("krum", "alie", seed, final, best=final + 0.01) for seed, final in enumerate(finals, 1)]
    results[1] = result("krum", "alie", 2, 0.87, best=0.88, outcome="diverged")

    (summary,) = summarise(results).values()

    assert summary.final.mean == pytest.approx(sum(finals) / 3)
    assert summary.final.std == pytest.approx(statistics.stdev(finals))
    assert summary.best.mean == pytest.approx(sum(finals) / 3 + 0.01)
    assert (summary.seeds, summary.diverged) == (3, 1)
    assert str(summary.final) == "91.0 ± 4.0"


def test_one_seed_has_no_spread():
    assert Spread.of([0.5]) == Spread(0.5, None)
    assert str(Spread.of([0.5])) == "50.0"


def test_the_table_is_in_the_order_of_rules_and_attacks():
    shuffled = list(reversed(everything({})))

    assert list(summarise(shuffled)) == [(rule, attack) for rule in RULES for attack in ATTACKS]


SUMMARY = {
    "run": "krum/alie/seed-2",
    "outcome": "completed",
    "rounds": 4,
    "rounds_per_second": 33.0,
    "seconds": 0.5,
    "digest": "cd" * 32,
    "final_accuracy": 0.8,
    "best_accuracy": 0.9,
    "best_round": 2,
    "accuracy": [[2, 0.9], [4, 0.8]],
}
CELL = Cell("krum", "alie", 2)


def written(tmp_path, lines, **changes):
    folder = tmp_path / CELL.name
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({**SUMMARY, **changes}))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_run_is_read_from_the_servers_files(tmp_path):
    lines = [
        {"round": 0, "selected": [12], "refused": {}},
        {"round": 1, "selected": [3], "refused": {"5": "NON_FINITE", "6": "NON_FINITE"}},
        {"round": 2, "selected": [14], "refused": {}},
        {"round": 3, "selected": [11], "refused": {"5": "NON_FINITE"}},
    ]

    read = Result.read(CELL, written(tmp_path, lines))

    assert (read.final, read.best, read.best_round, read.rounds) == (0.8, 0.9, 2, 4)
    assert read.curve == ((2, 0.9), (4, 0.8))
    assert read.refused == 3
    assert read.liars_chosen == 0.5


def test_a_rule_that_uses_all_rows_chose_nobody(tmp_path):
    assert Result.read(CELL, written(tmp_path, [{"round": 0, "selected": None}])).liars_chosen is None


def test_a_diverged_run_is_a_result(tmp_path):
    assert Result.read(CELL, written(tmp_path, [], outcome="diverged", final_accuracy=0.1)).final == 0.1


@pytest.mark.parametrize("changes", [{"outcome": "drained"}, {"final_accuracy": None}])
def test_a_run_that_was_not_played_to_its_end_is_none(tmp_path, changes):
    with pytest.raises(DaemonError, match="krum/alie/seed-2"):
        Result.read(CELL, written(tmp_path, [], **changes))


def test_a_run_without_files_is_named(tmp_path):
    with pytest.raises(DaemonError, match="krum/alie/seed-2"):
        Result.read(CELL, tmp_path)
