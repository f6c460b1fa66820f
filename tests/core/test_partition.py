"""Sampling: shards, i.i.d. draws, and that nothing but (seed, worker, round) decides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narses import partition
from narses.errors import ConfigError


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
        one_pass = [partition.batch(seed, "shards", n, size, worker, round_, batch) for round_ in range(passes)]
        assert [len(indices) for indices in one_pass[:-1]] == [batch] * (passes - 1)
        assert 1 <= len(one_pass[-1]) <= batch
        assert sum(map(len, one_pass)) == shard
        for round_, indices in enumerate(one_pass):
            assert torch.equal(partition.batch(seed, "shards", n, size, worker, round_ + 3 * passes, batch), indices)
        seen += torch.cat(one_pass).tolist()
    assert len(set(seen)) == len(seen) == n * shard
    assert set(seen) <= set(range(size))


def test_mnist_in_51_shards_has_14_full_batches_and_a_short_one() -> None:
    sizes = [len(partition.batch(0, "shards", 51, 60_000, 50, round_, 83)) for round_ in range(16)]
    assert sizes == [83] * 14 + [14, 83]


def test_shards_are_shuffled_by_the_seed() -> None:
    first = partition.batch(1, "shards", 4, 400, 0, 0, 100)
    assert not torch.equal(first, torch.arange(100))
    assert not torch.equal(first, partition.batch(2, "shards", 4, 400, 0, 0, 100))


@pytest.mark.parametrize("kind", ["shards", "iid"])
def test_a_batch_is_the_callers_own_and_needs_no_earlier_one(kind: str) -> None:
    expected = partition.batch(7, kind, 5, 100, 3, 11, 8).clone()
    partition.batch(7, kind, 5, 100, 3, 11, 8).zero_()
    state = torch.get_rng_state()
    assert torch.equal(partition.batch(7, kind, 5, 100, 3, 11, 8), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert expected.dtype == torch.int64


def test_iid_draws_with_replacement_from_the_whole_set() -> None:
    draws = torch.stack([partition.batch(0, "iid", 10, 50, worker, t, 64) for worker in range(10) for t in range(50)])
    assert draws.shape == (500, 64)
    counts = torch.bincount(draws.flatten(), minlength=50).double()
    assert len(counts) == 50
    # Chi-squared with 49 degrees of freedom: mean 49, standard deviation 9.9.
    assert ((counts - 640) ** 2 / 640).sum() < 49 + 5 * 9.9
    assert any(len(set(row.tolist())) < 64 for row in draws)
    assert len({tuple(row.tolist()) for row in draws}) == 500


def test_iid_differs_by_seed_worker_and_round() -> None:
    base = partition.batch(0, "iid", 3, 1000, 0, 0, 30)
    for seed, worker, round_ in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        assert not torch.equal(partition.batch(seed, "iid", 3, 1000, worker, round_, 30), base)


@pytest.mark.parametrize(
    ("kind", "n", "size", "worker", "message"),
    [
        ("shards", 11, 10, 0, "11 workers cannot have disjoint shards of 10 samples"),
        ("dirichlet", 2, 10, 0, "partition 'dirichlet': expected shards or iid"),
        ("shards", 2, 10, 2, "worker 2: this run's workers are 0 to 1"),
        ("iid", 2, 10, -1, "worker -1"),
        ("iid", 2, 0, 0, "empty"),
    ],
)
def test_refusals(kind: str, n: int, size: int, worker: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        partition.batch(0, kind, n, size, worker, 0, 4)
