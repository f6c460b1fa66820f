"""Rules with a memory, with trusted data, with eigenvectors, and pre-aggregations: naive numpy in float64.

As tests.oracles.rules, which lists them; randomness is drawn from the same streams as the rules', for round 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from narses.seeding import generator
from tests.oracles import trust

Result = tuple[np.ndarray, list[int] | None, np.ndarray | None]
Inner = Callable[[np.ndarray, int], Result]


def centered_clipping(
    x: np.ndarray, f: int, radius: float = 10.0, iterations: int = 1, start: np.ndarray | None = None
) -> Result:
    v = np.zeros(x.shape[1]) if start is None else start
    for _ in range(iterations):
        moves = []
        for row in x:
            length = np.linalg.norm(row - v)
            moves.append((row - v) * (min(1.0, radius / length) if length else 1.0))
        v = v + np.mean(moves, axis=0)
    return v, None, None


def dnc(x: np.ndarray, f: int, iterations: int = 1, subsample: int = 10_000, c: float = 1.0, seed: int = 0) -> Result:
    n, d = x.shape
    kept = np.zeros(n, dtype=int)
    for iteration in range(iterations):
        columns = np.arange(d)
        if subsample < d:
            columns = torch.randperm(d, generator=generator(seed, "dnc", 0, iteration)).numpy()[:subsample]
        sample = x[:, columns] / np.abs(x).max()
        centred = sample - sample.mean(axis=0)
        v = np.linalg.svd(centred)[2][0]
        order = np.argsort((centred @ v) ** 2, kind="stable")
        kept[order[: n - int(c * f)]] += 1
    rows = [i for i in range(n) if kept[i] == kept.max()]
    return x[rows].mean(axis=0), rows, None


def caf(x: np.ndarray, f: int) -> Result:
    n = len(x)
    unit = np.abs(x).max()
    x = x / unit
    weights, smallest, best = np.ones(n), np.inf, x.mean(axis=0)
    while f and weights.sum() > n - 2 * f:
        mean = (weights[:, None] * x).sum(axis=0) / weights.sum()
        covariance = (
            sum(w * np.outer(row - mean, row - mean) for w, row in zip(weights, x, strict=True)) / weights.sum()
        )
        values, vectors = np.linalg.eigh(covariance)
        if values[-1] < smallest:
            smallest, best = values[-1], mean
        places = ((x - mean) @ vectors[:, -1]) ** 2
        largest = max(place for place, w in zip(places, weights, strict=True) if w > 0)
        weights = np.where(weights > 0, weights * (1 - places / largest), 0.0)
    return best * unit, None, None


def sign_guard(
    x: np.ndarray,
    f: int,
    lower: float = 0.1,
    upper: float = 3.0,
    fraction: float = 0.1,
    quantile: float = 0.5,
    seed: int = 0,
) -> Result:
    n, d = x.shape
    norms = [float(np.linalg.norm(row)) for row in x]
    median = float(np.median(norms))
    usual = {i for i in range(n) if lower * median <= norms[i] <= upper * median}
    columns = torch.randperm(d, generator=generator(seed, "sign-guard", 0)).numpy()[: max(1, int(fraction * d))]
    points = [np.array([(row[columns] > 0).mean(), (row[columns] == 0).mean(), (row[columns] < 0).mean()]) for row in x]
    rows = sorted(usual & mean_shift(points, quantile)) or sorted(usual)
    shorter = [x[i] * min(1.0, median / norms[i]) if norms[i] else x[i] for i in rows]
    return np.mean(shorter, axis=0), rows, None


def mean_shift(points: list[np.ndarray], quantile: float) -> set[int]:
    """The points of the largest cluster."""
    n = len(points)
    k = max(1, int(n * quantile))
    width = np.mean([sorted(np.linalg.norm(p - q) for q in points)[k - 1] for p in points]) * (1 + 1e-9)

    def around(centre: np.ndarray) -> list[int]:
        return [j for j in range(n) if np.linalg.norm(points[j] - centre) <= width]

    ends = []
    for centre in points:
        near: list[int] = []
        while around(centre) != near:
            near = around(centre)
            centre = np.mean([points[j] for j in near], axis=0)
        ends.append((centre, len(near)))
    kept: list[np.ndarray] = []
    for centre, _ in sorted(ends, key=lambda end: -end[1]):
        if all(np.linalg.norm(centre - other) > width for other in kept):
            kept.append(centre)
    clusters: list[set[int]] = [set() for _ in kept]
    for j, point in enumerate(points):
        to_centres = [np.linalg.norm(point - centre) for centre in kept]
        if min(to_centres) <= width:
            clusters[int(np.argmin(to_centres))].add(j)
    return max(clusters, key=lambda cluster: (len(cluster), -min(cluster, default=n)))


def zeno(x: np.ndarray, f: int, samples: int = 4, rho_ratio: float = 200.0, penalty: str = "sum") -> Result:
    w, rate = trust.start(x.shape[1]), trust.RATE
    of = {"sum": np.sum, "mean": np.mean}[penalty]
    scores = [trust.loss(w - rate * row) + rate / rho_ratio * of(row**2) - trust.loss(w) for row in x]
    rows = sorted(sorted(range(len(x)), key=lambda i: (scores[i], i))[: len(x) - f])
    return x[rows].mean(axis=0), rows, None


def fl_trust(x: np.ndarray, f: int, samples: int = 100) -> Result:
    own = trust.gradient(trust.start(x.shape[1]))
    length = np.linalg.norm(own)
    trusted = [max(0.0, float(row @ own) / float(np.linalg.norm(row)) / length) for row in x]
    rows = [row * length / np.linalg.norm(row) for row in x]
    if not any(trusted):
        return np.zeros(x.shape[1]), None, None
    return sum(t * row for t, row in zip(trusted, rows, strict=True)) / sum(trusted), None, None


def nnm(x: np.ndarray, f: int, rule: Inner) -> Result:
    n = len(x)
    mixed = []
    for row in x:
        nearest = sorted(range(n), key=lambda j: (float(((row - x[j]) ** 2).sum()), j))[: n - f]
        mixed.append(x[nearest].mean(axis=0))
    return rule(np.array(mixed), f)[0], None, None


def bucketing(x: np.ndarray, f: int, rule: Inner, size: int = 2, seed: int = 0) -> Result:
    order = torch.randperm(len(x), generator=generator(seed, "bucketing", 0)).tolist()
    means = np.array([x[order[i : i + size]].mean(axis=0) for i in range(0, len(x), size)])
    return rule(means, min(f, len(means)))[0], None, None


def clipping(x: np.ndarray, f: int, rule: Inner, radius: float = 2.0) -> Result:
    return rule(np.array([row * min(1.0, radius / max(float(np.linalg.norm(row)), 1e-300)) for row in x]), f)


def arc(x: np.ndarray, f: int, rule: Inner) -> Result:
    n = len(x)
    order = sorted(range(n), key=lambda i: -float(np.linalg.norm(x[i])))
    longest = 2 * f * (n - f) // n
    limit = float(np.linalg.norm(x[order[longest]]))
    shorter = x.copy()
    for i in order[:longest]:
        length = float(np.linalg.norm(x[i]))
        shorter[i] = x[i] * (limit / length if length > limit else 1.0)
    return rule(shorter, f)


PLAIN: dict[str, Callable[..., Result]] = {
    "caf": caf,
    "centered-clipping": centered_clipping,
    "dnc": dnc,
    "fl-trust": fl_trust,
    "sign-guard": sign_guard,
    "zeno": zeno,
}
WRAPPING: dict[str, Callable[..., Result]] = {"arc": arc, "bucketing": bucketing, "clipping": clipping, "nnm": nnm}


def wrapping(
    oracle: Callable[..., Result], aggregate: Callable[[Any, np.ndarray, int], Result]
) -> Callable[..., Result]:
    """The oracle of a pre-aggregation whose field `rule` is a table, as a rule's configuration has it."""

    def whole(x: np.ndarray, f: int, rule: Any = "trimmed-mean", **fields: Any) -> Result:
        table = {"name": rule} if isinstance(rule, str) else rule
        return oracle(x, f, lambda y, g: aggregate(table, y, g), **fields)

    return whole
