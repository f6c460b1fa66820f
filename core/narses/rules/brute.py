"""Brute, or minimum-diameter averaging: the mean of the updates that lie closest together."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from narses.combine import Mean
from narses.config import STRICT
from narses.rules.base import Aggregation, Context, Norm, Property, require
from narses.rules.diameter import smallest_diameter
from narses.rules.elections import nearest_to_mean, repeat
from narses.updates import Updates


@dataclass(frozen=True, config=STRICT)
class Brute:
    """The mean of the n - f updates of smallest diameter; of several such sets the lexicographically first.

    n >= 2f + 1. Cost O(n^2 D) and a search that is exponential in f at worst; beyond `max_nodes` of its steps (some
    10 us each) it ends with an InputError. It cannot get there for f <= 29 and n <= 60, and Gaussian updates of n = 57
    and f = 27 take it about a thousand. El Mhamdi et al., The Hidden Vulnerability, ICML 2018, section 2.3.1, who try all
    subsets (5 months for that n and f); also called MDA: El Mhamdi et al., Genuinely Distributed Byzantine Machine
    Learning, PODC 2020. PERMUTATION is not claimed: one pair of updates often is the diameter of several sets, and
    then their order decides.
    """

    p: Norm = 2.0
    max_nodes: PositiveInt = 10_000_000

    mixes: ClassVar[bool] = True
    properties: ClassVar[frozenset[Property]] = frozenset(
        {Property.TRANSLATION, Property.SCALING, Property.INPUT_RANGE}
    )

    def min_updates(self, f: int) -> int:
        return 2 * f + 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        subset = smallest_diameter(updates.distances_NN(self.p), len(updates) - f, self.max_nodes)
        selected_K = torch.tensor(subset)
        return Aggregation(updates.per_coordinate(Mean(), rows=selected_K), selected_K)

    def selection_order(self, updates: Updates, f: int, count: int) -> list[int]:
        """The rows nearest its means, one after another, each removed before the next with n one less and the same f."""
        distances_NN, squared_NN = updates.distances_NN(self.p).cpu(), updates.squared_distances_NN().cpu()

        def elect(rows_R: Tensor) -> int:
            subset = smallest_diameter(distances_NN[rows_R][:, rows_R], len(rows_R) - f, self.max_nodes)
            return nearest_to_mean(squared_NN[rows_R][:, rows_R[subset]])

        return repeat(len(updates), count, elect)
