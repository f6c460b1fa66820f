"""Diagnostics against their definitions, written naively in numpy float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narses import diagnostics, rules
from narses.diagnostics import SAMPLE, diagnose, sample_columns, variance_bound
from narses.errors import InputError
from narses.kernels import jit
from narses.updates import Updates


def naive(x: np.ndarray, aggregate: np.ndarray, honest: list[int]) -> dict[str, Any]:
    """The definitions."""
    g = x[honest].mean(0)
    spread = math.sqrt(np.mean([np.sum((x[i] - g) ** 2) for i in honest]))
    inner = float(aggregate @ g)
    return {
        "distances_N": np.linalg.norm(x - aggregate, axis=1),
        "norms_N": np.linalg.norm(x, axis=1),
        "cosines_N": x @ aggregate / np.linalg.norm(x, axis=1) / np.linalg.norm(aggregate),
        "norm": float(np.linalg.norm(aggregate)),
        "inner": inner,
        "inner_ratio": inner / float(g @ g),
        "sin_alpha": 1 - inner / float(g @ g),
        "cosine": inner / float(np.linalg.norm(aggregate) * np.linalg.norm(g)),
        "deviation": float(np.linalg.norm(aggregate - g)),
        "deviation_in_sigma": float(np.linalg.norm(aggregate - g)) / spread,
        "variance_norm_ratio": spread / float(np.linalg.norm(g)),
    }


def check(found: diagnostics.Diagnostics, expected: dict[str, Any], rtol: float) -> None:
    for name, value in expected.items():
        got = getattr(found, name)
        got = got.numpy() if isinstance(got, torch.Tensor) else got
        # ||F - g||^2 is what is left of a difference of variances.
        sigma = expected["deviation"] / expected["deviation_in_sigma"] if name == "deviation" else 1.0
        atol = max(rtol, 2e-3 * sigma) if name.startswith("deviation") else rtol
        np.testing.assert_allclose(got, value, rtol=rtol, atol=atol, err_msg=name)


@settings(deadline=None, max_examples=300)
@given(seed=st.integers(0, 2**31), n=st.integers(5, 12), dimension=st.integers(8, 70), known=st.booleans())
def test_they_are_what_they_say(seed: int, n: int, dimension: int, known: bool) -> None:
    draws = np.random.default_rng(seed)
    x = (draws.standard_normal(dimension) + draws.standard_normal((n, dimension))).astype(np.float32)
    x[0] *= 30
    aggregation = rules.make("median")(Updates.of(x), 1)
    aggregate = aggregation.vector_D.double().numpy()
    wide = x.astype(np.float64)
    nearest = sorted(range(n), key=lambda i: (np.sum((wide[i] - aggregate) ** 2), i))[: n - 1]
    honest = list(range(1, n)) if known else nearest
    found = diagnose(Updates.of(x), aggregation.vector_D, 1, honest=honest if known else None)

    # ||g||^2 is a difference of lengths: the shorter g is among the updates, the more of its digits are lost.
    shortness = float(np.mean(np.sum(wide[honest] ** 2, axis=1)) / np.sum(wide[honest].mean(0) ** 2))
    check(found, naive(wide, aggregate, honest), rtol=1e-5 * max(1.0, shortness))
    assert found.estimate == (not known)
    assert found.sampled is None


def test_parameters_are_measured_from_the_rounds() -> None:
    draws = np.random.default_rng(0)
    steps = draws.standard_normal((7, 40)) * 0.1
    start = draws.standard_normal(40)
    x = (start + steps).astype(np.float32)
    vector_D = rules.make("median")(Updates.of(x), 1).vector_D
    origin_D = torch.from_numpy(start.astype(np.float32))
    found = diagnose(Updates.of(x), vector_D, 1, origin_D=origin_D, honest=range(7))
    moved = x.astype(np.float64) - origin_D.double().numpy()
    check(found, naive(moved, vector_D.double().numpy() - origin_D.double().numpy(), list(range(7))), rtol=1e-4)


def test_a_sample_is_an_estimate_of_the_whole() -> None:
    draws = torch.Generator().manual_seed(0)
    x_ND = torch.randn(9, 300_000, generator=draws) + 0.5
    vector_D = x_ND.mean(0)
    whole, part = (diagnose(Updates.of(x_ND), vector_D, 2, honest=range(9), sample=sample) for sample in (False, True))
    assert part.sampled == SAMPLE
    for name in ("norm", "inner", "cosine", "variance_norm_ratio", "inner_ratio"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=0.02), name
    torch.testing.assert_close(part.distances_N, whole.distances_N, rtol=0.02, atol=0)


@given(dimension=st.integers(1, 3_000_000))
def test_columns_of_a_sample_are_distinct_and_inside(dimension: int) -> None:
    runs = sample_columns(dimension)
    assert sum(stop - start for start, stop in runs) == min(dimension, SAMPLE)
    assert runs[0][0] == 0
    assert runs[-1][1] == dimension
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(runs))


def test_the_matrix_may_be_rows_of_a_larger_one() -> None:
    x_ND = torch.randn(9, 50, generator=torch.Generator().manual_seed(1))
    rows = [1, 4, 5, 8]
    vector_D = x_ND[rows].mean(0)
    some, alone = diagnose(Updates.of(x_ND, rows=rows), vector_D, 0), diagnose(Updates.of(x_ND[rows]), vector_D, 0)
    torch.testing.assert_close(some.distances_N, alone.distances_N, rtol=0, atol=0)
    assert some.inner == alone.inner


def test_huge_rows_leave_the_honest_quantities_alone() -> None:
    x_ND = torch.randn(9, 50, generator=torch.Generator().manual_seed(1)) + 1
    attacked_ND = x_ND.clone()
    attacked_ND[:2] = 1e30
    vector_D = x_ND[2:].mean(0)
    quiet, loud = (diagnose(Updates.of(x), vector_D, 2, honest=range(2, 9)) for x in (x_ND, attacked_ND))
    for name in ("inner", "deviation_in_sigma", "variance_norm_ratio", "cosine"):
        assert getattr(loud, name) == pytest.approx(getattr(quiet, name), rel=1e-9), name
    assert loud.distances_N[:2].min() > 1e29


def test_nothing_to_compare_is_nan() -> None:
    x_ND = torch.zeros(5, 4)
    found = diagnose(Updates.of(x_ND), x_ND[0], 1)
    assert all(math.isnan(value) for value in (found.cosine, found.inner_ratio, found.variance_norm_ratio))
    assert found.cosines_N.isnan().all()


@pytest.mark.parametrize("honest", [[], [5], [-1]])
def test_honest_rows_are_rows(honest: list[int]) -> None:
    with pytest.raises(InputError, match="expected one or more rows of the 5 updates"):
        diagnose(Updates.of(torch.zeros(5, 4)), torch.zeros(4), 1, honest=honest)


def test_bounds_by_hand() -> None:
    # n = 25, f = 11: (f (n-f-2) + f^2 (n-f-1)) / (n-2f-2) = (11*12 + 121*13) / 1 = 1705
    assert variance_bound("krum", 25, 11) == pytest.approx(1 / math.sqrt(2 * (14 + 1705)))
    assert variance_bound("bulyan", 25, 5) == variance_bound("krum", 25, 5)
    assert variance_bound("median", 25, 11) == pytest.approx(1 / math.sqrt(14))
    assert variance_bound("brute", 11, 5) == pytest.approx(6 / (math.sqrt(8) * 5))
    assert variance_bound("mean", 11, 5) is None
    assert variance_bound("krum", 12, 5) is None


def test_samples_are_summed_the_same_with_and_without_a_kernel() -> None:
    x_ND = torch.randn(9, 70_001, generator=torch.Generator().manual_seed(3))
    vector_D = x_ND.mean(0)
    runs = sample_columns(70_001)
    compiled_MM = Updates.of(x_ND).squared_distances_with([vector_D, torch.zeros(70_001)], runs)
    with jit.refused():
        plain_MM = Updates.of(x_ND).squared_distances_with([vector_D, torch.zeros(70_001)], runs)
    torch.testing.assert_close(compiled_MM, plain_MM, rtol=1e-6, atol=0)
    columns = torch.cat([torch.arange(start, stop) for start, stop in runs])
    some = x_ND[:, columns].double()
    torch.testing.assert_close(compiled_MM[:9, 10], some.square().sum(1), rtol=1e-6, atol=0)
    assert torch.equal(Updates.of(x_ND).squared_distances_with([vector_D, None], runs), compiled_MM)
    with jit.refused():
        assert torch.equal(Updates.of(x_ND).squared_distances_with([vector_D, None], runs), plain_MM)
    whole = [Updates.of(x_ND).squared_distances_with([vector_D, origin]) for origin in (None, torch.zeros(70_001))]
    assert torch.equal(*whole)


def test_points_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match=r"vector of shape \(3,\): expected \(4,\)"):
        Updates.of(torch.zeros(2, 4)).squared_distances_with([torch.zeros(3)])
