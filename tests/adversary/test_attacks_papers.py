"""What the papers say about their attacks, checked on this code."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import kstest
from scipy.stats import t as student_t
from torch import Tensor

from narses.errors import ConfigError, InputError
from narses_adversary import attacks
from narses_adversary.attacks import View, alie_z_max
from tests.oracles import attacks as oracle

torch.set_num_threads(1)


def view_of(x_HD: Tensor, members: tuple[int, ...] = (), n: int | None = None, **changes: Any) -> View:
    fields: dict[str, Any] = {
        "updates_HD": x_HD,
        "worker_ids": tuple(range(len(x_HD))),
        "parameters_D": torch.zeros(x_HD.shape[1]),
        "n": len(x_HD) if n is None else n,
        "f": len(members),
        "round": 0,
        "rule": None,
        "learning_rate": 0.1,
        "generator": torch.Generator().manual_seed(0),
        "members": members,
    }
    return View(**(fields | changes))


def normal(*shape: int, mean: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


class TestALittleIsEnough:
    def test_worked_example(self) -> None:
        """Section 3.3: n = 50, m = 24 -> s = 2, (n - s)/n = 0.96, z = 1.75."""
        assert alie_z_max(50, 24) == pytest.approx(1.750686, abs=1e-6)
        assert math.floor(100 * alie_z_max(50, 24)) == 175
        assert alie_z_max(50, 24, "n-m") == pytest.approx(1.4261, abs=1e-4)

    def test_its_own_experiments_exceed_its_z_max(self) -> None:
        """n = 51, m = 12 allow about 0.60; the experiments use 1.5 and 1.0."""
        assert alie_z_max(51, 12) == pytest.approx(0.5992, abs=1e-4)
        assert alie_z_max(27, 12) == pytest.approx(1.45, abs=0.01)  # inside Bulyan's selection, theta = 27

    @example(n=10, m=1, ratio="n")  # a share of exactly one half: z = 0
    @given(n=st.integers(1, 200), m=st.integers(0, 200), ratio=st.sampled_from(["n", "n-m"]))
    def test_z_max_is_the_supremum_or_refused(self, n: int, m: int, ratio: Any) -> None:
        s = n // 2 + 1 - m
        share = (n - s) / n if ratio == "n" else (n - m - s) / (n - m) if n > m else math.nan
        if s >= 1 and 0.5 < share < 1:
            assert alie_z_max(n, m, ratio) == pytest.approx(oracle.z_max(n, m, ratio), abs=1e-9)
            return
        with pytest.raises(ConfigError) as caught:
            alie_z_max(n, m, ratio)
        assert f"n = {n}, m = {m}, s = {s}" in str(caught.value)

    @pytest.mark.parametrize("m", [26, 30, 50])
    def test_auto_refuses_a_majority_at_the_call_but_a_given_z_does_not(self, m: int) -> None:
        view = view_of(normal(50, 3), tuple(range(m)))
        with pytest.raises(ConfigError, match=f"n = 50, m = {m}, s = {26 - m} .*set z to a number"):
            attacks.make("alie")(view, m)
        assert attacks.make({"name": "alie", "z": 1.5})(view, m).isfinite().all()

    def test_every_member_sends_the_same_shifted_mean(self) -> None:
        """Algorithm 3 lines 5-8 on parameters: mu + z * sigma of the corrupted workers, whatever the others sent."""
        x_HD = normal(50, 40, mean=3.0)
        x_HD[24:] = 1e9
        forged = attacks.make("alie")(view_of(x_HD, tuple(range(24)), kind="parameters"), 24)
        own = x_HD[:24].numpy()
        expected = own.mean(axis=0) + 1.750686 * own.std(axis=0)
        np.testing.assert_allclose(forged.numpy(), np.tile(expected, (24, 1)), rtol=1e-6)

    def test_parameters_and_gradients_are_the_same_attack(self) -> None:
        """p_i = P - lr * g_i, so + on parameters is - on gradients: mal(p) = P - lr * mal(g)."""
        gradients, parameters = normal(9, 6), normal(6, seed=1)
        attack = attacks.make({"name": "alie", "z": 1.5})
        on_gradients = attack(view_of(gradients, (0, 1, 2)), 3)
        on_parameters = attack(view_of(parameters - 0.1 * gradients, (0, 1, 2), kind="parameters"), 3)
        torch.testing.assert_close(on_parameters, parameters - 0.1 * on_gradients)
        assert (on_gradients < gradients[:3].mean(dim=0)).all()

    def test_table_1_all_workers_with_z_0_send_the_mean(self) -> None:
        x_HD = normal(51, 7)
        forged = attacks.make({"name": "alie", "z": 0})(view_of(x_HD, tuple(range(51))), 51)
        torch.testing.assert_close(forged, x_HD.mean(dim=0).expand(51, 7))

    def test_enough_honest_workers_lie_farther_out(self) -> None:
        """Why it works: honest values beyond mu - z_max * sigma make the forged value the median.

        Beyond mean and biased deviation of m others, a fresh value follows Student's t with m - 1 degrees of freedom.
        """
        n, m = 50, 24
        x_HD = normal(n, 4000)
        forged = attacks.make("alie")(view_of(x_HD, tuple(range(m))), m)
        farther = (x_HD[m:] < forged[0]).sum(dim=0).double().mean().item()
        beyond = student_t.sf(alie_z_max(n, m) * math.sqrt((m - 1) / (m + 1)), m - 1)
        assert farther == pytest.approx((n - m) * beyond, rel=0.06)

    def test_statistics_come_from_all_rows_without_members(self) -> None:
        x_HD = normal(9, 5)
        for members, estimate in [((), False), ((20, 21), True)]:
            view = view_of(x_HD, members, n=30)
            forged = attacks.make({"name": "alie", "z": 1.0})(view, 2)
            torch.testing.assert_close(forged[0], x_HD.mean(dim=0) - x_HD.std(dim=0, correction=0))
            assert view.memory["estimate"] is estimate

    def test_a_lone_attacker_has_no_deviation(self) -> None:
        x_HD = normal(5, 3)
        view = view_of(x_HD, (2,))
        assert torch.equal(attacks.make({"name": "alie", "z": 1.5})(view, 1)[0], x_HD[2])
        with pytest.raises(InputError, match="at least 2 updates, the view has 1"):
            attacks.make({"name": "alie", "z": 1.5, "ddof": 1})(view, 1)


class TestFallOfEmpires:
    """Section 6: n = 25; 12 members against the median, 11 against Krum."""

    def test_the_replaced_gradients_are_not_in_the_mean(self) -> None:
        x_HD = normal(25, 6, mean=1.0)
        x_HD[:12] = 1e9
        forged = attacks.make({"name": "ipm", "epsilon": 10})(view_of(x_HD, tuple(range(12))), 12)
        torch.testing.assert_close(forged, (-10 / 13 * x_HD[12:].sum(dim=0)).expand(12, 6))

    @pytest.mark.parametrize("epsilon", [10, 1, 0.1])
    def test_positive_epsilon_opposes_the_true_gradient(self, epsilon: float) -> None:
        true_D = normal(500, seed=9)
        x_HD = true_D + normal(25, 500)
        forged = attacks.make({"name": "ipm", "epsilon": epsilon})(view_of(x_HD, tuple(range(11))), 11)
        assert (forged @ true_D < 0).all()
        assert (forged @ x_HD[11:].mean(dim=0) < 0).all()

    def test_zero_sends_zeros_and_negative_pushes_along(self) -> None:
        view = view_of(normal(25, 30, mean=0.5), tuple(range(12)))
        assert not attacks.make({"name": "ipm", "epsilon": 0})(view, 12).any()
        along = attacks.make({"name": "ipm", "epsilon": -10})(view, 12)
        torch.testing.assert_close(along[0], 10 * view.updates_HD[12:].mean(dim=0))

    def test_theorem_1_large_epsilon_turns_the_median(self) -> None:
        """m - 2q = 1, gradients near convergence: the median's inner product with the true gradient is negative."""
        true_D = torch.full((400,), 0.1, dtype=torch.float64)
        x_HD = true_D + normal(25, 400)
        x_HD[:12] = attacks.make({"name": "ipm", "epsilon": 100})(view_of(x_HD, tuple(range(12))), 12)
        assert x_HD.median(dim=0).values @ true_D < 0

    def test_theorem_2_small_epsilon_wins_krum(self) -> None:
        """The forged vectors, at distance 0 from each other, have the smallest Krum score (n = 25, f = 11)."""
        x_HD = 0.1 + normal(25, 400)
        x_HD[:11] = attacks.make({"name": "ipm", "epsilon": 0.1})(view_of(x_HD, tuple(range(11))), 11)
        squared_NN = torch.cdist(x_HD, x_HD).square()
        scores_N = squared_NN.sort(dim=1).values[:, 1 : 25 - 11 - 2 + 1].sum(dim=1)
        assert scores_N.argmin() < 11

    @pytest.mark.parametrize(("members", "estimate"), [((0, 1, 2, 3), True), ((0, 1), False), ((), False)])
    def test_an_attacker_that_sees_only_its_own_estimates(self, members: tuple[int, ...], estimate: bool) -> None:
        x_HD = normal(4, 5)
        view = view_of(x_HD, members, n=25)
        forged = attacks.make({"name": "ipm", "epsilon": 1})(view, len(members) or 1)
        rest = x_HD if estimate else x_HD[len(members) :]
        torch.testing.assert_close(forged[0], -rest.mean(dim=0))
        assert view.memory["estimate"] is estimate

    @pytest.mark.parametrize("name", ["alie", "ipm", "sign-flip"])
    def test_nothing_seen_nothing_to_send(self, name: str) -> None:
        table = {"name": name} | ({"epsilon": 1} if name == "ipm" else {"z": 1} if name == "alie" else {})
        with pytest.raises(InputError, match="the view has 0"):
            attacks.make(table)(view_of(torch.empty(0, 3), (4, 5), n=9), 2)


class TestOthers:
    def test_gaussian_draws_n_0_200_squared_independently(self) -> None:
        view = view_of(torch.zeros(3, 20_000), (0, 1, 2))
        noise = attacks.make("gaussian")(view, 3)
        for row_D in noise:
            assert kstest(row_D.numpy() / 200, "norm").pvalue > 0.01
        assert (np.corrcoef(noise.numpy()) - np.eye(3)).max() < 0.03
        assert not torch.equal(attacks.make("gaussian")(view, 3), noise)  # the generator has moved on

    def test_gaussian_noise_of_a_member_does_not_depend_on_how_many_follow(self) -> None:
        few, many = (view_of(torch.zeros(8, 50), tuple(range(m))) for m in (2, 8))
        assert torch.equal(attacks.make("gaussian")(many, 8)[:2], attacks.make("gaussian")(few, 2))

    def test_sign_flip_keeps_the_order_of_members_and_estimates_who_was_not_seen(self) -> None:
        x_HD = normal(4, 3)
        view = view_of(x_HD, (2, 9, 0), n=12)
        forged = attacks.make({"name": "sign-flip", "scale": 2})(view, 3)
        torch.testing.assert_close(forged, -2 * torch.stack([x_HD[2], x_HD.mean(dim=0), x_HD[0]]))
        assert view.memory["estimate"] is True

    def test_label_flip_of_ten_classes_is_9_minus_y(self) -> None:
        attack = attacks.make("label-flip").bind(10)
        labels = torch.arange(10).repeat(3)
        inputs = torch.rand(30, 4)
        flipped_inputs, flipped = attack(inputs, labels, torch.Generator())
        assert flipped.tolist() == oracle.label_flip(labels.tolist(), 10)
        assert torch.equal(flipped_inputs, inputs)

    def test_label_flip_knows_its_classes_or_says_so(self) -> None:
        with pytest.raises(ConfigError, match="number of classes is unknown"):
            attacks.make("label-flip")(torch.rand(2, 4), torch.tensor([0, 1]), torch.Generator())
        with pytest.raises(ConfigError, match="classes = 10, but the data set has 100"):
            attacks.make({"name": "label-flip", "classes": 10}).bind(100)
        with pytest.raises(InputError, match=r"labels are 0\.\.9, the batch has 3\.\.10"):
            attacks.make({"name": "label-flip", "classes": 10})(
                torch.rand(2, 4), torch.tensor([3, 10]), torch.Generator()
            )

    @pytest.mark.parametrize(
        ("table", "expected"),
        [
            ({"name": "alie", "z": 1.5}, 1.5),
            ({"name": "ipm", "epsilon": -10}, -10.0),
            ("sign-flip", 1.0),
            ("gaussian", 200.0),
            ("label-flip", None),
            ("alie", None),
        ],
    )
    def test_strength(self, table: Any, expected: float | None) -> None:
        assert attacks.strength(attacks.make(table)) == expected

    def test_strength_of_auto_is_known_with_n_and_m_and_refuses_early(self) -> None:
        assert attacks.strength(attacks.make("alie"), n=50, m=24) == pytest.approx(1.750686, abs=1e-6)
        with pytest.raises(ConfigError, match="n = 50, m = 26, s = 0"):
            attacks.strength(attacks.make("alie"), n=50, m=26)
