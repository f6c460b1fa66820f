from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narses.combine import Combine, LowerMedian, Mean, Median, Nearest, UpperMedian, Window, mean_rows, sort_columns_
from narses.errors import InputError
from narses.updates import Updates
from tests.oracles.rules import nearest

FLOATS = [torch.float32, torch.float64]
LARGEST = {torch.float32: 3.4e38, torch.float64: 1.7e308}
SMALLEST = {torch.float32: 1e-45, torch.float64: 5e-324}


def column(values: list[float], combine: Combine, dtype: torch.dtype = torch.float64) -> float:
    return float(Updates.of(torch.tensor(values, dtype=dtype)[:, None]).per_coordinate(combine))


@pytest.mark.parametrize("n", [*range(1, 35), 51, 64, 65, 101, 130])
def test_sorting_network(n: int) -> None:
    x_KC = torch.randint(-n, n, (n, 40), generator=torch.Generator().manual_seed(n)).float()
    x_KC[:, 0] = torch.arange(n).flip(0)

    assert torch.equal(sort_columns_(x_KC.clone()), x_KC.sort(dim=0).values)


@pytest.mark.parametrize("n", range(1, 13))
def test_sorting_network_by_the_zero_one_principle(n: int) -> None:
    """A network of comparators that sorts every column of zeros and ones sorts everything."""
    x_KC = torch.tensor([[code >> i & 1 for code in range(2**n)] for i in range(n)], dtype=torch.float32)

    assert torch.equal(sort_columns_(x_KC.clone()), x_KC.sort(dim=0).values)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_order_statistics(n: int, dtype: torch.dtype) -> None:
    x_ND = torch.randn(n, 20_000, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
    before_ND = x_ND.clone()
    updates, ordered = Updates.of(x_ND), np.sort(x_ND.numpy(), axis=0)

    def same(combine: Combine, expected: np.ndarray) -> bool:
        found_D = updates.per_coordinate(combine).numpy()
        return bool(np.allclose(found_D, expected, rtol=1e-7 if dtype == torch.float32 else 1e-15, atol=1e-15))

    assert np.array_equal(updates.per_coordinate(LowerMedian()).numpy(), ordered[(n - 1) // 2])
    assert np.array_equal(updates.per_coordinate(UpperMedian()).numpy(), ordered[n // 2])
    assert same(Median(), np.median(x_ND.double().numpy(), axis=0))
    assert same(Window(n // 4, n - n // 4), np.array(ordered[n // 4 : n - n // 4], dtype=np.longdouble).mean(axis=0))
    assert same(Mean(), np.array(x_ND.numpy(), dtype=np.longdouble).mean(axis=0))
    assert torch.equal(x_ND, before_ND)


CENTRES: list[tuple[Combine, object]] = [
    (Median(), np.median),
    (LowerMedian(), lambda v: np.sort(v)[(len(v) - 1) // 2]),
    (UpperMedian(), lambda v: np.sort(v)[len(v) // 2]),
    (Mean(), np.mean),
    (Window(0, 1), np.min),
]


@settings(max_examples=150, deadline=None)
@given(values=st.lists(st.integers(-6, 6), min_size=1, max_size=14), data=st.data())
def test_nearest_is_the_k_nearest_smaller_first(values: list[int], data: st.DataObject) -> None:
    """Small integers tie all the time; the oracle sorts by (distance, value)."""
    k = data.draw(st.integers(1, len(values)))
    combine, centre = data.draw(st.sampled_from(CENTRES))
    v = np.array(values, dtype=np.float64)

    for dtype in FLOATS:
        found = column([float(x) for x in values], Nearest(k, combine), dtype)

        assert found == pytest.approx(nearest(v, float(centre(v)), k), rel=1e-6, abs=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize("n", [9, 12])
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_liar_outside_the_window_changes_not_one_bit(dtype: torch.dtype, n: int, k: int) -> None:
    """Starting from a window that holds the liar and correcting it moves the result from 0.05 to 0.27."""
    honest = 0.05 + 0.01 * torch.rand(n - 1, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def result(liar: float, combine: Combine) -> Tensor:
        x_ND = torch.cat([honest, torch.full((1, 500), liar, dtype=torch.float64)]).to(dtype)
        return Updates.of(x_ND).per_coordinate(combine)

    for combine in (Nearest(k, Median()), Nearest(k, LowerMedian()), Window(1, n - 1), Median()):
        for mild, wild in ((-1.0, -1e9), (-1.0, -1e38), (1.0, 1e9), (1.0, 1e38)):
            assert torch.equal(result(mild, combine), result(wild, combine))
            assert 0.05 < float(result(wild, combine).mean()) < 0.06


def test_nearest_compares_distances_beyond_the_input_s_precision() -> None:
    """In float32 both neighbours would be 1e-8 away."""
    values = [0.0, 1e-8, 2.0000001e-8]

    assert column(values, Nearest(2, Median()), torch.float32) == pytest.approx(5e-9, rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_means_of_the_largest_and_the_smallest_numbers(dtype: torch.dtype) -> None:
    large, small = (float(torch.tensor(table[dtype], dtype=dtype)) for table in (LARGEST, SMALLEST))
    for combine in (Mean(), Window(0, 4), Nearest(4, Median())):
        assert column([large] * 4, combine, dtype) == large
        assert column([-large] * 4, combine, dtype) == -large
        assert column([small] * 4, combine, dtype) == small
        assert column([large, large, -large, -large], combine, dtype) == 0
        assert column([large, large, large, -large], combine, dtype) == pytest.approx(large / 2, rel=1e-6)
    assert column([-large, -large, large, large], Median(), dtype) == 0
    assert column([large, large], Median(), dtype) == large


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_a_mean_lies_between_its_inputs(values: list[float]) -> None:
    found = float(mean_rows(torch.tensor(values, dtype=torch.float64)[:, None]))

    assert min(values) <= found <= max(values)
    if max(map(abs, values)) < 1e300:
        assert found == pytest.approx(
            float(np.mean(np.array(values, dtype=np.longdouble))), rel=1e-9, abs=max(map(abs, values)) * 1e-14
        )


def test_too_few_rows_or_senseless_values_are_refused() -> None:
    updates = Updates.of(torch.zeros(4, 2))
    for combine in (Window(2, 5), Nearest(5, Median()), Nearest(1, Window(0, 5))):
        with pytest.raises(InputError, match="at least 5 rows, got 4"):
            updates.per_coordinate(combine)
    for lo, hi in ((2, 2), (-1, 3), (3, 2)):
        with pytest.raises(InputError, match="lo < hi"):
            Window(lo, hi)
    with pytest.raises(InputError, match="k >= 1"):
        Nearest(0, Median())


def test_combine_values_are_values() -> None:
    assert {Nearest(3, Median()), Nearest(3, Median()), Window(1, 2), Mean()} == {
        Mean(),
        Window(1, 2),
        Nearest(3, Median()),
    }
