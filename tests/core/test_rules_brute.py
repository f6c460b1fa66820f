"""Brute: the subset of smallest diameter, exactly, first among equals, at sizes where subsets cannot be tried one by one."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import narses
from narses.errors import InputError
from narses.rules import Brute
from narses.rules.diameter import smallest_diameter
from narses.updates import Updates
from tests.oracles import rules as oracle


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diameter(distances_NN: Tensor, rows: list[int]) -> float:
    return float(distances_NN[rows][:, rows].max())


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 10), share=st.floats(0, 1), d=st.integers(1, 4), seed=st.integers(0, 2**31), whole=st.booleans()
)
def test_the_first_of_the_smallest_subsets(n: int, share: float, d: int, seed: int, whole: bool) -> None:
    """All subsets are tried. Whole numbers tie everywhere; f may be anything here, beyond what the rule accepts too."""
    size = n - round(share * (n - 1))
    draws = np.random.default_rng(seed)
    x = draws.integers(-2, 3, (n, d)).astype(float) if whole else draws.standard_normal((n, d))
    between = oracle.distances(x)
    best = min(itertools.combinations(range(n), size), key=lambda s: between[np.ix_(s, s)].max())

    assert smallest_diameter(torch.from_numpy(between), size, 10**6) == list(best)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 9), seed=st.integers(0, 2**31))
def test_any_table_of_distances(n: int, seed: int) -> None:
    """Two values only, no triangle inequality: the graphs that points in a plane never make."""
    draws = np.random.default_rng(seed)
    table = np.triu(draws.integers(1, 3, (n, n)), 1)
    table = (table + table.T).astype(float)
    for size in range(1, n + 1):
        best = min(itertools.combinations(range(n), size), key=lambda s: table[np.ix_(s, s)].max())

        assert smallest_diameter(torch.from_numpy(table), size, 10**6) == list(best)


@pytest.mark.parametrize(("n", "f"), [(15, 5), (57, 27)])
def test_gaussian_updates_take_milliseconds(n: int, f: int) -> None:
    """n = 57 and f = 27 have 1.4e16 subsets: 5 months of trying 1e9 a second."""
    for seed in range(3):
        distances_NN = Updates.of(normal(n, 1000, seed)).distances_NN()
        started = time.perf_counter()

        subset = smallest_diameter(distances_NN, n - f, max_nodes=20_000)

        assert time.perf_counter() - started < 5
        assert len(subset) == n - f
        # No other row may take the place of an end of the widest pair and make it narrower.
        widest = diameter(distances_NN, subset)
        for out, into in itertools.product(subset, set(range(n)) - set(subset)):
            assert diameter(distances_NN, [row for row in subset if row != out] + [into]) >= widest


def test_huge_tiny_and_equal_rows() -> None:
    honest_ND = normal(8, 5)
    x_ND = torch.cat([honest_ND, torch.full((3, 5), 1e30, dtype=torch.float64)])
    assert narses.aggregate("brute", x_ND, 3).selected.tolist() == list(range(8))  # type: ignore[union-attr]
    assert narses.aggregate("brute", x_ND * 1e-60, 3).selected.tolist() == list(range(8))  # type: ignore[union-attr]
    # 1e200 squared is infinite, and so is every distance to it.
    assert narses.aggregate("brute", x_ND * 1e170, 3).selected.tolist() == list(range(8))  # type: ignore[union-attr]
    assert narses.aggregate("brute", x_ND[[8, 0, 9, 1, 10]], 2).selected.tolist() == [0, 2, 4]  # type: ignore[union-attr]


def test_a_search_that_passes_its_limit_is_refused() -> None:
    x_ND = normal(25, 50)

    with pytest.raises(InputError, match=r"passed max_nodes = 20: .*raise max_nodes or take a rule"):
        Brute(max_nodes=20)(Updates.of(x_ND), 11)
    with pytest.raises(InputError, match="passed max_nodes = 20"):
        narses.aggregate({"name": "bulyan", "inner": {"name": "brute", "max_nodes": 20}}, x_ND, 5)


def test_the_hardest_graphs_stay_below_the_documented_bound() -> None:
    """Random distances of two values, where geometry does not help: 1.47^f for each of 2 log2(n) + n decisions."""
    n, f = 40, 19
    for density in (0.1, 0.2, 0.3):
        wide = np.triu(np.random.default_rng(0).random((n, n)) < density, 1)
        table = 1.0 + (wide | wide.T)
        np.fill_diagonal(table, 0)

        smallest_diameter(torch.from_numpy(table), n - f, max_nodes=int(1.47**f * (2 * np.log2(n) + n)))


def test_order_may_decide_which_of_several_subsets() -> None:
    """Why PERMUTATION is not claimed: the pair 0, 1 is the diameter of two sets of three."""
    x_ND = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 0.9], [1.0, -0.9], [50.0, 0.0]])

    assert narses.aggregate("brute", x_ND, 2).selected.tolist() == [0, 2, 3]  # type: ignore[union-attr]
    x_ND = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.7], [1.0, -1.7], [50.0, 0.0]])
    result = narses.aggregate("brute", x_ND, 2)
    swapped = narses.aggregate("brute", x_ND[[0, 1, 3, 2, 4]], 2)

    assert result.selected.tolist() == swapped.selected.tolist() == [0, 1, 2]  # type: ignore[union-attr]
    assert result.vector_D[1] == -swapped.vector_D[1] != 0
