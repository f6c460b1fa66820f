"""Bucketing: updates are averaged in random groups before they are aggregated."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from narses.combine import Mean
from narses.config import STRICT
from narses.rules.base import Aggregation, Context, Property, extra_rows, require, round_of
from narses.rules.pre import PreAggregation
from narses.seeding import generator
from narses.updates import Updates


@dataclass(frozen=True, config=STRICT)
class Bucketing(PreAggregation):
    """The updates, in random order, are averaged `size` by `size`; `rule` aggregates the ceil(n / size) means with the same f.

    n >= size (m - 1) + 1 where `rule` needs m: a liar spoils one bucket, so there are at most f spoilt ones, but fewer rows
    to hide them among. Cost O(n D); memory n D / size.
    Karimireddy, He and Jaggi, Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing, ICLR 2022, algorithm 1, with
    their size = 2. The last bucket may be smaller and is divided by its own number of rows. The order is drawn from
    (seed, round).
    """

    size: PositiveInt = 2
    seed: NonNegativeInt = 0

    keeps: ClassVar[frozenset[Property]] = frozenset({Property.TRANSLATION, Property.SCALING, Property.INPUT_RANGE})

    def extra_rows(self, n: int) -> int:
        """Every bucket's mean, twice while they are put together."""
        buckets = -(-n // self.size)
        return 2 * buckets + extra_rows(self.rule, buckets)

    def min_updates(self, f: int) -> int:
        return self.size * (self.rule.min_updates(f) - 1) + 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        order_N = torch.randperm(len(updates), generator=generator(self.seed, "bucketing", round_of(context)))
        buckets = [bucket_S.sort().values for bucket_S in torch.split(order_N, self.size)]
        x_BD = torch.stack([updates.per_coordinate(Mean(), rows=bucket_S) for bucket_S in buckets])
        return self.of_mixed(Updates.of(x_BD, finite=True), min(f, len(buckets)), context)
