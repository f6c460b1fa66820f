"""Updates are shortened before they are aggregated: to a given length, or to one that follows from theirs."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from narses.config import STRICT
from narses.rules.base import Aggregation, Context, Positive, Property, require
from narses.rules.pre import PreAggregation
from narses.rules.weighing import scaled, shortening
from narses.updates import Updates


@dataclass(frozen=True, config=STRICT)
class Clipping(PreAggregation):
    """Every update longer than `radius` is shortened to that length; `rule` aggregates.

    n >= what `rule` needs. Cost O(n D); memory n D, none where nothing is shortened. `selected` and `scores` are the rule's,
    on the shortened rows. Static clipping as in ByzFL, whose default of 2 this is; no paper defines it for this use.
    """

    radius: Positive = 2.0

    keeps: ClassVar[frozenset[Property]] = frozenset({Property.PERMUTATION})

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        return self.rule(scaled(updates, shortening(updates.norms_N(), self.radius)), f, context)


@dataclass(frozen=True, config=STRICT)
class Arc(PreAggregation):
    """The floor(2 (f / n) (n - f)) longest updates are shortened to the length of the longest other one; `rule` aggregates.

    n >= what `rule` needs. Cost O(n D); memory n D. `selected` and `scores` are the rule's, on the shortened rows.
    Allouah, Guerraoui, Gupta, Jellouli, Rizk and Stephan, Adaptive Gradient Clipping for Robust Federated Learning (first:
    The Vital Role of Gradient Clipping in Byzantine-Resilient Distributed Learning), arXiv 2405.14432 ("ARC").
    """

    keeps: ClassVar[frozenset[Property]] = frozenset({Property.PERMUTATION, Property.SCALING})

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        norms_N = updates.norms_N().cpu()
        longest = 2 * f * (len(updates) - f) // len(updates)
        limit = float(norms_N.sort(descending=True).values[longest])
        return self.rule(scaled(updates, shortening(norms_N, limit)), f, context)
