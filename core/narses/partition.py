"""Which training samples a logical worker uses in a round: a function of (seed, worker, round), with no state.

So a worker that was killed, moved to another daemon or never existed before computes the same batch.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from narses.errors import ConfigError
from narses.seeding import generator


def batch(task_seed: int, partition: str, n: int, size: int, worker: int, round_: int, batch_size: int) -> Tensor:
    """Indices (B,) int64 into the `size` training samples for one update.

    "shards": a seeded permutation is cut into n disjoint shards of size // n samples; worker i passes through shard i
    in order, again and again without reshuffling, and the last batch of a pass may be short. (The ALIE experiments'
    DistributedSampler repeats samples to make up a remainder; here up to n - 1 samples stay unused instead.)
    "iid": batch_size samples, drawn with replacement from the whole set (the Bulyan paper).
    ConfigError for another partition, a worker outside 0..n-1, or shards that would be empty.
    """
    if not 0 <= worker < n:
        raise ConfigError(f"worker {worker}: this run's workers are 0 to {n - 1}")
    if size < 1:
        raise ConfigError("the training set is empty")
    if partition == "iid":
        return torch.randint(size, (batch_size,), generator=generator(task_seed, "batch", worker, round_))
    if partition != "shards":
        raise ConfigError(f"partition {partition!r}: expected shards or iid")
    if n > size:
        raise ConfigError(
            f"{n} workers cannot have disjoint shards of {size} samples: take fewer workers or partition = 'iid'"
        )
    shard = size // n
    first = round_ % -(-shard // batch_size) * batch_size
    start = worker * shard
    return _permutation(task_seed, size)[start + first : start + min(first + batch_size, shard)].clone()


@lru_cache(maxsize=8)
def _permutation(task_seed: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(task_seed, "shards"))
