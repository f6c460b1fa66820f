"""The direction in which updates vary most, from their distances alone.

The centred matrix X has the Gram matrix K with K_ij = (r_i + r_j - D_ij^2) / 2, r_i = the squared distance of x_i to the
mean. D_ij are direct differences, so K is as exact as they are, and it is built from the rows in use alone: a row of 1e30
that has been removed leaves no noise behind. The top right singular vector of X is never needed, only the rows' places on it.

N = rows in use
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from narses.models.compute import one_thread
from narses.rules.weighing import scaled
from narses.updates import Updates

_SMALLER = 2.0**-600  # brings any float64 to where its square is finite


class Spread(NamedTuple):
    """The largest variance of weighted rows in any direction, and each row's squared place on it, centred, (N,) float64.

    Places are in a unit of their own: only their ratios count.
    """

    variance: float
    places_N: Tensor


def finite_squares(updates: Updates) -> Tensor:
    """||x_i - x_j||_2^2 as (N, N) float64 on the CPU; rows beyond 1e154 are all measured in another, larger unit."""
    squared_NN = updates.squared_distances_NN().cpu()
    if bool(squared_NN.isfinite().all()):
        return squared_NN
    factors_N = torch.full((len(updates),), _SMALLER, dtype=torch.float64)
    return scaled(updates, factors_N).squared_distances_NN().cpu()


def widest(squared_NN: Tensor, weights_N: Tensor) -> Spread:
    """The widest direction of rows with these squared distances and these positive weights. Cost O(N^3)."""
    unit = float(squared_NN.max())
    if unit == 0:
        return Spread(0.0, torch.zeros_like(weights_N))
    with one_thread():  # a product split over threads rounds differently for each number of them
        share_N = weights_N / weights_N.sum()
        squared_NN = squared_NN / unit
        to_rows_N = squared_NN @ share_N
        to_mean_N = to_rows_N - (share_N @ to_rows_N) / 2
        gram_NN = (to_mean_N[:, None] + to_mean_N - squared_NN) / 2
        root_N = share_N.sqrt()
        values_N, vectors_NN = torch.linalg.eigh(root_N[:, None] * gram_NN * root_N)
        places_N = gram_NN @ (root_N * vectors_NN[:, -1])
    return Spread(float(values_N[-1]) * unit, places_N.square_())
