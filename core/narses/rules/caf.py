"""The covariance-bound agnostic filter: weigh updates down along the widest direction, keep the least spread mean."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass

from narses.config import STRICT
from narses.rules.base import Aggregation, Context, Property, require
from narses.rules.spectrum import finite_squares, widest
from narses.rules.weighing import weighted_mean
from narses.updates import Updates


@dataclass(frozen=True, config=STRICT)
class Caf:
    """The weighted mean with the smallest covariance among those met while outliers lose weight.

    Weights w_i start at 1. While their sum exceeds n - 2f: mean and covariance under w (normalised), its largest eigenvalue
    and eigenvector v; if the eigenvalue is the smallest so far, this mean is the candidate; then w_i <- w_i (1 - t_i / max t),
    t_i = <x_i - mean, v>^2. The last candidate is the result; with f = 0 it is the mean.
    n >= 2f + 1. Cost O(n^2 D) for distances, O(n^3) for each of at most n eigenvectors.
    Allouah, Guerraoui and Stephan, Towards Trustworthy Federated Learning with Untrusted Participants, ICML 2025 (CAF),
    after the filters of Diakonikolas and Kane. Not yet compared with the paper's text or its authors' code. The maximum of t is
    taken over updates that still have weight: over all, as the formula can also be read, an update of 1e30 that has lost its
    weight would keep all others from losing theirs.
    """

    properties: ClassVar[frozenset[Property]] = frozenset(
        {Property.PERMUTATION, Property.TRANSLATION, Property.SCALING}
    )

    def min_updates(self, f: int) -> int:
        return 2 * f + 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        n = len(updates)
        weights_N = best_N = torch.ones(n, dtype=torch.float64)
        squared_NN = finite_squares(updates) if f else None
        smallest = math.inf
        while squared_NN is not None and float(weights_N.sum()) > n - 2 * f:
            rows_K = weights_N.nonzero().squeeze(1)
            variance, places_K = widest(squared_NN[rows_K][:, rows_K], weights_N[rows_K])
            if variance < smallest:
                smallest, best_N = variance, weights_N
            if float(places_K.max()) == 0:  # all that is left is one and the same vector
                break
            weights_N = weights_N.clone()
            weights_N[rows_K] *= 1 - places_K / places_K.max()
        return Aggregation(weighted_mean(updates, best_N))
