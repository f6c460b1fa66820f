"""FLTrust: updates count as far as they point where the server's own gradient points."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from narses.config import STRICT
from narses.rules.base import Aggregation, Context, Property, require
from narses.rules.trust import trusted
from narses.rules.weighing import inner_products
from narses.updates import Updates


@dataclass(frozen=True, config=STRICT)
class FlTrust:
    """The mean of the updates, each brought to the length of the server's own gradient g0, weighted by max(0, cos(x_i, g0)).

    n >= 1, whatever f; only the server's own data is trusted. Cost one gradient, O(n D) beside. Needs a trusted batch of
    `samples`, drawn anew each round.
    Cao, Fang, Liu and Gong, FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping, NDSS 2021. There
    the 100 samples are chosen once for the whole training and the server plays as many local steps as its clients; here they
    are drawn anew each round and g0 is one gradient. Where nobody is trusted, or g0 is 0 or not finite, the paper's quotient
    is not defined; here the result is 0: no step. An update of length 0, or of one beyond float64, has no say.
    """

    samples: PositiveInt = 100

    properties: ClassVar[frozenset[Property]] = frozenset({Property.PERMUTATION})

    @property
    def trusted_samples(self) -> int:
        return self.samples

    def min_updates(self, f: int) -> int:
        return 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        batch, parameters_D, _ = trusted(self, context)
        own_D = batch.gradient(parameters_D).to(torch.float64)
        own = math.sqrt(math.fsum(float(part_C @ part_C) for part_C in torch.split(own_D, 4096)))
        weights_N = torch.zeros(len(updates), dtype=torch.float64)
        if 0 < own < math.inf:
            norms_N = updates.norms_N().cpu()
            cosines_N = inner_products(updates, own_D) / norms_N / own
            trust_N = torch.where(cosines_N.isfinite() & norms_N.isfinite(), cosines_N.clamp(min=0), 0.0)
            if bool((trust_N > 0).any()):
                weights_N = torch.where(trust_N > 0, trust_N / trust_N.sum() * own / norms_N, 0.0)
        return Aggregation(updates.weighted_sum(weights_N.unsqueeze(0))[0])
