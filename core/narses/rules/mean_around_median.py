"""The mean of the values nearest the coordinate-wise median."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from narses.combine import Median, Nearest
from narses.config import STRICT
from narses.rules.base import Aggregation, Context, Property, require
from narses.updates import Updates


@dataclass(frozen=True, config=STRICT)
class MeanAroundMedian:
    """Per coordinate, average the `keep` values nearest the median, the smaller value first where two are equally near.

    n >= 2f + 1 (f + 2 if that is more, for keep = "n-f-1"). Cost O(n log^2 n D). keep: "n-f" is Xie et al.,
    Generalized Byzantine-tolerant SGD, 2018; "n-2f" is what "A Little Is Enough" calls TrimmedMean; "n-f-1" is what
    its published code does. None of them keeps the result inside the honest range: the values kept may all lie on one
    side. A kept value is at most as far from the median as some honest one, hence HONEST_WIDTH.
    """

    keep: Literal["n-f", "n-2f", "n-f-1"] = "n-f"

    properties: ClassVar[frozenset[Property]] = frozenset(
        {
            Property.PERMUTATION,
            Property.TRANSLATION,
            Property.SCALING,
            Property.INPUT_RANGE,
            Property.HONEST_WIDTH,
        }
    )

    def min_updates(self, f: int) -> int:
        return max(2 * f + 1, f + 2) if self.keep == "n-f-1" else 2 * f + 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        n = len(updates)
        kept = {"n-f": n - f, "n-2f": n - 2 * f, "n-f-1": n - f - 1}[self.keep]
        return Aggregation(updates.per_coordinate(Nearest(kept, Median())))
