"""What a round's updates look like beside the aggregate that came of them: one read of the matrix, or a sample of its columns.

All quantities follow from squared distances between the updates, the aggregate and the origin, so nothing but those is asked
of the matrix. They are differences of such: what concerns g is good to about 1e-6 ||x_i||^2 / ||g||^2, the deviation to 1e-3
sigma, a cosine to 1e-6 times how often the shorter vector goes into the longer one. Where it is known who is honest (in an
experiment), g is the mean of the honest updates; elsewhere that of the n - f updates nearest the aggregate, an estimate.

N = updates, H = honest ones, g = their mean, F = aggregate, D = parameters
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from narses.errors import InputError
from narses.updates import Updates

SAMPLE = 65_536
"""Columns of a sample."""
RUNS = 16
"""Neighbouring columns are read together: a sample is so many runs of them, spread evenly over the vector."""


class Diagnostics(NamedTuple):
    """Of one round. nan where a quantity is not defined: an update or a mean of length 0.

    distances_N: ||x_i - F||. norms_N: ||x_i||. cosines_N: of the angle between x_i and F. norm: ||F||.
    inner: <F, g>; inner_ratio: <F, g> / ||g||^2, which (alpha, f)-resilience wants at 1 - sin alpha or more (El Mhamdi et
    al. 2018, Definition 1: of expectations, so average it over rounds). sin_alpha: 1 - inner_ratio; at 1 or above this round's
    step was no descent. cosine: of the angle between F and g. deviation: ||F - g||; deviation_in_sigma: the same over
    sqrt(mean ||x_i - g||^2), which is sqrt(D) sigma.
    variance_norm_ratio: sqrt(mean over H of ||x_i - g||^2) / ||g||. bound: what the rule's guarantee allows for it, None
    where there is none; above it nothing is guaranteed.
    estimate: whether g is one. sampled: columns that were looked at, None for all; lengths are scaled up from them.
    """

    distances_N: Tensor
    norms_N: Tensor
    cosines_N: Tensor
    norm: float
    inner: float
    inner_ratio: float
    sin_alpha: float
    cosine: float
    deviation: float
    deviation_in_sigma: float
    variance_norm_ratio: float
    bound: float | None
    estimate: bool
    sampled: int | None


def diagnose(
    updates: Updates,
    aggregate_D: Tensor,
    f: int,
    *,
    origin_D: Tensor | None = None,
    honest: Sequence[int] | None = None,
    rule: str = "",
    sample: bool = False,
) -> Diagnostics:
    """Compare `updates` with the aggregate (D,) that a rule made of them.

    origin_D: what all of them are measured from, the round's parameters where updates are parameters; None: 0. honest: the
    rows that are known to be honest. rule: its registry name, for the bound. sample: look at SAMPLE columns, where there are
    more. Cost: one read of the matrix, O(n^2 D). InputError if `honest` names no row of these.
    """
    n = len(updates)
    if honest is not None and (not honest or min(honest) < 0 or max(honest) >= n):
        raise InputError(f"honest = {list(honest)}: expected one or more rows of the {n} updates")
    columns = sample_columns(updates.dimension) if sample and updates.dimension > SAMPLE else None
    squared_MM = updates.squared_distances_with([aggregate_D, origin_D], columns).cpu()
    seen = updates.dimension if columns is None else sum(stop - start for start, stop in columns)
    squared_MM = squared_MM * (updates.dimension / seen)

    lengths_M = squared_MM[:, -1]  # squared distance to the origin
    between_MM = (lengths_M[:, None] + lengths_M[None, :] - squared_MM) / 2  # inner products
    to_aggregate_N, norms_N = squared_MM[:n, n].sqrt(), lengths_M[:n].sqrt()
    norm_squared = float(lengths_M[n])
    rows = torch.tensor(list(honest)) if honest is not None else to_aggregate_N.argsort(stable=True)[: max(1, n - f)]

    inner = float(between_MM[rows, n].mean())
    length_squared = max(0.0, float(between_MM[rows][:, rows].mean()))
    # mean ||x_i - g||^2 is half the mean squared distance of two of them, each with itself included
    variance = float(squared_MM[rows][:, rows].mean()) / 2
    deviation = math.sqrt(max(0.0, float(squared_MM[rows, n].mean()) - variance))
    ratio = _over(inner, length_squared)
    return Diagnostics(
        distances_N=to_aggregate_N,
        norms_N=norms_N,
        cosines_N=(between_MM[:n, n] / (norms_N * math.sqrt(norm_squared))).clamp(-1, 1),
        norm=math.sqrt(norm_squared),
        inner=inner,
        inner_ratio=ratio,
        sin_alpha=1 - ratio,
        cosine=max(-1.0, min(1.0, _over(inner, math.sqrt(norm_squared * length_squared))))
        if norm_squared
        else math.nan,
        deviation=deviation,
        deviation_in_sigma=_over(deviation, math.sqrt(variance)),
        variance_norm_ratio=_over(math.sqrt(variance), math.sqrt(length_squared)),
        bound=variance_bound(rule, n, f),
        estimate=honest is None,
        sampled=None if columns is None else seen,
    )


def as_line(workers: Sequence[int], found: Diagnostics) -> dict[str, Any]:
    """For a file of JSON lines, workers by id; what is not defined is null."""
    facts: dict[str, Any] = {}
    for name, value in found._asdict().items():
        if isinstance(value, Tensor):
            pairs = zip(workers, value.tolist(), strict=True)
            facts[name.removesuffix("_N")] = {str(worker): _short(number) for worker, number in pairs}
        else:
            facts[name] = _short(value) if isinstance(value, float) else value
    return facts


def variance_bound(rule: str, n: int, f: int) -> float | None:
    """The variance-norm ratio up to which the rule's theorem holds, None where none is known for it or for these numbers.

    As collected by El Mhamdi, Guerraoui and Rouault, "Distributed Momentum for Byzantine-resilient Stochastic Gradient
    Descent" (2021), section 2.3: Krum and Bulyan 1 / sqrt(2 (n - f + (f (n - f - 2) + f^2 (n - f - 1)) / (n - 2f - 2))), the
    median 1 / sqrt(n - f), the minimum-diameter subset (Brute) (n - f) / (sqrt(8) f).
    """
    match rule:
        case "krum" | "multi-krum" | "bulyan" if n > 2 * f + 2:
            return 1 / math.sqrt(2 * (n - f + (f * (n - f - 2) + f**2 * (n - f - 1)) / (n - 2 * f - 2)))
        case "median" if n > f:
            return 1 / math.sqrt(n - f)
        case "brute" if f > 0:
            return (n - f) / (math.sqrt(8) * f)
    return None


def sample_columns(dimension: int) -> list[tuple[int, int]]:
    """(first, end) of RUNS equal runs of columns, SAMPLE in all, spread evenly; everything where there are no more."""
    if dimension <= SAMPLE:
        return [(0, dimension)]
    width = SAMPLE // RUNS
    gap = (dimension - width) / (RUNS - 1)
    return [(round(i * gap), round(i * gap) + width) for i in range(RUNS)]


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan
