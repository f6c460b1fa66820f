"""Phocas: the mean of the values nearest the coordinate-wise trimmed mean."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from narses.combine import Nearest, Window
from narses.config import STRICT
from narses.rules.base import Aggregation, Context, Property, require
from narses.updates import Updates


@dataclass(frozen=True, config=STRICT)
class Phocas:
    """Per coordinate, average the n - f values nearest the trimmed mean, the smaller first where two are equally near.

    n >= 2f + 1. Cost O(n log^2 n D). Xie, Koyejo, Gupta, Phocas: dimensional Byzantine-resilient stochastic gradient
    descent, 2018 (arXiv:1805.09682), with b = f. The values kept may all lie on one side, so the result may leave the
    honest range; the trimmed mean is inside it and n - f honest values are at most its width away from there, hence
    HONEST_WIDTH.
    """

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
        return 2 * f + 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        kept = len(updates) - f
        return Aggregation(updates.per_coordinate(Nearest(kept, Window(f, kept))))
