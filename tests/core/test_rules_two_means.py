"""Two means: the best division there is, what it discards, and where it does not."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import narses
from narses.combine import TwoMeans
from narses.errors import InputError
from narses.updates import Updates
from tests.oracles import rules as oracle


def column(values: list[float] | Tensor, dtype: torch.dtype = torch.float64, **fields: Any) -> float:
    return float(Updates.of(torch.as_tensor(values, dtype=dtype)[:, None]).per_coordinate(TwoMeans(**fields)))


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.integers(-6, 6), min_size=1, max_size=14),
    threshold=st.sampled_from([0.0, 0.5, 1.0, 1.7, 3.0]),
    relative=st.booleans(),
)
def test_agrees_with_exact_arithmetic_over_all_divisions(values: list[int], threshold: float, relative: bool) -> None:
    """Small whole numbers: equal values, equally good divisions, gaps that are exactly the threshold."""
    x = np.array(values, dtype=np.float64)[:, None]
    ((expected,), _, _) = oracle.two_means(x, 0, threshold, relative)

    for dtype in (torch.float32, torch.float64):
        found = column([float(v) for v in values], dtype, threshold=threshold, relative=relative)

        assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_no_division_that_is_not_contiguous_is_better() -> None:
    """Of all 2^n ways to put sorted values into two clusters."""
    draws = np.random.default_rng(0)
    for _ in range(20):
        v = np.sort(draws.standard_normal(8))
        error = {
            chosen: sum(((part - part.mean()) ** 2).sum() for part in (v[list(chosen)], np.delete(v, chosen)))
            for size in range(1, 8)
            for chosen in itertools.combinations(range(8), size)
        }
        best = min(error, key=lambda chosen: error[chosen])

        assert list(best) in (list(range(len(best))), list(range(8 - len(best), 8)))


def test_the_smaller_cluster_is_discarded_beyond_the_threshold_only() -> None:
    values = [0.0, 1.0, 2.0, 10.0, 12.0]  # centres 1 and 11

    assert column(values, threshold=9.9) == 1.0
    assert column(values, threshold=10.0) == 5.0  # strictly more
    assert column([-v for v in values], threshold=9.9) == -1.0
    assert column([0.0, 1.0, 10.0, 11.0], threshold=1.0) == 5.5  # equally large
    assert column([3.0, 8.0], threshold=1.0) == 5.5
    assert column([3.0], threshold=0.0) == 3.0
    deviation = float(np.std(values))
    assert column(values, threshold=10 / deviation * 0.999, relative=True) == 1.0
    assert column(values, threshold=10 / deviation * 1.001, relative=True) == 5.0


def test_lloyd_s_iteration_may_stop_elsewhere() -> None:
    """20 against the rest satisfies it, every value being nearer its own centre; the best division is behind -15."""
    values = [-20.0, -15.0, 0.0, 2.0, 4.0, 20.0]
    centre = float(np.mean(values[:5]))
    assert max(abs(v - centre) - abs(v - 20) for v in values[:5]) < 0

    assert column(values, threshold=1.0) == np.mean(values[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_values_do_not_touch_the_others_digits(dtype: torch.dtype) -> None:
    """A suffix taken as total minus prefix would leave the honest cluster without a digit."""
    honest = (0.05 + 0.01 * torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)
    expected = float(honest.double().mean())

    for huge in (1e3, 1e15, 1e30, 3e38):
        for lies in ([huge], [-huge], [huge] * 4, [-huge] * 4, [-huge * 0.9, -huge]):
            found = column(torch.cat([honest, torch.tensor(lies, dtype=dtype)]), dtype, threshold=0.5)

            assert found == pytest.approx(expected, rel=1e-7 if dtype == torch.float32 else 1e-15)


def test_a_farther_lie_hides_a_nearer_one() -> None:
    """There are two clusters only: the farthest lie is one of them, and all others are averaged."""
    honest = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]

    assert column([*honest, 100.0], threshold=1.0) == pytest.approx(0.25)
    assert column([*honest, 100.0, 1000.0], threshold=1.0) == pytest.approx((sum(honest) + 100) / 7)


def test_the_largest_and_the_smallest_numbers() -> None:
    for unit in (1.7e308 / 12, 1e-300, 5e-324):
        values = [0.0, 1 * unit, 2 * unit, 10 * unit, 12 * unit]

        assert column(values, threshold=0.0) == pytest.approx(unit, rel=1e-15)
        assert column(values, threshold=1.5, relative=True) == pytest.approx(unit, rel=1e-15)
        assert column([unit] * 7, threshold=0.0) == unit
    for small in (1e-200, 5e-324):
        assert column([small, small, 2 * small, 1e308], threshold=1.0) == pytest.approx(4 / 3 * small, rel=0.3)
    assert column([1e-45] * 3 + [3.4e38], torch.float32, threshold=1.0) == pytest.approx(1e-45, rel=0.5)


def test_a_normal_distribution_s_halves_are_1_6_deviations_apart() -> None:
    """Below that, a relative threshold discards honest values; n is odd, so that one half is the larger."""
    x_ND = torch.randn(4001, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean_D = x_ND.mean(dim=0)

    def moved(threshold: float) -> float:
        table = {"name": "two-means", "threshold": threshold, "relative": True}
        return float((narses.aggregate(table, x_ND, 0).vector_D - mean_D).abs().mean())

    assert moved(1.55) > 0.5
    assert moved(1.65) < 1e-12


def test_it_does_not_resist_lies_below_its_threshold() -> None:
    """ "A Little Is Enough": 12 of 51 at 1.5 standard deviations shift it as they shift the mean."""
    x_ND = torch.randn(51, 3000, generator=torch.Generator().manual_seed(0))
    x_ND[:12] = 1.5
    shift = {
        threshold: float(narses.aggregate({"name": "two-means", "threshold": threshold}, x_ND, 12).vector_D.mean())
        for threshold in (3.0, 1.0)
    }

    assert shift[3.0] == pytest.approx(float(x_ND.mean()), abs=0.01)
    assert shift[1.0] > 1.2 * shift[3.0]  # the lies often are in the larger cluster


def test_a_senseless_threshold_is_refused() -> None:
    for threshold in (-1.0, float("nan")):
        with pytest.raises(InputError, match="expected a threshold >= 0"):
            TwoMeans(threshold)
