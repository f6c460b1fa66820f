"""Which training samples a logical worker uses in a step: a function of (seed, worker, step), with no state.

So a worker that was killed, moved to another daemon or never existed before computes the same batch. A partition is a
frozen dataclass whose fields are its configuration; being listed in PARTITIONS gives it a name.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from narses import registry
from narses.config import STRICT
from narses.errors import ConfigError
from narses.seeding import derive, generator

# N = training samples, n = workers, C = classes, B = samples in a batch


class Division(Protocol):
    """The training set as the n workers of one run see it."""

    def batch(self, worker: int, step: int, size: int) -> Tensor:
        """Indices (B,) int64 into the training set for the worker's step number `step`, fresh memory; 1 <= B <= size.

        Steps are counted from 0 over the whole run; with one step per round they are the rounds. ConfigError for a worker
        outside 0..n-1.
        """
        ...

    def share(self, worker: int) -> int:
        """The worker's own samples, which it passes through in ceil(share / size) steps.

        ConfigError where a worker has none of its own, and for a worker outside 0..n-1.
        """
        ...


@runtime_checkable
class Partition(Protocol):
    """What a partition offers."""

    def divide(self, seed: int, n: int, labels_N: Tensor) -> Division:
        """The division of a training set with these labels; ConfigError if it is impossible for n workers."""
        ...


class Shares:
    """Each worker passes through its own samples in order, again and again without reshuffling.

    The last batch of a pass may be short.
    """

    def __init__(self, shares: list[Tensor]) -> None:
        """shares: per worker its indices, in the order in which it uses them; none may be empty."""
        assert all(len(share) for share in shares)
        self._shares = shares

    def batch(self, worker: int, step: int, size: int) -> Tensor:
        """As Division."""
        _check(worker, len(self._shares))
        share = self._shares[worker]
        first = step % -(-len(share) // size) * size
        return share[first : first + size].clone()

    def share(self, worker: int) -> int:
        """As Division."""
        _check(worker, len(self._shares))
        return len(self._shares[worker])


class Draws:
    """Each batch is drawn with replacement from the whole set."""

    def __init__(self, seed: int, n: int, size: int) -> None:
        self._seed, self._n, self._size = seed, n, size

    def batch(self, worker: int, step: int, size: int) -> Tensor:
        """As Division."""
        _check(worker, self._n)
        return torch.randint(self._size, (size,), generator=generator(self._seed, "batch", worker, step))

    def share(self, worker: int) -> int:
        """ConfigError: nobody has samples of their own."""
        _check(worker, self._n)
        raise ConfigError(
            'partition "iid" gives a worker no samples of its own, so there is no whole shard and no pass over it: take a '
            "number for batch and local_steps, or another partition"
        )


@dataclass(frozen=True, config=STRICT)
class IidDraws:
    """Batches drawn with replacement from the whole set (the Bulyan paper)."""

    def divide(self, seed: int, n: int, labels_N: Tensor) -> Division:
        """As Partition; ConfigError for an empty set."""
        _enough(1, len(labels_N))
        return Draws(seed, n, len(labels_N))


@dataclass(frozen=True, config=STRICT)
class EqualShards:
    """A seeded permutation, cut into n disjoint shards of N // n samples; up to n - 1 samples stay unused.

    (The ALIE experiments' DistributedSampler repeats samples to make up a remainder instead.)
    """

    def divide(self, seed: int, n: int, labels_N: Tensor) -> Division:
        """As Partition; ConfigError for more workers than samples."""
        size = len(labels_N)
        _enough(n, size)
        shuffled_N = torch.randperm(size, generator=generator(seed, "shards"))
        return Shares([shuffled_N[i * (size // n) : (i + 1) * (size // n)] for i in range(n)])


@dataclass(frozen=True, config=STRICT)
class ByLabel:
    """The set sorted by label, cut into n * labels_per_worker contiguous pieces, of which each worker gets labels_per_worker.

    A seeded permutation deals the pieces, and shuffles within a label and within a worker's share. Pieces have N / (n *
    labels_per_worker) samples, to within one, and no sample is left out. A piece that lies across a boundary between
    labels holds more than one of them. McMahan et al. 2017 ("Communication-Efficient Learning of Deep Networks from
    Decentralized Data"), section 3, take labels_per_worker = 2.
    """

    labels_per_worker: PositiveInt = 1

    def divide(self, seed: int, n: int, labels_N: Tensor) -> Division:
        """As Partition; ConfigError for more pieces than samples."""
        size, pieces = len(labels_N), n * self.labels_per_worker
        _enough(pieces, size, f"{n} workers of {self.labels_per_worker} label(s) each")
        draws = generator(seed, "label")
        shuffled_N = torch.randperm(size, generator=draws)
        sorted_N = shuffled_N[labels_N[shuffled_N].argsort(stable=True)]
        bounds = [piece * size // pieces for piece in range(pieces + 1)]
        dealt = torch.randperm(pieces, generator=draws).reshape(n, -1).tolist()
        return Shares(
            [_shuffled([sorted_N[bounds[k] : bounds[k + 1]] for k in ks], seed, i) for i, ks in enumerate(dealt)]
        )


@dataclass(frozen=True, config=STRICT)
class Dirichlet:
    """Of each class, every worker gets a part; the n parts are drawn from Dirichlet(alpha, ..., alpha).

    Small alpha: a class belongs to few workers, and workers differ much in size. Large alpha: all workers alike. No sample
    is left out. A worker that the draws leave with nothing takes one sample from the worker who then has the most
    (ties: the smallest id), so that nobody is empty. Yurochkin et al. 2019 ("Bayesian Nonparametric Federated Learning of
    Neural Networks"), section 4.
    """

    alpha: float = Field(gt=0, allow_inf_nan=False)

    def divide(self, seed: int, n: int, labels_N: Tensor) -> Division:
        """As Partition; ConfigError for more workers than samples."""
        _enough(n, len(labels_N))
        draws, shuffle = np.random.default_rng(derive(seed, "dirichlet")), generator(seed, "dirichlet")
        parts: list[list[Tensor]] = [[] for _ in range(n)]
        for label in range(int(labels_N.max()) + 1):
            members = (labels_N == label).nonzero().flatten()
            members = members[torch.randperm(len(members), generator=shuffle)]
            ends = (self._proportions(n, draws).cumsum() * len(members)).round().astype(int)
            ends[-1] = len(members)  # whatever the sum's last digit
            for part, first, end in zip(parts, [0, *ends[:-1]], ends, strict=True):
                part.append(members[first:end])
        shares = [_shuffled(part, seed, i) for i, part in enumerate(parts)]
        for worker, share in enumerate(shares):
            if not len(share):
                richest = max(range(n), key=lambda i: (len(shares[i]), -i))
                shares[richest], shares[worker] = shares[richest][:-1], shares[richest][-1:]
        return Shares(shares)

    def _proportions(self, n: int, draws: np.random.Generator) -> NDArray[np.float64]:
        """One draw from the n-dimensional symmetric Dirichlet distribution."""
        # A Gamma(alpha) variate is one of Gamma(alpha + 1) times U^(1 / alpha): in logarithms, since for small alpha all n
        # variates would be 0. Below 1e-100 the largest takes everything anyway.
        alpha = max(self.alpha, 1e-100)
        logarithms = np.log(draws.standard_gamma(alpha + 1, n)) - draws.standard_exponential(n) / alpha
        weights: NDArray[np.float64] = np.exp(logarithms - logarithms.max())
        return weights / np.sum(weights)


PARTITIONS: dict[str, type] = {
    "shards": EqualShards,
    "iid": IidDraws,
    "label": ByLabel,
    "dirichlet": Dirichlet,
}


def make(table: Any, *, trusted: bool = False, allow: Collection[str] | None = None) -> Partition:
    """The partition that `table` (a name, a table or a partition) describes; ConfigError if there is none.

    trusted: the table is one's own, so import strings count. allow: import strings that count in a peer's table too.
    """
    partition = registry.build("partition", PARTITIONS, table, trusted=trusted, allow=allow)
    if not isinstance(partition, Partition):
        raise ConfigError(f"partition {table!r}: {type(partition).__name__} has no divide(seed, n, labels_N)")
    return partition


def _shuffled(pieces: list[Tensor], seed: int, worker: int) -> Tensor:
    share = torch.cat(pieces)
    return share[torch.randperm(len(share), generator=generator(seed, "share", worker))]


def _check(worker: int, n: int) -> None:
    if not 0 <= worker < n:
        raise ConfigError(f"worker {worker}: this run's workers are 0 to {n - 1}")


def _enough(needed: int, size: int, what: str = "") -> None:
    if size < 1:
        raise ConfigError("the training set is empty")
    if needed > size:
        raise ConfigError(
            f"{what or f'{needed} workers'} cannot have disjoint shards of {size} samples: take fewer workers or "
            "partition = 'iid'"
        )
