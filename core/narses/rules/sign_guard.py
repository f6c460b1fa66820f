"""SignGuard: drop updates of unusual length, then those whose signs are unlike the largest group's."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from narses.combine import Mean
from narses.config import STRICT
from narses.models.compute import one_thread
from narses.rules.base import Aggregation, Context, Positive, Property, require, round_of
from narses.rules.weighing import shortening
from narses.seeding import generator
from narses.updates import Updates

_MOST_SHIFTS = 300
_SLACK = 1 + 1e-9  # equal distances, averaged, are not to fall short of themselves


@dataclass(frozen=True, config=STRICT)
class SignGuard:
    """The mean of the updates that pass two filters, each shortened to the median length M at most.

    First filter: lower M <= ||x_i|| <= upper M. Second: the shares of positive, zero and negative values, in a random
    `fraction` of the coordinates, lie in the largest mean-shift cluster; of equally large ones in that with the smallest row.
    n >= 2f + 1; f itself is not used. Cost O(n D + n^3). `selected` holds the rows that pass; the longer half is shortened.
    Xu, Huang, Song and Lan, Byzantine-robust Federated Learning through Collaborative Malicious Gradient Filtering, ICDCS
    2022, plain SignGuard (not -Sim or -Dist).
    Mean shift is what the authors' code calls scikit-learn for: a flat kernel whose bandwidth is the mean distance to the
    n `quantile`-th nearest update, started from every update. Their code takes one window of neighbouring coordinates where the
    text draws them at random (followed here, from seed and round), and divides each share by its largest value (not here).
    Where nothing passes both filters, the paper's result is not defined; here the first filter alone decides.
    """

    lower: Positive = 0.1
    upper: Positive = 3.0
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    quantile: Annotated[float, Field(gt=0, le=1)] = 0.5
    seed: NonNegativeInt = 0

    properties: ClassVar[frozenset[Property]] = frozenset({Property.SCALING})

    def min_updates(self, f: int) -> int:
        return 2 * f + 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        norms_N = updates.norms_N().cpu()
        median = _median(norms_N)
        usual_N = (self.lower * median <= norms_N) & (norms_N <= self.upper * median)
        draws = generator(self.seed, "sign-guard", round_of(context))
        count = max(1, int(self.fraction * updates.dimension))
        columns_C = torch.randperm(updates.dimension, generator=draws)[:count].sort().values
        passed_N = usual_N & largest_cluster(_shares(updates.columns(columns_C).cpu()), self.quantile)
        selected_K = (passed_N if bool(passed_N.any()) else usual_N).nonzero().squeeze(1)
        factors_N = shortening(norms_N, median)
        if bool((factors_N[selected_K] == 1).all()):
            return Aggregation(updates.per_coordinate(Mean(), rows=selected_K), selected_K)
        weights_N = torch.zeros(len(updates), dtype=torch.float64)
        weights_N[selected_K] = factors_N[selected_K] / len(selected_K)
        return Aggregation(updates.weighted_sum(weights_N.unsqueeze(0))[0], selected_K)


def _median(values_N: Tensor) -> float:
    """The middle value, for even N the midpoint of both; infinite where they are."""
    ordered = values_N.sort().values
    low, high = float(ordered[(len(ordered) - 1) // 2]), float(ordered[len(ordered) // 2])
    return low if low == high else low / 2 + high / 2


def _shares(x_NC: Tensor) -> Tensor:
    """The shares of positive, zero and negative values in each row, (N, 3) float64."""
    return torch.stack([(x_NC.sign() == sign).double().mean(dim=1) for sign in (1, 0, -1)], dim=1)


def largest_cluster(points_NF: Tensor, quantile: float) -> Tensor:
    """Which points are in the largest mean-shift cluster, (N,) bool.

    Every point climbs to the mean of the points within the bandwidth until it stays. Where climbers end, those within the
    bandwidth of a better one (more points around it; then the smaller row) are the same centre. A point belongs to the nearest
    centre, to none if that is further than the bandwidth.
    """
    with one_thread():
        n = len(points_NF)
        nearest_NN = _distances(points_NF, points_NF).sort(dim=1).values
        bandwidth = float(nearest_NN[:, max(1, int(n * quantile)) - 1].mean()) * _SLACK
        centres_NF, near_NN = points_NF, None
        for _ in range(_MOST_SHIFTS):
            before_NN, near_NN = near_NN, _distances(centres_NF, points_NF) <= bandwidth
            if before_NN is not None and torch.equal(before_NN, near_NN):
                break
            centres_NF = near_NN.double() @ points_NF / near_NN.sum(dim=1, keepdim=True)
        assert near_NN is not None
        apart_NN = _distances(centres_NF, centres_NF) > bandwidth
        kept: list[int] = []
        for i in near_NN.sum(dim=1).argsort(descending=True, stable=True).tolist():
            if bool(apart_NN[i, kept].all()):
                kept.append(i)
        closest_N, label_N = _distances(points_NF, centres_NF[kept]).min(dim=1)
    label_N = torch.where(closest_N <= bandwidth, label_N, -1)
    members = [(label_N == label).nonzero().squeeze(1).tolist() for label in range(len(kept))]
    best = max(range(len(kept)), key=lambda label: (len(members[label]), -min(members[label], default=n)))
    return label_N == best


def _distances(a_MF: Tensor, b_NF: Tensor) -> Tensor:
    """||a_i - b_j|| as (M, N), by direct differences."""
    squared_MN = torch.zeros(len(a_MF), len(b_NF), dtype=torch.float64)
    for a_M, b_N in zip(a_MF.T, b_NF.T, strict=True):
        squared_MN += (a_M[:, None] - b_N).square_()
    return squared_MN.sqrt_()
