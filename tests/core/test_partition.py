"""Sampling: shards, i.i.d. draws, and that nothing but (seed, worker, round) decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narses import partition
from narses.errors import ConfigError

TABLES: list[Any] = ["shards", "iid", {"name": "label", "labels_per_worker": 2}, {"name": "dirichlet", "alpha": 0.5}]


def _batch(
    seed: int, table: Any, n: int, size: int, worker: int, round_: int, batch: int, labels: Tensor | None = None
) -> Tensor:
    """The batch of a set of `size` samples, of four classes if nothing else is said."""
    labels_N = torch.arange(size) % 4 if labels is None else labels
    return partition.make(table).divide(seed, n, labels_N).batch(worker, round_, batch)


def _shares(table: Any, n: int, labels_N: Tensor, seed: int = 0) -> list[Tensor]:
    """Every worker's samples: one pass in one batch."""
    division = partition.make(table).divide(seed, n, labels_N)
    return [division.batch(worker, 0, len(labels_N)) for worker in range(n)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    n=st.integers(1, 12),
    size=st.integers(12, 200),
    batch=st.integers(1, 60),
)
def test_shards_are_disjoint_equal_and_walked_in_order(seed: int, n: int, size: int, batch: int) -> None:
    shard = size // n
    passes = -(-shard // batch)
    seen = []
    for worker in range(n):
        one_pass = [_batch(seed, "shards", n, size, worker, round_, batch) for round_ in range(passes)]
        assert [len(indices) for indices in one_pass[:-1]] == [batch] * (passes - 1)
        assert 1 <= len(one_pass[-1]) <= batch
        assert sum(map(len, one_pass)) == shard
        for round_, indices in enumerate(one_pass):
            assert torch.equal(_batch(seed, "shards", n, size, worker, round_ + 3 * passes, batch), indices)
        seen += torch.cat(one_pass).tolist()
    assert len(set(seen)) == len(seen) == n * shard
    assert set(seen) <= set(range(size))


def test_mnist_in_51_shards_has_14_full_batches_and_a_short_one() -> None:
    sizes = [len(_batch(0, "shards", 51, 60_000, 50, round_, 83)) for round_ in range(16)]
    assert sizes == [83] * 14 + [14, 83]


def test_shards_are_shuffled_by_the_seed() -> None:
    first = _batch(1, "shards", 4, 400, 0, 0, 100)
    assert not torch.equal(first, torch.arange(100))
    assert not torch.equal(first, _batch(2, "shards", 4, 400, 0, 0, 100))


@pytest.mark.parametrize("kind", TABLES, ids=str)
def test_a_batch_is_the_callers_own_and_needs_no_earlier_one(kind: Any) -> None:
    expected = _batch(7, kind, 5, 100, 3, 11, 8).clone()
    _batch(7, kind, 5, 100, 3, 11, 8).zero_()
    state = torch.get_rng_state()
    assert torch.equal(_batch(7, kind, 5, 100, 3, 11, 8), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert expected.dtype == torch.int64


def test_iid_draws_with_replacement_from_the_whole_set() -> None:
    draws = torch.stack([_batch(0, "iid", 10, 50, worker, t, 64) for worker in range(10) for t in range(50)])
    assert draws.shape == (500, 64)
    counts = torch.bincount(draws.flatten(), minlength=50).double()
    assert len(counts) == 50
    # Chi-squared with 49 degrees of freedom: mean 49, standard deviation 9.9.
    assert ((counts - 640) ** 2 / 640).sum() < 49 + 5 * 9.9
    assert any(len(set(row.tolist())) < 64 for row in draws)
    assert len({tuple(row.tolist()) for row in draws}) == 500


def test_iid_differs_by_seed_worker_and_round() -> None:
    base = _batch(0, "iid", 3, 1000, 0, 0, 30)
    for seed, worker, round_ in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        assert not torch.equal(_batch(seed, "iid", 3, 1000, worker, round_, 30), base)


@pytest.mark.parametrize(
    ("kind", "n", "size", "worker", "message"),
    [
        ("shards", 11, 10, 0, "11 workers cannot have disjoint shards of 10 samples"),
        ("sorted", 2, 10, 0, "unknown partition 'sorted': expected one of dirichlet, iid, label, shards"),
        ("dirichlet", 2, 10, 0, "partition 'dirichlet': alpha is required"),
        ({"name": "dirichlet", "alpha": 0.0}, 2, 10, 0, "alpha = 0.0"),
        ({"name": "dirichlet", "alpha": float("inf")}, 2, 10, 0, "alpha = inf"),
        ({"name": "dirichlet", "alpha": 1.0}, 11, 10, 0, "11 workers cannot have disjoint shards of 10 samples"),
        ({"name": "dirichlet", "alpha": 1.0}, 2, 10, 2, "worker 2: this run's workers are 0 to 1"),
        ({"name": "label", "labels_per_worker": 0}, 2, 10, 0, "labels_per_worker = 0"),
        ({"name": "label", "labels_per_worker": 6}, 2, 10, 0, r"2 workers of 6 label\(s\) each cannot have"),
        ("label", 2, 0, 0, "empty"),
        ("torch.nn:Linear", 2, 10, 0, "own configuration only"),
        (3, 2, 10, 0, "has no divide"),
        ("shards", 2, 10, 2, "worker 2: this run's workers are 0 to 1"),
        ("iid", 2, 10, -1, "worker -1"),
        ("iid", 2, 0, 0, "empty"),
    ],
)
def test_refusals(kind: Any, n: int, size: int, worker: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _batch(0, kind, n, size, worker, 0, 4)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    n=st.integers(1, 12),
    labels=st.lists(st.integers(0, 6), min_size=36, max_size=150),
    table=st.one_of(
        st.builds(lambda k: {"name": "label", "labels_per_worker": k}, st.integers(1, 3)),
        st.builds(
            lambda a: {"name": "dirichlet", "alpha": a}, st.floats(min_value=0, exclude_min=True, max_value=1e300)
        ),
    ),
)
def test_uneven_shares_hold_every_sample_once_and_nobody_is_empty(
    seed: int, n: int, labels: list[int], table: dict[str, Any]
) -> None:
    labels_N = torch.tensor(labels)
    shares = _shares(table, n, labels_N, seed)
    assert sorted(torch.cat(shares).tolist()) == list(range(len(labels)))
    assert all(len(share) for share in shares)
    assert all(torch.equal(a, b) for a, b in zip(shares, _shares(table, n, labels_N, seed), strict=True))


@pytest.mark.parametrize("labels_per_worker", [1, 2, 3])
def test_by_label_deals_contiguous_pieces_of_the_sorted_set(labels_per_worker: int) -> None:
    labels_N = torch.arange(600) % 10
    table = {"name": "label", "labels_per_worker": labels_per_worker}
    shares = _shares(table, 10, labels_N)
    assert {len(share) for share in shares} == {60}
    held = [labels_N[share].unique().tolist() for share in shares]  # type: ignore[no-untyped-call]
    # Ten workers of k pieces and ten labels: k pieces to a label, so no piece lies across a boundary.
    assert all(1 <= len(labels) <= labels_per_worker for labels in held)
    if labels_per_worker == 1:
        assert sorted(held) == [[label] for label in range(10)]
    else:
        first = labels_N[shares[0]]
        assert not torch.equal(first, first.sort().values), "a batch would hold one label only"
    assert any(not torch.equal(a, b) for a, b in zip(shares, _shares(table, 10, labels_N, seed=1), strict=True))


def test_dirichlet_shares_have_the_distribution_s_moments() -> None:
    """A worker's part of a class has mean 1/n and variance (n - 1) / (n^2 (n alpha + 1))."""
    n, alpha, classes = 5, 0.7, 400
    labels_N = torch.arange(classes).repeat_interleave(200)
    shares = _shares({"name": "dirichlet", "alpha": alpha}, n, labels_N, seed=3)
    parts = torch.stack([torch.bincount(labels_N[share], minlength=classes) / 200 for share in shares]).double()
    assert torch.allclose(parts.sum(0), torch.ones(classes, dtype=torch.float64))
    torch.testing.assert_close(parts.mean(1), torch.full((n,), 1 / n, dtype=torch.float64), atol=0.04, rtol=0)
    variance = (n - 1) / (n**2 * (n * alpha + 1))
    assert parts.var().item() == pytest.approx(variance, rel=0.12)


def test_dirichlet_from_one_owner_per_class_to_equal_shares() -> None:
    labels_N = torch.arange(1000) % 10
    sole = _shares({"name": "dirichlet", "alpha": 1e-300}, 4, labels_N)
    owners = [{worker for worker, share in enumerate(sole) if (labels_N[share] == c).sum() > 1} for c in range(10)]
    assert all(len(owner) == 1 for owner in owners)
    even = _shares({"name": "dirichlet", "alpha": 1e12}, 4, labels_N)
    assert all(abs(len(share) - 250) <= 10 for share in even)


def test_dirichlet_gives_the_poorest_one_sample_of_the_richest() -> None:
    """One class with one owner: the three others are left with nothing, and get one each from the one who has all."""
    shares = _shares({"name": "dirichlet", "alpha": 1e-300}, 4, torch.zeros(50, dtype=torch.int64))
    assert sorted(map(len, shares)) == [1, 1, 1, 47]
