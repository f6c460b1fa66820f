"""Zeno: the updates that lower the loss most on a few samples of the server's own."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from narses.combine import Mean
from narses.config import STRICT
from narses.rules.base import Aggregation, Context, Positive, Property, require
from narses.rules.trust import trusted
from narses.updates import Updates


@dataclass(frozen=True, config=STRICT)
class Zeno:
    """The mean of the n - f updates of highest score F(w) - F(w - eta x_i) - rho ||x_i||^2; ties to the smallest row.

    n >= f + 1. Cost n + 1 evaluations of the loss F, O(n D) beside. Needs a trusted batch: F is the mean loss on `samples`
    of the server's own, drawn anew each round. w and eta are the round's; rho = eta / rho_ratio.
    Xie, Koyejo and Gupta, Zeno: Distributed Stochastic Gradient Descent with Suspicion-based Fault-tolerance, ICML 2019,
    definitions 2 and 3, whose b is the declared f here. 4 samples and the ratio 200 are what the authors' scripts use; their
    code takes the mean of the squared coordinates for ||x_i||^2 (penalty = "mean"), the text their sum.
    An update whose step has no finite loss or no finite length has the score minus infinity. `scores` are negated: the
    smallest wins.
    """

    samples: PositiveInt = 4
    rho_ratio: Positive = 200.0
    penalty: Literal["sum", "mean"] = "sum"

    properties: ClassVar[frozenset[Property]] = frozenset({Property.PERMUTATION, Property.INPUT_RANGE})

    @property
    def trusted_samples(self) -> int:
        return self.samples

    def min_updates(self, f: int) -> int:
        return f + 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        batch, parameters_D, rate = trusted(self, context)
        n, here = len(updates), batch.loss(parameters_D)
        divisor = updates.dimension if self.penalty == "mean" else 1
        penalties_N = rate / self.rho_ratio * updates.norms_N().cpu().square() / divisor
        after_N = torch.empty(n, dtype=torch.float64)
        for i in range(n):
            x_D = updates.per_coordinate(Mean(), rows=[i]).to(parameters_D)
            after_N[i] = batch.loss(x_D.mul_(-rate).add_(parameters_D))
        scores_N = after_N + penalties_N - here
        scores_N = torch.where(scores_N.isfinite(), scores_N, math.inf)
        selected_K = scores_N.argsort(stable=True)[: n - f].sort().values
        return Aggregation(updates.per_coordinate(Mean(), rows=selected_K), selected_K, scores_N)
