"""What the rules that Bulyan repeats have in common: elections among ever fewer rows, decided from distances.

N = updates, M = N - 1 other updates, R = rows remaining, K = rows of a subset
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def repeat(n: int, count: int, elect: Callable[[Tensor], int]) -> list[int]:
    """`count` of n rows, one after another; elect gets the remaining rows_R, ascending, and returns a position in it."""
    remaining = list(range(n))
    return [remaining.pop(elect(torch.tensor(remaining)) if len(remaining) > 1 else 0) for _ in range(count)]


class Neighbours:
    """For each row its distances to the others, ascending: sorted once, whichever rows remain."""

    def __init__(self, costs_NN: Tensor) -> None:
        # NaN sorts after everything, infinite costs included, so the last column is the row itself.
        ordered = costs_NN.clone().fill_diagonal_(math.nan).sort(dim=1, stable=True)
        self.nearest_NM, self._others_NM = ordered.values[:, :-1], ordered.indices[:, :-1]

    def among(self, rows_R: Tensor) -> Tensor:
        """The costs between rows_R alone, as (R, R - 1)."""
        alive_N = torch.zeros(len(self.nearest_NM), dtype=torch.bool)
        alive_N[rows_R] = True
        return self.nearest_NM[rows_R][alive_N[self._others_NM[rows_R]]].view(len(rows_R), len(rows_R) - 1)


def nearest_to_mean(squared_RK: Tensor) -> int:
    """Which row is nearest in l_2 to the mean of K rows, from the squared distances to them; ties to the first.

    ||x_i - mean||^2 = (1/K) sum_k D_ik^2 - (1/2 K^2) sum_jk D_jk^2, and only the first term depends on i.
    """
    return int(squared_RK.sum(dim=1).argmin())
