"""Divide-and-conquer: drop the updates that lie furthest out along the direction of largest variance."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from narses.combine import Mean
from narses.config import STRICT
from narses.rules.base import Aggregation, Context, Property, require, round_of
from narses.rules.spectrum import finite_squares, widest
from narses.seeding import generator
from narses.updates import Updates


@dataclass(frozen=True, config=STRICT)
class Dnc:
    """The mean of the updates that survive every iteration; one iteration drops the c f of largest score in a random sample
    of the coordinates.

    The score of x_i is <x_i - mean, v>^2 with v the top right singular vector of the centred sample; ties keep the smaller
    row. n >= 2f + 1 and n > c f. Cost O(n^2 b + n^3) per iteration, b = subsample; only the sample is copied, n b numbers.
    Shejwalkar and Houmansadr, Manipulating the Byzantine, NDSS 2021 ("DnC"). c = 1, one iteration and b = 10,000
    are what implementations of it share. c f is rounded down. Where no update survives every iteration, the paper's result is
    not defined; here those kept most often are averaged. With b >= D every iteration would be the same, and one is made.
    Coordinates are drawn without replacement from (seed, round, iteration).
    """

    iterations: PositiveInt = 1
    subsample: PositiveInt = 10_000
    c: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    seed: NonNegativeInt = 0

    properties: ClassVar[frozenset[Property]] = frozenset(
        {Property.PERMUTATION, Property.TRANSLATION, Property.SCALING, Property.INPUT_RANGE}
    )

    def min_updates(self, f: int) -> int:
        return max(2 * f + 1, self._dropped(f) + 1)

    def _dropped(self, f: int) -> int:
        return int(self.c * f)

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        n, all_columns = len(updates), self.subsample >= updates.dimension
        kept_N = torch.zeros(n, dtype=torch.int64)
        for iteration in range(1 if all_columns else self.iterations):
            sample = updates
            if not all_columns:
                draws = generator(self.seed, "dnc", round_of(context), iteration)
                columns_B = torch.randperm(updates.dimension, generator=draws)[: self.subsample].sort().values
                sample = Updates.of(updates.columns(columns_B), finite=True)
            places_N = widest(finite_squares(sample), torch.ones(n, dtype=torch.float64)).places_N
            kept_N[places_N.argsort(stable=True)[: n - self._dropped(f)]] += 1
        selected_K = (kept_N == kept_N.max()).nonzero().squeeze(1)
        return Aggregation(updates.per_coordinate(Mean(), rows=selected_K), selected_K)
