"""What the papers print, and what they claim: toy examples, variants, counterexamples, simulated shifts."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import narses
from narses.errors import ConfigError
from narses.rules import Bulyan, Krum, MultiKrum, check, krum_scores, make, rule_table
from narses.updates import Updates


def columns(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


# Xie et al., Fall of Empires, sections 5.2.1 and 5.3.1.
MEDIAN_TOY = columns(-0.1, 0.1, 0.3, -4.0, -2.0)
KRUM_TOY = columns(-0.1, -0.1, -0.1, 0.0, 0.02, 0.14, 0.26, 0.38, 0.5)


def test_median_toy() -> None:
    assert narses.aggregate("median", MEDIAN_TOY, 2).vector_D.tolist() == [-0.1]


def test_krum_toy_scores() -> None:
    """n = 9, f = 3, k = 4 others, squared: a self-distance counted in, or another k, changes these."""
    result = narses.aggregate("krum", KRUM_TOY, 3)

    printed = [0.0244, 0.0244, 0.0244, 0.0304, 0.0436, 0.1060, 0.1440, 0.2160, 0.4320]
    assert result.scores is not None
    assert result.scores.tolist() == pytest.approx(printed, abs=1e-12)
    assert krum_scores(Updates.of(KRUM_TOY), 3).tolist() == result.scores.tolist()
    assert result.scores[0] == result.scores[1] == result.scores[2]
    assert result.selected is not None
    assert (result.vector_D.tolist(), result.selected.tolist()) == ([-0.1], [0])


@pytest.mark.parametrize(
    ("fields", "winner", "row"),
    [
        ({}, -0.1, 0),
        ({"power": 1}, -0.1, 0),
        ({"neighbours": "n-f-1"}, 0.0, 3),
        ({"neighbours": "n-f"}, 0.02, 4),
        ({"p": 1.0}, -0.1, 0),
        ({"p": "inf"}, -0.1, 0),
    ],
)
def test_krum_toy_pins_the_neighbour_count(fields: dict[str, Any], winner: float, row: int) -> None:
    result = narses.aggregate({"name": "krum", **fields}, KRUM_TOY, 3)

    assert result.selected is not None
    assert (result.vector_D.tolist(), result.selected.tolist()) == ([winner], [row])


def test_krum_scores_of_the_variants() -> None:
    updates = Updates.of(KRUM_TOY)
    plain = [0.22, 0.22, 0.22, 0.32, 0.38, 0.62, 0.72, 0.84, 1.2]
    five = [0.0820, 0.0820, 0.0820, 0.0500, 0.0580, 0.1636, 0.2116, 0.3604, 0.6820]
    six = [0.2116, 0.2116, 0.2116, 0.1176, 0.1156, 0.2212, 0.3412, 0.5908, 1.0420]

    assert krum_scores(updates, 3, power=1).tolist() == pytest.approx(plain)
    assert krum_scores(updates, 3, neighbours="n-f-1").tolist() == pytest.approx(five)
    assert krum_scores(updates, 3, neighbours="n-f").tolist() == pytest.approx(six)


def test_the_norms_of_krum_elect_different_rows() -> None:
    """Row 2 is nearest its neighbours in l_1, row 0 in l_inf."""
    x_ND = torch.tensor([[2.0, 2, 2, 2], [0, 0, 0, 0], [5.0, 0, 0, 0], [50, 0, 0, 0], [0, 50, 0, 0]])
    scores = {p: krum_scores(Updates.of(x_ND), 1, p=p)[:3].tolist() for p in (1.0, 2.0, math.inf)}

    assert scores[1.0] == [8**2 + 9**2, 5**2 + 8**2, 5**2 + 9**2]
    assert scores[2.0] == [16 + 21, 16 + 25, 21 + 25]
    assert scores[math.inf] == [2**2 + 3**2, 2**2 + 5**2, 3**2 + 5**2]


def test_multi_krum_averages_the_best() -> None:
    for m, rows, mean in (
        (1, [0], -0.1),
        (3, [0, 1, 2], -0.1),
        (4, [0, 1, 2, 3], -0.075),
        (None, [0, 1, 2, 3], -0.075),
    ):
        result = narses.aggregate({"name": "multi-krum", "m": m}, KRUM_TOY, 3)

        assert result.selected is not None
        assert result.selected.tolist() == rows
        assert result.vector_D.item() == pytest.approx(mean)
    assert MultiKrum(m=12).min_updates(3) == 12


def test_the_two_trimmed_means_keep_other_values() -> None:
    """n - 2f = 3 values each: Yin et al. drop the ends, El Mhamdi et al. keep the nearest to the median."""
    x_ND = columns(0.0, 1.0, 2.0, 3.0, 100.0, 101.0, 102.0)

    assert narses.aggregate("trimmed-mean", x_ND, 2).vector_D.item() == pytest.approx((2 + 3 + 100) / 3)
    nearest = {"name": "mean-around-median", "keep": "n-2f"}
    assert narses.aggregate(nearest, x_ND, 2).vector_D.item() == 2.0


def test_an_equally_near_value_gives_way_to_the_smaller() -> None:
    x_ND = columns(1.0, 0.0, -1.0)

    assert narses.aggregate({"name": "mean-around-median", "keep": "n-f"}, x_ND, 1).vector_D.item() == -0.5


def test_bulyan_without_byzantine_updates_is_the_mean() -> None:
    x_ND = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    result = narses.aggregate("bulyan", x_ND, 0)

    torch.testing.assert_close(result.vector_D, x_ND.mean(dim=0))
    assert result.selected is not None
    assert result.selected.tolist() == list(range(8))


@pytest.mark.parametrize(("theta", "count"), [("n-2f", 27), ("n-2f-2", 25)])
def test_bulyan_selects_theta(theta: str, count: int) -> None:
    x_ND = torch.randn(51, 5, generator=torch.Generator().manual_seed(0))

    result = narses.aggregate({"name": "bulyan", "theta": theta}, x_ND, 12)

    assert result.selected is not None
    assert len(result.selected) == count


def test_bulyan_elects_again_after_each_removal() -> None:
    """Multi-Krum ranks once; in Bulyan an elected row is nobody's neighbour any more.

    n = 7 and f = 1, so k = 4, 3, 2, 1 and, held there, 1. By hand, the elected scores: 10 (rows 3 and 4 too), 6 (row 5 too),
    5 (row 5 too), 1 (row 6 too), 9 (all three). The five best of one ranking are 1 to 5.
    """
    x_ND = columns(*map(float, range(7)))

    assert Krum().selection_order(Updates.of(x_ND), 1, 5) == [2, 4, 1, 5, 0]
    assert narses.aggregate({"name": "multi-krum", "m": 5}, x_ND, 1).selected.tolist() == [1, 2, 3, 4, 5]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("inner", "order"),
    [
        # By hand. The outputs: 4; 3 (7 too); 7; 2 (20 too); 20.
        ({"name": "medoid"}, [3, 2, 4, 1, 5]),
        ({"name": "geometric-median"}, [3, 2, 4, 1, 5]),
        # 4; 5, as near to 3 as to 7; 7; 11, as near to 2 as to 20; 20.
        ({"name": "median"}, [3, 2, 4, 1, 5]),
        # The means of 3, 4, 2, 1; of 4, 3, 1; of 4, 1 (7 scores as 1); 4 (7 too); 7 (20 too).
        ({"name": "multi-krum"}, [1, 2, 0, 3, 4]),
        # The means of all but the largest: 6.2; 6; 6.5; 7.7; 10.5, as near to 1 as to 20.
        ({"name": "brute"}, [4, 3, 2, 1, 0]),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_bulyan_elects_what_is_nearest_the_inner_rule_s_output(inner: dict[str, Any], order: list[int]) -> None:
    """n = 7 and f = 1, at 1, 2, 3, 4, 7, 20, 50."""
    x_ND = columns(1.0, 2.0, 3.0, 4.0, 7.0, 20.0, 50.0)

    assert make(inner).selection_order(Updates.of(x_ND), 1, 5) == order  # type: ignore[attr-defined]


def test_bulyan_s_proposition_2_does_not_hold_per_coordinate() -> None:
    """El Mhamdi et al., Proposition 2, takes every kept value to lie between two honest ones.

    Its proof counts f discarded values on each side of the median; all 2f may be on one side. Here the one liar's 6 is kept,
    and the result 4 lies above every honest value (at most 3). It stays within one honest width, which is what is claimed.
    """
    liar = [[6.0, -0.1]]
    honest = [[3.0, 0.0], [2.0, 0.2], [-1.0, 0.2], [3.0, 0.2], [-2.0, 0.2], [-3.0, -0.2]]

    result = narses.aggregate("bulyan", torch.tensor(liar + honest, dtype=torch.float64), 1)

    assert result.vector_D[0].item() == pytest.approx(4.0)
    assert max(row[0] for row in honest) == 3.0


@pytest.mark.parametrize(("keep", "low"), [("n-f", 2), ("n-2f", 3), ("n-f-1", 3)])
def test_mean_around_median_may_leave_the_honest_range(keep: str, low: int) -> None:
    honest, lies = [-100.0] * low + [1.0] * (5 - low), [50.0, 50.0]

    result = narses.aggregate({"name": "mean-around-median", "keep": keep}, columns(*honest, *lies), 2)

    assert result.vector_D.item() > max(honest)


# The shift of the aggregate along the attack in units of sigma when 12 of 51 send mu + 1.5 sigma (A Little Is Enough),
# isotropic Gaussian updates, d = 3000, mu and sigma from the attackers' own vectors; simulated independently, +-0.02.
SHIFTS: list[tuple[dict[str, Any], float]] = [
    ({"name": "mean"}, 0.33),
    ({"name": "median"}, 0.39),
    ({"name": "trimmed-mean"}, 0.42),
    ({"name": "mean-around-median", "keep": "n-2f"}, 0.39),
    ({"name": "mean-around-median"}, 0.49),
    ({"name": "bulyan"}, 0.51),
    ({"name": "bulyan", "keep": "n-4f-1", "inner": {"name": "krum", "neighbours": "n-f", "power": 1}}, 0.64),
]


@pytest.mark.parametrize(("table", "shift"), SHIFTS, ids=lambda value: value["name"] if isinstance(value, dict) else "")
def test_shift_under_a_little_is_enough(table: dict[str, Any], shift: float) -> None:
    shifts = []
    for seed in range(6):
        x_ND = torch.randn(51, 3000, generator=torch.Generator().manual_seed(seed))
        own_FD = x_ND[:12].clone()
        x_ND[:12] = own_FD.mean(dim=0) + 1.5 * own_FD.std(dim=0, correction=0)
        shifts.append(float(narses.aggregate(table, x_ND, 12).vector_D.mean()))

    assert sum(shifts) / len(shifts) == pytest.approx(shift, abs=0.03)


def test_the_documented_least_n_is_the_rules_own() -> None:
    page = Path(__file__).parents[2] / "docs" / "rules.md"
    lines = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("| `")]
    documented = {cells[0].strip(" `"): cells[2].strip() for cells in lines}
    assert {
        "brute",
        "bulyan",
        "geometric-median",
        "krum",
        "medoid",
        "multi-krum",
        "phocas",
        "two-means",
    } <= documented.keys()

    for name, formula in documented.items():
        rule = make({"name": name, "threshold": 1.0} if name == "two-means" else name)
        factor, _, rest = formula.rpartition("f + ")
        for f in range(1, 9):
            assert rule.min_updates(f) == int(factor or "f" in formula) * f + int(rest), name


@pytest.mark.parametrize(
    "line", re.findall(r"`(\{name = .*?\})`", (Path(__file__).parents[2] / "docs" / "rules.md").read_text())
)
def test_what_the_page_of_rules_says_to_write_is_a_rule(line: str) -> None:
    text = line.replace("threshold = ...", "threshold = 1.0").replace("m = n - f", "m = 5")

    make(tomllib.loads(f"rule = {text}")["rule"])


def test_check_says_what_is_wrong_and_what_to_do() -> None:
    with pytest.raises(ConfigError) as caught:
        check(make("bulyan"), 40, 12)

    assert str(caught.value) == "Bulyan with f = 12 needs n >= 51 updates but has n = 40: add 11 or declare f <= 9"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("crum", "unknown rule 'crum': expected one of arc"),
        ({"name": "krum", "q": 2}, "rule 'krum': unknown key q"),
        ({"name": "krum", "p": 0.5}, "p = 0.5: expected a number >= 1 or inf"),
        ({"name": "krum", "p": math.nan}, "p = nan"),
        ({"name": "krum", "p": "2"}, "p = '2'"),
        ({"name": "krum", "power": 3}, "power = 3"),
        ({"name": "multi-krum", "m": 0}, "m = 0"),
        ({"name": "mean-around-median", "keep": "n"}, "keep = 'n'"),
        (
            {"name": "bulyan", "inner": "mean"},
            "cannot repeat 'mean': expected one of brute, geometric-median, krum, median, medoid, multi-krum",
        ),
        ({"name": "bulyan", "p": 1.0, "inner": "median"}, "Median mixes updates, which bulyan repeats for p = 2 only"),
        ({"name": "bulyan", "p": "inf", "inner": "brute"}, "Brute mixes updates, which bulyan repeats for p = 2 only"),
        ({"name": "bulyan", "inner": {"name": "brute", "p": 1.0}}, "p = 1.0 differs from bulyan's p = 2.0"),
        ("two-means", "threshold is required"),
        ({"name": "two-means", "threshold": -1.0}, "threshold = -1.0"),
        ({"name": "two-means", "threshold": math.inf}, "threshold = inf"),
        ({"name": "brute", "max_nodes": 0}, "max_nodes = 0"),
        ({"name": "geometric-median", "tolerance": 0.0}, "tolerance = 0.0"),
        ({"name": "geometric-median", "tolerance": math.nan}, "tolerance = nan"),
        ({"name": "geometric-median", "smoothing": math.inf}, "smoothing = inf"),
        ({"name": "bulyan", "inner": {"name": "krum", "r": 1}}, "rule 'krum': unknown key r"),
        ({"name": "bulyan", "inner": {"name": "krum", "p": 1.0}}, "p = 1.0 differs from bulyan's p = 2.0"),
        ({"name": "bulyan", "inner": "nobody"}, "unknown rule 'nobody'"),
        ({"name": "bulyan", "inner": 3}, "cannot repeat 3"),
        (7, "expected a name"),
    ],
)
def test_a_wrong_table_is_refused(table: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(table)

    assert message in str(caught.value)


def test_bulyan_hands_its_norm_to_the_inner_rule() -> None:
    assert Bulyan(p=1.0).inner == Krum(p=1.0)
    table = {"name": "bulyan", "p": "inf", "inner": {"name": "krum", "power": 1}}
    assert make(table) == Bulyan(p=math.inf, inner=Krum(p=math.inf, power=1))
    assert rule_table(Bulyan(p=math.inf)) == {"name": "bulyan", "p": "inf"}
    assert rule_table(Bulyan(inner=Krum(neighbours="n-f"))) == {
        "name": "bulyan",
        "inner": {"name": "krum", "neighbours": "n-f"},
    }


def test_rules_from_elsewhere_come_from_one_s_own_configuration_only() -> None:
    here = "narses.rules.krum:Krum"
    assert make({"name": here, "power": 1}) == Krum(power=1)
    assert make({"name": "bulyan", "inner": {"name": here}}) == Bulyan()
    deep: dict[str, Any] = {"name": "krum"}
    for _ in range(5000):
        deep = {"name": "bulyan", "inner": deep}
    for table in (
        here,
        {"name": here},
        {"name": "bulyan", "inner": here},
        {"name": "bulyan", "inner": {"name": here}},
        deep,
    ):
        with pytest.raises(ConfigError, match=r"own configuration only|nested more than"):
            make(table, trusted=False)
