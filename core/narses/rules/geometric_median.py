"""The geometric median, by Weiszfeld's iteration on weights."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from narses.config import STRICT
from narses.rules.base import Aggregation, Context, Property, require
from narses.rules.elections import Neighbours, repeat
from narses.updates import Updates

# The relative error of squared distances between updates; those of float32 rows are in part summed in float32.
_NOISE = {torch.float32: 1e-7, torch.float64: 1e-15}


@dataclass(frozen=True, config=STRICT)
class GeometricMedian:
    """The point y with the smallest sum of distances to all updates; the medoid, where that is such a point.

    n >= 2f + 1. Cost O(n^2 D) for distances, O(n^2) an iteration, O(n D) at the end. Weiszfeld, Tohoku Mathematical
    Journal 43, 1937: y <- (sum_i x_i / d_i) / (sum_i 1 / d_i), where an update whose distance is 0 pulls at y as Vardi
    and Zhang, The multivariate L1-median, PNAS 97, 2000, have it.

    y is kept as its weights w: ||x_i - y||^2 = sum_j w_j D_ij^2 - (1/2) sum_jk w_j w_k D_jk^2. Beside rows far beyond the
    others that difference has no digits left; so y is then put together, its distances are measured, and if the step
    from there is not within the tolerance, iteration goes on in that way, two passes over the updates each.

    tolerance: it ends where the mean of the unit vectors from y to the updates, 0 at the median, is this short; for
    float32 updates sooner where y no longer changes. max_iterations: it ends there too. smoothing: distances below
    it count as it, in the updates' own units (then SCALING does not hold).
    """

    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-9
    max_iterations: PositiveInt = 1000
    smoothing: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    p: ClassVar[float] = 2.0
    mixes: ClassVar[bool] = True
    properties: ClassVar[frozenset[Property]] = frozenset(
        {Property.PERMUTATION, Property.TRANSLATION, Property.SCALING}
    )

    def min_updates(self, f: int) -> int:
        return 2 * f + 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        w_N, _ = self._weights(updates.squared_distances_NN().cpu(), _NOISE[updates.dtype])
        return Aggregation(self._measured(updates, w_N, torch.ones(len(updates), dtype=torch.bool)))

    def selection_order(self, updates: Updates, f: int, count: int) -> list[int]:
        """The rows nearest its points, one after another, each removed before the next election."""
        squared_NN = updates.squared_distances_NN().cpu()

        def elect(rows_R: Tensor) -> int:
            squared_RR = squared_NN[rows_R][:, rows_R]
            w_R, error = self._weights(squared_RR, _NOISE[updates.dtype])
            if error < 1e-4:
                return int((squared_RR * w_R).sum(dim=1).argmin())
            w_N = torch.zeros(len(updates), dtype=torch.float64).index_copy_(0, rows_R, w_R)
            y_D = self._measured(updates, w_N, torch.zeros(len(updates), dtype=torch.bool).index_fill_(0, rows_R, True))
            return int(updates.distances_to_N(y_D).cpu()[rows_R].argmin())

        return repeat(len(updates), count, elect)

    def _weights(self, squared_RR: Tensor, noise: float) -> tuple[Tensor, float]:
        """w_R and the relative error of the squared distances to its point; the medoid alone where that nears 1.

        Starts at the medoid: no other update can be the median, and once below its sum of distances, y meets none.
        """
        medoid = int(Neighbours(squared_RR.sqrt()).nearest_NM.sum(dim=1).argmin())
        medoid_R = torch.zeros(len(squared_RR), dtype=torch.float64)
        medoid_R[medoid] = 1.0
        if bool(squared_RR.isinf().any()):
            return medoid_R, 1.0
        w_R, error = medoid_R, 0.0
        for _ in range(self.max_iterations):
            squared_R, lost = _to_mixture(squared_RR, w_R)
            error = noise * lost
            if error > 0.1:
                return medoid_R, error
            pull_R = _pull(squared_R.sqrt().clamp(min=self.smoothing))
            next_R = pull_R / pull_R.sum()
            if bool((pull_R == 0).any()):  # y is the medoid
                if not bool(pull_R.any()):
                    return medoid_R, 0.0
                to_next_R, lost = _to_mixture(squared_RR, next_R)
                held = _held(int((pull_R == 0).sum()), float(pull_R.sum() * to_next_R[medoid].sqrt()), torch.float64)
                if noise * lost > 0.1 or held == 1:
                    return medoid_R, noise * lost
                next_R = torch.lerp(next_R, medoid_R, held)
            moved = float(((next_R - w_R).abs() / next_R).mean())  # at least the length of the mean unit vector
            w_R = next_R
            if moved <= self.tolerance:
                break
        return w_R, error

    def _measured(self, updates: Updates, w_N: Tensor, alive_N: Tensor) -> Tensor:
        """The point of these weights if a step from it stays there, else the end of the iteration from there."""
        y_D = updates.weighted_sum(w_N[None])[0]
        for _ in range(self.max_iterations):
            distance_N = updates.distances_to_N(y_D).cpu().clamp(min=self.smoothing)
            pull_N = torch.where(alive_N, _pull(distance_N), 0.0)
            if not bool(pull_N.any()):
                break
            w_N = pull_N / pull_N.sum()
            here_N = alive_N & (distance_N == 0)
            if bool(here_N.any()):  # y is an update, perhaps several: the sum of the unit vectors to the others
                push_N = pull_N.clone()
                push_N[here_N] = -pull_N.sum() / here_N.sum()
                push = float(Updates.of(updates.weighted_sum(push_N[None]), finite=True).norms_N())
                held = _held(int(here_N.sum()), push, updates.dtype)
                if held == 1:
                    break
                w_N = torch.lerp(w_N, here_N.to(torch.float64) / here_N.sum(), held)
            next_D = updates.weighted_sum(w_N[None])[0]
            step = Updates.of(next_D[None], finite=True)
            moved, rounding = float(step.distances_to_N(y_D)), torch.finfo(updates.dtype).eps * float(step.norms_N())
            y_D = next_D
            if moved <= self.tolerance * int(alive_N.sum()) / float(pull_N.sum()) + rounding:
                break
        return y_D


def _pull(distance_R: Tensor) -> Tensor:
    """1 / d_i, and 0 for a row at distance 0 or at infinity."""
    return torch.where(distance_R == 0, 0.0, (1 / distance_R).clamp(max=1e300))


def _to_mixture(squared_RR: Tensor, w_R: Tensor) -> tuple[Tensor, float]:
    """||x_i - sum_j w_j x_j||^2, and how many times as large as one of them the terms are that it is the difference of."""
    terms_R = (squared_RR * w_R).sum(dim=1)
    squared_R = (terms_R - (w_R * terms_R).sum() / 2).clamp_(min=0)
    return squared_R, float(torch.where(terms_R == 0, 0.0, terms_R / squared_R).max())


def _held(multiplicity: int, push: float, dtype: torch.dtype) -> float:
    """The share of y in its next point where it is `multiplicity` updates that others push with that force; 1: stays."""
    limit = multiplicity * (1 + torch.finfo(dtype).eps)
    return multiplicity / push if push > limit else 1.0
