"""Pre-aggregations: what they hand to the wrapped rule, what can be claimed for both, and how they nest."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.dataclasses import dataclass
from torch import Tensor

import narses
from narses.combine import Mean
from narses.config import STRICT
from narses.errors import ConfigError, InputError
from narses.rules import (
    Aggregation,
    Arc,
    Bucketing,
    Clipping,
    Context,
    Krum,
    Median,
    Nnm,
    Property,
    make,
    rule_table,
    trusted_samples,
)
from narses.updates import Updates
from tests.oracles import robust

seeds = st.integers(0, 2**31)


@dataclass(frozen=True, config=STRICT)
class Seen:
    """Remembers what it was called with; returns the mean and a state."""

    calls: ClassVar[list[tuple[Tensor, int, Context | None]]] = []

    def min_updates(self, f: int) -> int:
        return 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        self.calls.append((updates.columns(torch.arange(updates.dimension)), f, context))
        return Aggregation(updates.per_coordinate(Mean()), state={"calls": torch.tensor([len(self.calls)])})


SEEN = f"{__name__}:Seen"


def handed(table: dict[str, Any], x_ND: Tensor, f: int, context: Context | None = None) -> tuple[Tensor, int]:
    """The rows and the f that the wrapped rule gets."""
    Seen.calls.clear()
    result = make({**table, "rule": SEEN})(Updates.of(x_ND), f, context)
    assert result.state is not None
    assert result.state["calls"].tolist() == [1]
    ((rows_ND, inner_f, passed),) = Seen.calls
    assert passed is context
    return rows_ND, inner_f


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_example_of_byzfl() -> None:
    """Its documentation's matrix and results, f = 1; the middle row's tie is broken in the same way."""
    x_ND = torch.arange(1.0, 10.0, dtype=torch.float64).view(3, 3)
    mixed_ND, _ = handed({"name": "nnm"}, x_ND, 1)
    assert mixed_ND.tolist() == [[2.5, 3.5, 4.5], [2.5, 3.5, 4.5], [5.5, 6.5, 7.5]]
    shorter_ND, _ = handed({"name": "clipping", "radius": 2.0}, x_ND, 1)
    np.testing.assert_allclose(
        shorter_ND,
        [
            [0.53452248, 1.06904497, 1.60356745],
            [0.91168461, 1.13960576, 1.36752692],
            [1.00514142, 1.14873305, 1.29232469],
        ],
        atol=1e-8,
    )
    adapted_ND, _ = handed({"name": "arc"}, x_ND, 1)
    np.testing.assert_allclose(adapted_ND, [[1, 2, 3], [4, 5, 6], [4.41004009, 5.04004582, 5.67005155]], atol=1e-8)


@settings(deadline=None)
@given(seeds, st.integers(1, 9), st.integers(0, 4))
def test_mixing_takes_each_update_with_its_nearest(seed: int, n: int, f: int) -> None:
    f = min(f, n - 1)
    x_ND = normal(n, 4, seed)
    x_ND[: n // 3] = x_ND[0]
    mixed_ND, inner_f = handed({"name": "nnm"}, x_ND, f)

    expected: list[np.ndarray] = []
    robust.nnm(x_ND.numpy(), f, lambda y, g: (expected.append(y), robust.centered_clipping(y, g))[1])

    assert inner_f == f
    np.testing.assert_allclose(mixed_ND, expected[0], rtol=1e-13, atol=1e-13)


def test_a_far_liar_is_in_no_neighbourhood_but_its_own() -> None:
    x_ND = torch.cat([normal(6, 3), torch.full((1, 3), 1e30, dtype=torch.float64)])
    mixed_ND, _ = handed({"name": "nnm"}, x_ND, 1)
    assert float((mixed_ND[:6] - x_ND[:6].mean(dim=0)).abs().max()) < 1e-15
    assert torch.equal(mixed_ND[0], mixed_ND[5])


@settings(deadline=None)
@given(seeds, st.integers(1, 11), st.integers(1, 5), st.integers(0, 3))
def test_buckets_hold_every_update_once(seed: int, n: int, size: int, round_: int) -> None:
    one_hot_NN = torch.eye(n, dtype=torch.float64)
    means_BN, f = handed({"name": "bucketing", "size": size, "seed": seed}, one_hot_NN, n, Context(round=round_))

    counts_B = (means_BN > 0).sum(dim=1)
    assert len(means_BN) == -(-n // size)
    assert f == min(n, len(means_BN))
    assert counts_B[:-1].tolist() == [size] * (len(means_BN) - 1)
    torch.testing.assert_close(means_BN * counts_B[:, None], (means_BN > 0).double())
    assert (means_BN > 0).sum(dim=0).tolist() == [1] * n


def test_buckets_are_drawn_anew_each_round() -> None:
    x_ND, table = normal(8, 3), {"name": "bucketing", "seed": 4}
    rounds = [handed(table, x_ND, 1, Context(round=i))[0] for i in range(10)]
    assert torch.equal(rounds[3], handed(table, x_ND, 1, Context(round=3))[0])
    assert len({tuple(rows.flatten().tolist()) for rows in rounds}) == 10
    assert not torch.equal(rounds[0], handed({**table, "seed": 5}, x_ND, 1, Context(round=0))[0])


@pytest.mark.parametrize(
    ("rule", "f", "need"),
    [
        (Bucketing(rule=Krum()), 1, 2 * 4 + 1),  # 5 buckets of 2; the last may hold one
        (Bucketing(rule=Krum(), size=3), 2, 3 * 6 + 1),
        (Bucketing(rule=Median(), size=1), 2, 5),
        (Nnm(rule=Krum()), 2, 7),
        (make({"name": "nnm", "rule": "mean"}), 4, 5),
        (Clipping(rule=Krum()), 2, 7),
        (Arc(rule=Median()), 3, 7),
    ],
    ids=str,
)
def test_how_many_updates_are_needed(rule: Any, f: int, need: int) -> None:
    assert rule.min_updates(f) == need
    assert rule(Updates.of(normal(need, 3)), f).vector_D.shape == (3,)
    with pytest.raises(InputError, match=rf"needs n >= {need} updates but has n = {need - 1}"):
        rule(Updates.of(normal(need - 1, 3)), f)


def test_clipping_leaves_short_updates_alone_and_copies_nothing_then() -> None:
    x_ND = torch.tensor([[3.0, 4.0], [0.3, 0.4], [3e38, 3e38]])
    rows_ND, _ = handed({"name": "clipping", "radius": 1.0}, x_ND, 0)
    torch.testing.assert_close(rows_ND, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.5**0.5, 0.5**0.5]]))
    result = Clipping(rule=Krum(), radius=1e39)(Updates.of(torch.cat([x_ND, x_ND])), 1)
    expected = Krum()(Updates.of(torch.cat([x_ND, x_ND])), 1)
    assert torch.equal(result.vector_D, expected.vector_D)
    assert result.selected is not None
    assert result.scores is not None
    assert expected.selected is not None
    assert result.selected.tolist() == expected.selected.tolist()


@settings(deadline=None)
@given(seeds, st.integers(1, 12), st.integers(0, 6))
def test_arc_shortens_the_longest_to_the_longest_other_one(seed: int, n: int, f: int) -> None:
    f = min(f, n)
    x_ND = normal(n, 4, seed)
    rows_ND, _ = handed({"name": "arc"}, x_ND, f)
    before_N, after_N = x_ND.norm(dim=1), rows_ND.norm(dim=1)

    k = 2 * f * (n - f) // n
    limit = before_N.sort(descending=True).values[k]
    torch.testing.assert_close(after_N, before_N.clamp(max=limit))
    assert int((after_N < before_N * (1 - 1e-12)).sum()) == k, "of lengths that differ"
    torch.testing.assert_close(rows_ND / after_N[:, None], x_ND / before_N[:, None])


def test_a_wrapper_claims_what_its_rule_claims_and_it_keeps() -> None:
    everything = {Property.PERMUTATION, Property.TRANSLATION, Property.SCALING, Property.INPUT_RANGE}
    assert Nnm(rule=Krum()).properties == everything
    assert Nnm(rule=make("centered-clipping")).properties == {Property.PERMUTATION}
    assert Bucketing(rule=Median()).properties == everything - {Property.PERMUTATION}
    assert Arc(rule=Krum()).properties == {Property.PERMUTATION, Property.SCALING}
    assert Clipping(rule=Median()).properties == {Property.PERMUTATION}
    assert Nnm(rule=Arc(rule=Krum())).properties == {Property.PERMUTATION, Property.SCALING}
    assert Nnm(rule=make(SEEN)).properties == frozenset()
    assert Nnm.properties == frozenset()


def test_wrappers_nest_and_have_a_table() -> None:
    table = {"name": "arc", "rule": {"name": "nnm", "rule": {"name": "krum", "p": 1.0}}}
    rule = make(table)
    assert rule_table(rule) == table
    assert rule == make(table)
    assert hash(rule) == hash(make(table))
    x_ND = normal(9, 3)
    inside = narses.aggregate(table["rule"], handed({"name": "arc"}, x_ND, 2)[0], 2).vector_D
    assert torch.equal(narses.aggregate(table, x_ND, 2).vector_D, inside)


def test_a_wrapper_asks_for_what_its_rule_needs() -> None:
    assert (
        trusted_samples(make({"name": "nnm", "rule": {"name": "bucketing", "rule": {"name": "zeno", "samples": 7}}}))
        == 7
    )
    assert trusted_samples(make("nnm")) == 0
    with pytest.raises(
        InputError, match="Zeno judges updates by 4 samples of the server's own data, but was called without"
    ):
        narses.aggregate({"name": "arc", "rule": "zeno"}, normal(5, 3), 1)


def test_wrong_inner_rules_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"nnm.*unknown rule 'crum'"):
        make({"name": "nnm", "rule": {"name": "crum"}})
    with pytest.raises(ConfigError, match=r"nnm.*rule"):
        make({"name": "nnm", "rule": 3})
    with pytest.raises(ConfigError, match="import strings are accepted from one's own configuration only"):
        make({"name": "nnm", "rule": {"name": SEEN}}, trusted=False)
