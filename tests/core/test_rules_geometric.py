"""Medoid and geometric median: what defines them, at data points, beside huge rows, and what byzfl and Bulyan make of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor

import narses
from narses.rules import GeometricMedian, Medoid, make
from narses.updates import Updates
from tests.oracles import rules as oracle


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def median(x_ND: Tensor, **fields: Any) -> np.ndarray:
    return GeometricMedian(**fields)(Updates.of(x_ND), 0).vector_D.double().numpy()


def slack(x: np.ndarray, y: np.ndarray) -> float:
    """How far y is from satisfying the first-order condition, per row: 0 at the geometric median."""
    apart = x - y
    lengths = np.linalg.norm(apart, axis=1)
    force = (apart[lengths > 0] / lengths[lengths > 0, None]).sum(axis=0)
    return max(0.0, float(np.linalg.norm(force)) - int((lengths == 0).sum())) / len(x)


@settings(max_examples=120, deadline=None)
@given(n=st.integers(1, 14), d=st.integers(1, 8), seed=st.integers(0, 2**31), copies=st.integers(0, 4))
def test_first_order_condition(n: int, d: int, seed: int, copies: int) -> None:
    x_ND = normal(n, d, seed)
    x_ND[:copies] = x_ND[0].clone()

    y = median(x_ND, max_iterations=100_000)

    assert slack(x_ND.numpy(), y) <= 1.1e-9 + 1e-13


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=1, max_size=9),
    scale=st.sampled_from([1.0, 1e15, 1e30, 1e-23, 1e-100]),
)
def test_least_sum_of_distances_among_whole_numbers(rows: list[list[int]], scale: float) -> None:
    """Equal rows, rows on a line, medians at data points, medians that are not unique: nothing may be lower."""
    x = np.array(rows, dtype=np.float64)

    def total(y: np.ndarray) -> float:
        return float(np.linalg.norm(x - y, axis=1).sum())

    y = median(torch.from_numpy(x * scale)) / scale
    found = optimize.minimize(total, y + 0.01, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})

    assert total(y) <= min([found.fun, *(total(row) for row in x)]) + 1e-7


def test_a_median_at_a_data_point_is_that_row() -> None:
    """Vardi and Zhang: a row is the median exactly if the others pull no harder than its multiplicity."""
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.1], [1.0, -0.1], [-1.0, 0.3], [-1.0, -0.2]], dtype=torch.float64)
    assert median(corner).tolist() == [0, 0]
    # Three unit vectors, 120 degrees between them, balance: the row in the middle is the median, and of four rows it is the
    # only one that Weiszfeld's formula cannot be evaluated at.
    angles = torch.tensor([0.0, 2 * math.pi / 3, 4 * math.pi / 3], dtype=torch.float64)
    star = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert median(torch.cat([star, torch.zeros(1, 2)])).tolist() == [0, 0]
    # Two copies hold against a force below 2, not against one of 2.9.
    pulled = torch.tensor([[0.0, 0.0]] * 2 + [[1.0, 0.0]] * 2 + [[1.0, 0.5]], dtype=torch.float64)
    assert slack(pulled.numpy(), median(pulled)) <= 1e-9
    assert np.linalg.norm(median(pulled)) > 0.5


def test_colluding_copies_below_half_do_not_hold_the_median() -> None:
    """12 of 51 equal rows far away: Weiszfeld that starts on one of them would stay there."""
    x_ND = normal(51, 40)
    x_ND[:12] = 100.0

    y = median(x_ND)

    assert slack(x_ND.numpy(), y) <= 1e-9
    assert np.linalg.norm(y) < 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reach", [1e3, 1e8, 1e15, 1e30])
def test_huge_rows_do_not_disturb_the_others_digits(dtype: torch.dtype, reach: float) -> None:
    """From distances alone the error is 0.02 at 1e15 and 2e17 at 1e30."""
    honest_ND, lies_ND = normal(39, 300), normal(12, 300, seed=1)
    x = torch.cat([honest_ND, lies_ND * reach]).to(dtype)

    y = GeometricMedian()(Updates.of(x), 12).vector_D.double().numpy()

    assert slack(x.double().numpy(), y) <= (1e-9 if dtype == torch.float64 else 1e-6)
    expected = oracle.geometric_median(np.concatenate([honest_ND, lies_ND * 1e9]), 12)[0]
    np.testing.assert_allclose(y, expected, atol=0.02)  # the direction of a lie is all that counts of it


def test_rows_that_cannot_be_squared() -> None:
    """Distances beyond 1e154 overflow: such rows have no pull, and the result stays among the others."""
    x_ND = normal(7, 4)
    x_ND[5:] = 1.7e308

    y = median(x_ND)

    assert slack(x_ND[:5].numpy(), y) <= 1e-9
    assert bool(
        np.isfinite(median(torch.full((3, 2), 1.7e308, dtype=torch.float64) * torch.tensor([[1], [-1], [0.5]]))).all()
    )


def test_close_rows_of_a_large_norm_in_float32() -> None:
    """Spread 1e-4 of the norm: the result is right to float32's own rounding, and the iteration ends."""
    x_ND = (1.0 + 1e-4 * normal(21, 500)).float()

    y = GeometricMedian()(Updates.of(x_ND), 5).vector_D.double().numpy()

    np.testing.assert_allclose(y, oracle.geometric_median(x_ND.double().numpy(), 5)[0], rtol=1.3e-7)


def test_few_iterations_and_smoothing() -> None:
    x_ND = normal(15, 6)
    exact = oracle.geometric_median(x_ND.numpy(), 0)[0]
    error = {k: float(np.abs(median(x_ND, max_iterations=k) - exact).max()) for k in (1, 5, 1000)}

    assert error[1] > error[5] > error[1000] < 1e-8
    # Distances below the smoothing count as it: when all are, the result is the mean.
    np.testing.assert_allclose(median(x_ND, smoothing=1e6), x_ND.mean(dim=0), atol=1e-12)
    y = median(x_ND, smoothing=2.5)
    weights = 1 / np.linalg.norm(x_ND.numpy() - y, axis=1).clip(min=2.5)
    np.testing.assert_allclose(y, weights @ x_ND.numpy() / weights.sum(), atol=1e-8)


def test_a_tolerance_ends_it_sooner() -> None:
    x_ND = normal(9, 3)

    for tolerance in (1e-2, 1e-5, 1e-12):
        assert slack(x_ND.numpy(), median(x_ND, tolerance=tolerance)) <= tolerance * 1.01
    assert slack(x_ND.numpy(), median(x_ND, tolerance=1e-2)) > 1e-6


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=1, max_size=12),
    p=st.sampled_from([1.0, math.inf]),
)
def test_medoid_is_the_first_row_of_least_sum(rows: list[list[int]], p: float) -> None:
    x = np.array(rows, dtype=np.float64)
    expected = int(oracle.distances(x, p).sum(axis=1).argmin())

    result = Medoid(p=p)(Updates.of(torch.from_numpy(x)), 0)

    assert result.selected is not None
    assert result.selected.tolist() == [expected]
    assert result.vector_D.tolist() == x[expected].tolist()


def test_the_medoid_s_distances_are_not_squared() -> None:
    """Sums of distances 16, 14, 13, 22 + ...: squared, the row at 4 would win instead of that at 2."""
    x_ND = torch.tensor([0.0, 1.0, 2.0, 4.0, 15.0], dtype=torch.float64)[:, None]

    result = narses.aggregate("medoid", x_ND, 2)

    assert result.scores is not None
    assert result.scores.tolist() == [22, 19, 18, 20, 53]
    assert result.vector_D.item() == 2.0
    assert int((x_ND - x_ND.T).square().sum(dim=1).argmin()) == 3


@pytest.mark.parametrize("inner", ["brute", "geometric-median", "krum", "median", "medoid", "multi-krum"])
@pytest.mark.parametrize("reach", [1.0, 1e15, 1e30])
def test_bulyan_over_each_rule_beside_huge_rows(inner: str, reach: float) -> None:
    """The elections are those of the rules themselves, called on what remains; lies at 1e15 and 1e30 are not elected first."""
    x_ND = normal(19, 12, seed=3)
    x_ND[:4] *= 3 * reach
    updates, rule = Updates.of(x_ND), make(inner)

    order = rule.selection_order(updates, 4, 11)  # type: ignore[attr-defined]

    assert len(set(order)) == 11
    if reach > 1:
        assert set(order).isdisjoint(range(4))
    if inner in ("brute", "geometric-median", "median"):
        remaining = list(range(19))
        for row in order[:6]:
            output_D = rule(Updates.of(x_ND[remaining]), 4).vector_D
            away_R = (x_ND[remaining] - output_D).norm(dim=1)
            assert float((x_ND[row] - output_D).norm()) <= float(away_R.min()) * (1 + 1e-9)
            remaining.remove(row)


class Counting(Updates):
    """Updates that count how often their distances to a point are measured: two passes each, with the sum before it."""

    measured = 0

    def distances_to_N(self, v_D: Tensor) -> Tensor:  # noqa: N802
        self.measured += 1
        return super().distances_to_N(v_D)


def test_distances_decide_and_measuring_confirms() -> None:
    """What the weights come to is within the tolerance at the first step, unless rows are so huge that digits are gone."""

    def passes(x_ND: Tensor, **fields: Any) -> int:
        updates = Counting(x_ND)
        GeometricMedian(**fields)(updates, 0)
        return updates.measured

    x_ND = normal(31, 50)
    copies_ND = x_ND.clone()
    copies_ND[:16] = x_ND[0]
    far_ND = x_ND.clone()
    far_ND[:7] *= 1e12

    assert passes(x_ND) == passes(x_ND.float()) == 1
    assert passes(copies_ND) == 1
    assert passes(x_ND, smoothing=8.0) == 1
    assert 1 < passes(far_ND) < 40


def test_bulyan_elects_from_distances_alone() -> None:
    copies_ND, loud_ND = normal(23, 50), normal(23, 50)
    copies_ND[:9] = copies_ND[0].clone()
    loud_ND[:5] *= 200
    for x_ND in (copies_ND, loud_ND):
        updates = Counting(x_ND)

        make("geometric-median").selection_order(updates, 5, 13)  # type: ignore[attr-defined]

        assert updates.measured == 0
