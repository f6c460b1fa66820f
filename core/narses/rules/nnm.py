"""Nearest-neighbour mixing: every update becomes the mean of its neighbourhood."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from narses.combine import Mean
from narses.config import STRICT
from narses.models.compute import one_thread
from narses.rules.base import Aggregation, Context, Property, require
from narses.rules.pre import PreAggregation
from narses.updates import Updates


@dataclass(frozen=True, config=STRICT)
class Nnm(PreAggregation):
    """Each update is replaced by the mean of its n - f nearest, itself included; `rule` aggregates those. Ties to the
    smallest row.

    n >= f + 1, and what `rule` needs. Cost O(n^2 D); memory n D. Neighbourhoods that are equal are averaged once.
    Allouah, Farhadkhani, Guerraoui, Gupta, Pinot and Stephan, Fixing by Mixing: A Recipe for Optimal Byzantine ML under
    Heterogeneity, AISTATS 2023 (NNM).
    """

    keeps: ClassVar[frozenset[Property]] = frozenset(
        {Property.PERMUTATION, Property.TRANSLATION, Property.SCALING, Property.INPUT_RANGE}
    )

    def min_updates(self, f: int) -> int:
        return max(self.rule.min_updates(f), f + 1)

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        nearest_NN = updates.squared_distances_NN().cpu().argsort(dim=1, stable=True)
        mixed: dict[tuple[int, ...], Tensor] = {}
        x_ND = torch.empty((len(updates), updates.dimension), dtype=updates.dtype, device=updates.device)
        with one_thread():  # rows are too short to be worth waking torch's threads for each
            for x_D, nearest_N in zip(x_ND, nearest_NN[:, : len(updates) - f].tolist(), strict=True):
                rows = tuple(sorted(nearest_N))
                known_D = mixed.get(rows)
                mixed[rows] = x_D.copy_(updates.per_coordinate(Mean(), rows=rows) if known_D is None else known_D)
        return self.of_mixed(Updates.of(x_ND, finite=True), f, context)
