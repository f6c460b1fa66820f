"""The coordinate-wise median."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from narses import combine
from narses.config import STRICT
from narses.rules.base import Aggregation, Context, Property, require
from narses.rules.elections import repeat
from narses.updates import Updates


@dataclass(frozen=True, config=STRICT)
class Median:
    """The middle value of every coordinate; for even n the midpoint of the two middle ones (torch: the lower).

    n >= 2f + 1; then both middle values lie between two honest ones. Cost O(n log^2 n D).
    Yin et al., Byzantine-Robust Distributed Learning, ICML 2018, definition 1; Xie et al., Fall of Empires, section 4.
    """

    p: ClassVar[float] = 2.0
    mixes: ClassVar[bool] = True
    properties: ClassVar[frozenset[Property]] = frozenset(
        {
            Property.PERMUTATION,
            Property.TRANSLATION,
            Property.SCALING,
            Property.INPUT_RANGE,
            Property.HONEST_RANGE,
            Property.HONEST_WIDTH,
        }
    )

    def min_updates(self, f: int) -> int:
        return 2 * f + 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        return Aggregation(updates.per_coordinate(combine.Median()))

    def selection_order(self, updates: Updates, f: int, count: int) -> list[int]:
        """The rows nearest its medians in l_2, one after another, each removed before the next election: O(count n D)."""

        def elect(rows_R: Tensor) -> int:
            median_D = updates.per_coordinate(combine.Median(), rows=rows_R)
            return int(updates.distances_to_N(median_D).cpu()[rows_R].argmin())

        return repeat(len(updates), count, elect)
