"""Rules with a memory or a draw, and rules by eigenvectors: what they remember, draw, drop, and survive."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narses.errors import ConfigError, InputError
from narses.rules import Caf, CenteredClipping, Context, Dnc, SignGuard, make
from narses.rules.sign_guard import largest_cluster
from narses.rules.spectrum import finite_squares, widest
from narses.rules.weighing import inner_products, scaled, shortening, weighted_mean
from narses.updates import Updates
from tests.oracles import robust

seeds = st.integers(0, 2**31)


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def honest_and_liars(n: int, f: int, d: int, lie: Tensor, seed: int = 0) -> Tensor:
    """n - f updates around 1, spread 0.1, and f copies of `lie` (D,) that differ in their noise."""
    x_ND = 1 + 0.1 * normal(n, d, seed)
    x_ND[n - f :] += lie - 1
    return x_ND


# -- centered clipping ---------------------------------------------------------------------------------------------------


def clipped(x_ND: Tensor, centre_D: Tensor | None = None, **fields: float) -> Tensor:
    state = None if centre_D is None else {"centre": centre_D}
    result = CenteredClipping(**fields)(Updates.of(x_ND), 1, Context(round=3, state=state))  # type: ignore[arg-type]
    assert result.state is not None
    assert torch.equal(result.state["centre"], result.vector_D)
    assert result.state["centre"].data_ptr() != result.vector_D.data_ptr()
    return result.vector_D


@settings(deadline=None)
@given(seeds, st.integers(3, 9), st.sampled_from([0.01, 1.0, 100.0]), st.integers(1, 4))
def test_centered_clipping_goes_on_from_the_last_round(seed: int, n: int, radius: float, iterations: int) -> None:
    x_ND, centre_D = normal(n, 5, seed), normal(1, 5, seed + 1)[0]

    vector_D = clipped(x_ND, centre_D, radius=radius, iterations=iterations)

    expected_D, _, _ = robust.centered_clipping(x_ND.numpy(), 1, radius, iterations, centre_D.numpy())
    np.testing.assert_allclose(vector_D.numpy(), expected_D, rtol=1e-12, atol=1e-13)
    assert float((vector_D - centre_D).norm()) <= iterations * radius * (1 + 1e-12)


def test_centered_clipping_moves_by_its_radius_towards_one_and_the_same_vector() -> None:
    x_ND = torch.tensor([[3e38, 0.0], [3e38, 0.0], [3e38, 0.0]])
    one_D = clipped(x_ND, radius=2.0)
    two_D = clipped(x_ND, one_D, radius=2.0)
    assert one_D.tolist() == [2.0, 0.0]
    assert two_D.tolist() == [4.0, 0.0]


def test_one_liar_at_1e30_moves_centered_clipping_by_a_share_of_the_radius() -> None:
    x_ND = torch.ones(5, 4)
    x_ND[4] = -1e30
    vector_D = clipped(x_ND, torch.ones(4), radius=1.0)
    torch.testing.assert_close(vector_D, torch.full((4,), 1 - 0.5 / 5))


def test_centered_clipping_s_state_at_the_limits_of_float32_stays_finite() -> None:
    limit = torch.finfo(torch.float32).max
    assert bool(clipped(torch.full((3, 2), limit), torch.full((2,), limit), radius=1e38).isfinite().all())
    assert bool(clipped(torch.full((3, 2), limit), torch.full((2,), -limit), radius=1e38).isfinite().all())


def test_centered_clipping_refuses_a_state_of_another_length() -> None:
    with pytest.raises(InputError, match=r"state of the last round has shape \(3,\), expected \(5,\)"):
        clipped(normal(3, 5), torch.ones(3))


# -- what is drawn ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [{"name": "dnc", "subsample": 3}, {"name": "sign-guard", "fraction": 0.2}], ids=str)
def test_draws_are_a_function_of_seed_and_round(table: dict[str, object]) -> None:
    updates = Updates.of(normal(9, 40))

    def at(round_: int, seed: int = 0) -> Tensor:
        return make({**table, "seed": seed})(updates, 2, Context(round=round_)).vector_D

    rounds = [at(i) for i in range(12)]
    assert all(torch.equal(at(i), rounds[i]) for i in range(12))
    assert torch.equal(make(table)(updates, 2).vector_D, rounds[0]), "without a context it is round 0"
    assert len({tuple(v.tolist()) for v in rounds}) > 3
    assert len({tuple(at(0, seed).tolist()) for seed in range(12)}) > 3


# -- divide and conquer, covariance filter ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Dnc(), Dnc(iterations=3, subsample=50), Caf()], ids=str)
@pytest.mark.parametrize("size", [3.0, 1e3, 1e30])
def test_colluders_on_one_side_are_filtered_out(rule: Dnc | Caf, size: float) -> None:
    x_ND = honest_and_liars(11, 3, 200, torch.full((200,), -size, dtype=torch.float64))
    vector_D = rule(Updates.of(x_ND), 3).vector_D
    assert float((vector_D - 1).abs().max()) < 0.2


def test_caf_drops_liars_in_several_directions_one_after_another() -> None:
    x_ND = honest_and_liars(13, 3, 20, torch.zeros(20, dtype=torch.float64))
    x_ND[10, 0], x_ND[11, 1], x_ND[12, 2] = 1e30, -1e25, 1e20
    assert float((Caf()(Updates.of(x_ND), 3).vector_D - 1).abs().max()) < 0.3


def test_dnc_drops_c_f_updates() -> None:
    x_ND = honest_and_liars(12, 4, 30, torch.full((30,), 9.0, dtype=torch.float64))
    for c, dropped in ((0.5, 2), (1.0, 4), (1.5, 6)):
        selected_K = Dnc(c=c)(Updates.of(x_ND), 4).selected
        assert selected_K is not None
        assert len(selected_K) == 12 - dropped
    assert Dnc(c=3.0).min_updates(4) == 13


def test_dnc_without_a_common_survivor_keeps_those_that_survived_most_often() -> None:
    """Each column singles out another of the three updates; with one column per iteration all are dropped in the end."""
    x_ND = torch.eye(3, dtype=torch.float64).repeat(1, 20)
    selected_K = Dnc(iterations=40, subsample=1)(Updates.of(x_ND), 1).selected
    assert selected_K is not None
    assert 1 <= len(selected_K) < 3


@settings(deadline=None)
@given(seeds, st.integers(2, 8), st.sampled_from([1e-100, 1.0, 1e100, 1e160]))
def test_the_widest_direction_from_distances_is_that_of_the_matrix(seed: int, n: int, scale: float) -> None:
    x_ND, weights_N = (
        normal(n, 5, seed) + 3,
        torch.rand(n, generator=torch.Generator().manual_seed(seed)).double() + 0.1,
    )

    spread = widest(finite_squares(Updates.of(x_ND * scale)), weights_N)

    x, w = x_ND.numpy(), weights_N.numpy() / float(weights_N.sum())
    mean = w @ x
    values, vectors = np.linalg.eigh((x - mean).T @ ((x - mean) * w[:, None]))
    places = ((x - mean) @ vectors[:, -1]) ** 2
    np.testing.assert_allclose(spread.places_N.numpy() / float(spread.places_N.max()), places / places.max(), atol=1e-6)
    if scale in (1.0, 1e100):
        np.testing.assert_allclose(spread.variance / scale**2, values[-1], rtol=1e-9)


def test_a_row_of_1e30_that_lost_its_weight_leaves_no_noise() -> None:
    x_ND = normal(6, 4)
    x_ND[5] = 1e30
    squared_NN = finite_squares(Updates.of(x_ND))
    alone = widest(squared_NN[:5, :5], torch.ones(5, dtype=torch.float64))
    assert torch.equal(alone.places_N, widest(finite_squares(Updates.of(x_ND[:5])), torch.ones(5).double()).places_N)


# -- SignGuard -------------------------------------------------------------------------------------------------------------


def test_sign_guard_drops_other_signs_and_unusual_lengths() -> None:
    x_ND = honest_and_liars(10, 2, 100, torch.full((100,), -1.0, dtype=torch.float64))
    x_ND[0] *= 50
    x_ND[1] *= 0.01
    result = SignGuard()(Updates.of(x_ND), 2)
    assert result.selected is not None
    assert result.selected.tolist() == [2, 3, 4, 5, 6, 7]
    assert float((result.vector_D - 1).abs().max()) < 0.2


def test_sign_guard_shortens_to_the_median_length() -> None:
    x_ND = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]])
    assert SignGuard()(Updates.of(x_ND), 1).vector_D.tolist() == [1.0, 1.0]


def test_where_no_update_passes_both_filters_length_decides() -> None:
    """The three of usual length differ in signs; the largest cluster is that of the two unusual ones."""
    x_ND = torch.tensor([[1.0, -1.0], [-1.0, 0.0], [0.0, 1.0], [0.01, 0.01], [0.02, 0.01]])
    rule = SignGuard(fraction=1.0, quantile=0.2)
    result = rule(Updates.of(x_ND), 1)
    assert result.selected is not None
    assert result.selected.tolist() == robust.sign_guard(x_ND.double().numpy(), 1, fraction=1.0, quantile=0.2)[1]
    assert result.selected.tolist() == [0, 1, 2]


@settings(deadline=None)
@given(seeds, st.integers(1, 12), st.floats(0.1, 1.0))
def test_mean_shift_agrees_with_a_naive_one(seed: int, n: int, quantile: float) -> None:
    points_NF = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    points_NF[: n // 2] = points_NF[: n // 2] / 20
    members = largest_cluster(points_NF, quantile).nonzero().squeeze(1).tolist()
    assert set(members) == robust.mean_shift(list(points_NF.numpy()), quantile)


# -- weights ---------------------------------------------------------------------------------------------------------------


def test_weights_that_are_equal_give_the_mean_to_the_last_bit() -> None:
    x_ND = torch.full((7, 2), 0.1, dtype=torch.float64)
    assert weighted_mean(Updates.of(x_ND), torch.tensor([0.3] * 6 + [0.0]).double()).tolist() == [0.1, 0.1]
    mixed_D = weighted_mean(Updates.of(torch.tensor([[1.0], [4.0]])), torch.tensor([1.0, 2.0]).double())
    assert mixed_D.tolist() == [3.0]


def test_shortening_takes_lengths_beyond_float64_for_infinite() -> None:
    norms_N = torch.tensor([0.0, 1.0, 4.0, float("inf")], dtype=torch.float64)
    assert shortening(norms_N, 2.0).tolist() == [1.0, 1.0, 0.5, 0.0]
    assert shortening(norms_N, float("inf")).tolist() == [1.0] * 4


def test_rows_are_scaled_in_a_copy_and_only_if_needed() -> None:
    x_ND = normal(3, 4)
    updates = Updates.of(x_ND)
    assert scaled(updates, torch.ones(3).double()) is updates
    halved = scaled(updates, torch.tensor([1.0, 0.5, 0.0]).double())
    assert torch.equal(halved.columns(torch.arange(4)), x_ND * torch.tensor([[1.0], [0.5], [0.0]]))
    assert torch.equal(x_ND, normal(3, 4))


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from([1, 16_384, 16_385, 40_000]))
def test_inner_products_are_direct(seed: int, d: int) -> None:
    x_ND, v_D = normal(4, d, seed), normal(1, d, seed + 1)[0]
    x_ND[2] *= 1e30
    expected = x_ND.numpy() @ v_D.numpy()
    lengths = np.linalg.norm(x_ND.numpy(), axis=1) * np.linalg.norm(v_D.numpy())
    got = inner_products(Updates.of(x_ND), v_D).numpy()
    assert (np.abs(got - expected) <= 1e-13 * lengths).all()


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"name": "centered-clipping", "radius": 0.0}, "radius"),
        ({"name": "centered-clipping", "iterations": 0}, "iterations"),
        ({"name": "dnc", "c": -0.5}, "c = -0.5"),
        ({"name": "dnc", "subsample": 0}, "subsample"),
        ({"name": "sign-guard", "fraction": 1.5}, "fraction"),
        ({"name": "sign-guard", "lower": -1.0}, "lower"),
    ],
    ids=str,
)
def test_senseless_fields_are_refused_by_name(table: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make(table)
