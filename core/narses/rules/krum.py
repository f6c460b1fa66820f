"""Krum and Multi-Krum: the updates whose neighbourhood is tightest."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from narses.combine import Mean
from narses.config import STRICT
from narses.rules.base import Aggregation, Context, Norm, Property, require
from narses.updates import Updates

Neighbours = Literal["n-f-2", "n-f-1", "n-f"]
Power = Literal[1, 2]


@dataclass(frozen=True, config=STRICT)
class Krum:
    """The update with the smallest sum of squared distances to its n - f - 2 nearest others; ties to the first.

    n >= 2f + 3. Cost O(n^2 D).
    Blanchard et al., Machine Learning with Adversaries, NIPS 2017, section 4, for p = 2; El Mhamdi et al., The Hidden
    Vulnerability, ICML 2018, section 2.2, square the l_p distance. `neighbours` and `power` reproduce other codes:
    "A Little Is Enough"'s sums n - f plain distances (power = 1), ByzantineMomentum's n - f - 1.
    """

    p: Norm = 2.0
    neighbours: Neighbours = "n-f-2"
    power: Power = 2

    properties: ClassVar[frozenset[Property]] = frozenset(
        {Property.PERMUTATION, Property.TRANSLATION, Property.SCALING, Property.INPUT_RANGE, Property.IS_INPUT}
    )

    def min_updates(self, f: int) -> int:
        return 2 * f + 3

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        scores_N = krum_scores(updates, f, self.p, self.neighbours, self.power)
        selected_1 = scores_N.argmin().reshape(1)  # the first of equal minima
        return Aggregation(updates.per_coordinate(Mean(), rows=selected_1), selected_1, scores_N)

    def selection_order(self, updates: Updates, f: int, count: int) -> list[int]:
        """The rows Krum elects one after another, each removed before the next election with n one less and the same f.

        The last elections of Bulyan have fewer than 2f + 3 candidates: the neighbour count is held between 1 and n - 1.
        """
        nearest_NM, others_NM = _nearest_first(_costs(updates, self.p, self.power))
        alive_N = torch.ones(len(updates), dtype=torch.bool)
        order: list[int] = []
        for r in range(len(updates), len(updates) - count, -1):
            rows_R = alive_N.nonzero().squeeze(1)
            winner = 0
            if r > 1:
                remaining_RM = nearest_NM[rows_R][alive_N[others_NM[rows_R]]].view(r, r - 1)
                winner = int(remaining_RM[:, : _count(self.neighbours, r, f)].sum(dim=1).argmin())
            order.append(int(rows_R[winner]))
            alive_N[order[-1]] = False
        return order


@dataclass(frozen=True, config=STRICT)
class MultiKrum:
    """The mean of the m updates with the smallest Krum scores; ties to the smallest row.

    n >= 2f + 3 and n >= m; m defaults to n - f - 2. Cost O(n^2 D). Blanchard et al., Machine Learning with
    Adversaries, NIPS 2017, section 4 ("Multi-Krum"); m = 1 is Krum. The same scores rank all m (no election after
    removal).
    """

    m: PositiveInt | None = None
    p: Norm = 2.0
    neighbours: Neighbours = "n-f-2"
    power: Power = 2

    properties: ClassVar[frozenset[Property]] = frozenset(
        {Property.PERMUTATION, Property.TRANSLATION, Property.SCALING, Property.INPUT_RANGE}
    )

    def min_updates(self, f: int) -> int:
        return max(2 * f + 3, self.m or 0)

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        scores_N = krum_scores(updates, f, self.p, self.neighbours, self.power)
        m = len(updates) - f - 2 if self.m is None else self.m
        selected_M = scores_N.argsort(stable=True)[:m].sort().values
        return Aggregation(updates.per_coordinate(Mean(), rows=selected_M), selected_M, scores_N)


def krum_scores(updates: Updates, f: int, p: float = 2.0, neighbours: Neighbours = "n-f-2", power: Power = 2) -> Tensor:
    """Each row's sum of ||x_i - x_j||_p^power over its nearest other rows, as (N,) float64 on the CPU.

    The row itself is not its own neighbour. Rows with equal neighbourhoods have equal scores to the last bit.
    """
    nearest_NM, _ = _nearest_first(_costs(updates, p, power))
    return nearest_NM[:, : _count(neighbours, len(updates), f)].sum(dim=1)


def _costs(updates: Updates, p: float, power: Power) -> Tensor:
    if power == 1:
        return updates.distances_NN(p).cpu()
    if p == 2:
        return updates.squared_distances_NN().cpu()  # never rooted: exact ties between integers stay exact
    return updates.distances_NN(p).cpu().square()


def _nearest_first(costs_NN: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the costs of the N - 1 others, ascending, and which rows they are."""
    # NaN sorts after everything, infinite costs included, so the last column is the row itself.
    ordered = costs_NN.clone().fill_diagonal_(math.nan).sort(dim=1, stable=True)
    return ordered.values[:, :-1], ordered.indices[:, :-1]


def _count(neighbours: Neighbours, n: int, f: int) -> int:
    wanted = {"n-f-2": n - f - 2, "n-f-1": n - f - 1, "n-f": n - f}[neighbours]
    return min(max(1, wanted), n - 1)
