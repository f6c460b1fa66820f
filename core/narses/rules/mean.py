"""The arithmetic mean: the undefended baseline."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from narses import combine
from narses.config import STRICT
from narses.rules.base import Aggregation, Context, Property, require
from narses.updates import Updates


@dataclass(frozen=True, config=STRICT)
class Mean:
    """(1/n) sum_i x_i.

    n >= 1; a single Byzantine update moves it anywhere, so f is accepted and means nothing. Cost O(n D).
    Summed in float64 in worker order, so that no finite input overflows.
    """

    properties: ClassVar[frozenset[Property]] = frozenset(
        {Property.PERMUTATION, Property.TRANSLATION, Property.SCALING, Property.INPUT_RANGE}
    )

    def min_updates(self, f: int) -> int:
        return 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        return Aggregation(updates.per_coordinate(combine.Mean()))
