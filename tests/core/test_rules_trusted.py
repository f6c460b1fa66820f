"""Rules that judge updates by the server's own data: Zeno, FLTrust."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narses.errors import InputError
from narses.rules import Context, FlTrust, Zeno, make, trusted_samples
from narses.updates import Updates
from tests.oracles import robust, trust

seeds = st.integers(0, 2**31)


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def honest(n: int, d: int, seed: int = 0) -> Tensor:
    """Gradients at the start of the tests' bowl, with noise."""
    true_D = torch.from_numpy(trust.gradient(trust.start(d)))
    return true_D + 0.1 * true_D.norm() / d**0.5 * normal(n, d, seed)


@pytest.mark.parametrize("name", ["zeno", "fl-trust"])
@pytest.mark.parametrize("missing", ["context", "trusted", "parameters_D", "learning_rate"])
def test_without_trusted_data_one_sentence_says_so(name: str, missing: str) -> None:
    whole = trust.context(3)
    fields = {key: getattr(whole, key) for key in ("trusted", "parameters_D", "learning_rate") if key != missing}
    context = None if missing == "context" else Context(round=0, **fields)
    with pytest.raises(
        InputError, match=r"judges updates by \d+ samples of the server's own data, but was called without"
    ):
        make(name)(Updates.of(normal(3, 3)), 1, context)


def test_how_many_samples_are_asked_for() -> None:
    assert trusted_samples(Zeno()) == 4
    assert trusted_samples(FlTrust(samples=7)) == 7
    assert trusted_samples(make("krum")) == 0


@settings(deadline=None)
@given(seeds, st.integers(2, 8), st.integers(0, 7), st.sampled_from(["sum", "mean"]), st.sampled_from([0.5, 200.0]))
def test_zeno_s_scores_are_the_paper_s(seed: int, n: int, f: int, penalty: str, rho_ratio: float) -> None:
    f = min(f, n - 1)
    x_ND = normal(n, 5, seed)
    rule = make({"name": "zeno", "penalty": penalty, "rho_ratio": rho_ratio})
    result = rule(Updates.of(x_ND), f, trust.context(5))

    w, x = trust.start(5), x_ND.numpy()
    square = (x**2).sum(axis=1) if penalty == "sum" else (x**2).mean(axis=1)
    scores = [trust.loss(w) - trust.loss(w - trust.RATE * row) for row in x] - trust.RATE / rho_ratio * square
    assert result.scores is not None
    assert result.selected is not None
    np.testing.assert_allclose(result.scores.numpy(), -scores, rtol=1e-9, atol=1e-12)
    assert set(result.selected.tolist()) == set(np.argsort(-scores)[: n - f].tolist())


def test_zeno_survives_a_majority_of_liars() -> None:
    x_ND = honest(8, 30)
    x_ND[2:] *= -3
    result = Zeno()(Updates.of(x_ND), 6, trust.context(30))
    assert result.selected is not None
    assert result.selected.tolist() == [0, 1]


def test_zeno_takes_ties_by_row_and_drops_what_has_no_loss() -> None:
    x_ND = torch.ones(5, 3)
    x_ND[0] = 3e38
    result = Zeno()(Updates.of(x_ND), 2, trust.context(3))
    assert result.selected is not None
    assert result.selected.tolist() == [1, 2, 3]

    class NoLoss(trust.Bowl):
        def loss(self, parameters_D: Tensor) -> float:
            return float("nan")

    context = Context(round=0, parameters_D=torch.zeros(3), learning_rate=0.1, trusted=NoLoss())
    result = Zeno()(Updates.of(x_ND), 2, context)
    assert result.selected is not None
    assert result.selected.tolist() == [0, 1, 2]
    assert result.scores is not None
    assert result.scores.tolist() == [float("inf")] * 5


@settings(deadline=None)
@given(seeds, st.integers(1, 8), st.sampled_from([1e-30, 1.0, 1e30]))
def test_fl_trust_gives_every_update_the_server_s_length(seed: int, n: int, scale: float) -> None:
    x_ND = normal(n, 6, seed)
    x_ND[0] *= scale
    vector_D = FlTrust()(Updates.of(x_ND), 0, trust.context(6)).vector_D
    expected_D, _, _ = robust.fl_trust(x_ND.numpy(), 0)
    np.testing.assert_allclose(vector_D.numpy(), expected_D, rtol=1e-11, atol=1e-14)
    own = float(np.linalg.norm(trust.gradient(trust.start(6))))
    assert float(vector_D.norm()) <= own * (1 + 1e-12)


def test_fl_trust_needs_one_honest_update() -> None:
    x_ND = honest(9, 40)
    x_ND[1:] *= -1e10
    vector_D = FlTrust()(Updates.of(x_ND), 8, trust.context(40)).vector_D
    own_D = torch.from_numpy(trust.gradient(trust.start(40)))
    torch.testing.assert_close(vector_D, x_ND[0] / x_ND[0].norm() * own_D.norm())


@pytest.mark.parametrize("row", [0.0, -1.0, 1.7e308])
def test_fl_trust_without_anybody_to_trust_makes_no_step(row: float) -> None:
    own_D = torch.from_numpy(trust.gradient(trust.start(4)))
    x_ND = (row * own_D.sign()).expand(3, 4)
    assert FlTrust()(Updates.of(x_ND), 1, trust.context(4)).vector_D.tolist() == [0.0] * 4


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_fl_trust_without_a_direction_of_its_own_makes_no_step(value: float) -> None:
    class Flat(trust.Bowl):
        def gradient(self, parameters_D: Tensor) -> Tensor:
            return torch.full_like(parameters_D, value)

    context = Context(round=0, parameters_D=torch.zeros(3), learning_rate=0.1, trusted=Flat())
    assert FlTrust()(Updates.of(normal(4, 3)), 1, context).vector_D.tolist() == [0.0] * 3
