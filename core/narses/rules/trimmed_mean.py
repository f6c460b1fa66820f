"""The coordinate-wise trimmed mean."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from narses.combine import Window
from narses.config import STRICT
from narses.rules.base import Aggregation, Context, Property, require
from narses.updates import Updates


@dataclass(frozen=True, config=STRICT)
class TrimmedMean:
    """Per coordinate, drop the f largest and the f smallest values and average the other n - 2f.

    n >= 2f + 1. Cost O(n log^2 n D). Yin et al., Byzantine-Robust Distributed Learning, ICML 2018, definition 2, with
    beta = f/n. What "A Little Is Enough" reports as TrimmedMean is another rule: MeanAroundMedian(keep="n-2f").
    """

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
        return Aggregation(updates.per_coordinate(Window(f, len(updates) - f)))
