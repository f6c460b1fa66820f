"""Centered clipping: no update moves the aggregate further than a radius from where the last round left it."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from narses.config import STRICT
from narses.errors import InputError
from narses.rules.base import Aggregation, Context, Positive, Property, require
from narses.rules.weighing import shortening, weighted_mean
from narses.updates import Updates


@dataclass(frozen=True, config=STRICT)
class CenteredClipping:
    """v <- v + (1/n) sum_i (x_i - v) min(1, radius / ||x_i - v||), repeated, from the v of the last round on.

    n >= 2f + 1; f itself is not used. Cost O(n D) per iteration. State: "centre", the last v, (D,) of the updates' dtype;
    the first round starts from zero, as the authors' code does.
    Karimireddy, He and Jaggi, Learning from History for Byzantine Robust Optimization, ICML 2021 (CClip). Their
    experiments use radius = 10 / (1 - beta) with workers' momentum beta: 10, the default, is for workers without momentum,
    100 for beta = 0.9. One iteration is their default too.
    v is kept as weights of the rows and of the old v, so that rows enter one sum and are rounded once.
    """

    radius: Positive = 10.0
    iterations: PositiveInt = 1

    properties: ClassVar[frozenset[Property]] = frozenset({Property.PERMUTATION})

    def min_updates(self, f: int) -> int:
        return 2 * f + 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        start_D = _start(updates, context)
        of_rows_N = torch.zeros(len(updates), dtype=torch.float64)
        of_start = 1.0
        centre_D = start_D
        for _ in range(self.iterations):
            distances_N = updates.norms_N() if centre_D is None else updates.distances_to_N(centre_D)
            factors_N = shortening(distances_N, self.radius)
            rest = 1 - float(factors_N.sum()) / len(updates)
            of_rows_N, of_start = of_rows_N * rest + factors_N / len(updates), of_start * rest
            if of_start == 0:
                centre_D = weighted_mean(updates, of_rows_N)
                continue
            centre_D = updates.weighted_sum(of_rows_N.unsqueeze(0))[0]
            if start_D is not None:
                limits = torch.finfo(updates.dtype)
                centre_D.copy_((centre_D.double() + of_start * start_D.double()).clamp_(limits.min, limits.max))
        assert centre_D is not None
        return Aggregation(centre_D, state={"centre": centre_D.clone()})


def _start(updates: Updates, context: Context | None) -> Tensor | None:
    """The v of the last round; None for zero."""
    state = None if context is None else context.state
    if state is None:
        return None
    centre_D = state["centre"].to(updates.device, updates.dtype)
    if centre_D.shape != (updates.dimension,):
        raise InputError(
            f"CenteredClipping: the state of the last round has shape {tuple(centre_D.shape)}, expected ({updates.dimension},)"
        )
    return centre_D
