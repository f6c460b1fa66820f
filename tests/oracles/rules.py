"""The aggregation rules as the papers write them: naive numpy in float64, one coordinate and one election at a time.

x is (n, D). Every oracle returns (vector, selected rows or None, scores or None); ties go to the smallest index, equally near
values to the smaller one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from tests.oracles import robust

Result = tuple[np.ndarray, list[int] | None, np.ndarray | None]


def mean(x: np.ndarray, f: int) -> Result:
    return np.array([math.fsum(column / len(x)) for column in x.T]), None, None


def median(x: np.ndarray, f: int) -> Result:
    return np.median(x, axis=0), None, None


def trimmed_mean(x: np.ndarray, f: int) -> Result:
    kept = [sorted(column)[f : len(x) - f] for column in x.T]
    return np.array([math.fsum(values) / len(values) for values in kept]), None, None


def nearest(column: np.ndarray, centre: float, k: int) -> float:
    """The mean of the k values nearest the centre, by sorting all of them by (distance, value)."""
    return math.fsum(sorted(column, key=lambda value: (abs(value - centre), value))[:k]) / k


def mean_around_median(x: np.ndarray, f: int, keep: str = "n-f") -> Result:
    k = {"n-f": len(x) - f, "n-2f": len(x) - 2 * f, "n-f-1": len(x) - f - 1}[keep]
    return np.array([nearest(column, float(np.median(column)), k) for column in x.T]), None, None


def phocas(x: np.ndarray, f: int) -> Result:
    centres, _, _ = trimmed_mean(x, f)
    return np.array([nearest(column, c, len(x) - f) for column, c in zip(x.T, centres, strict=True)]), None, None


def squares(values: list[Fraction]) -> Fraction:
    """The sum of squared distances to the mean."""
    centre = sum(values, Fraction(0)) / len(values)
    return sum(((value - centre) ** 2 for value in values), Fraction(0))


def two_means(x: np.ndarray, f: int, threshold: float, relative: bool = False) -> Result:
    """Every division of every sorted column, in exact arithmetic; of equally good ones that with the larger lower part."""
    out = []
    for column in x.T:
        v = sorted(Fraction(float(value)) for value in column)
        kept = v
        if len(v) > 1:
            size = min(range(1, len(v)), key=lambda s: (squares(v[:s]) + squares(v[s:]), -s))
            low, high = v[:size], v[size:]
            gap = sum(high) / len(high) - sum(low) / len(low)
            unit = Fraction(math.sqrt(squares(v) / len(v)) if relative else 1.0)
            if gap > Fraction(threshold) * unit and len(low) != len(high):
                kept = max(low, high, key=len)
        out.append(float(sum(kept) / len(kept)))
    return np.array(out), None, None


def distances(x: np.ndarray, p: float = 2.0) -> np.ndarray:
    return np.array([[np.linalg.norm(a - b, ord=p) for b in x] for a in x])


def cost(x: np.ndarray, i: int, j: int, p: float, power: int) -> float:
    """||x_i - x_j||_p^power, exact for small whole numbers where p = power."""
    difference = np.abs(x[i] - x[j])
    if p == power:
        return float((difference**p).sum())
    return float(np.linalg.norm(difference, ord=p)) ** power


def scores(x: np.ndarray, rows: list[int], f: int, p: float, neighbours: str, power: int) -> np.ndarray:
    """Krum's score of each of `rows` among `rows`."""
    r = len(rows)
    k = {"n-f-2": r - f - 2, "n-f-1": r - f - 1, "n-f": r - f}[neighbours]
    k = max(1, min(k, r - 1))
    return np.array([sum(sorted(cost(x, i, j, p, power) for j in rows if j != i)[:k]) for i in rows])


def krum(x: np.ndarray, f: int, p: float = 2.0, neighbours: str = "n-f-2", power: int = 2) -> Result:
    values = scores(x, list(range(len(x))), f, p, neighbours, power)
    winner = int(values.argmin())
    return x[winner], [winner], values


def multi_krum(
    x: np.ndarray, f: int, m: int | None = None, p: float = 2.0, neighbours: str = "n-f-2", power: int = 2
) -> Result:
    values = scores(x, list(range(len(x))), f, p, neighbours, power)
    best = sorted(range(len(x)), key=lambda i: (values[i], i))[: len(x) - f - 2 if m is None else m]
    return mean(x[best], 0)[0], sorted(best), values


def medoid(x: np.ndarray, f: int, p: float = 2.0) -> Result:
    values = np.array([math.fsum(row) for row in distances(x, p)])
    winner = int(values.argmin())
    return x[winner], [winner], values


def brute(x: np.ndarray, f: int, p: float = 2.0, max_nodes: int = 0) -> Result:
    """All subsets, in lexicographic order; the first of the smallest diameter."""
    between = distances(x, p)
    best = list(min(itertools.combinations(range(len(x)), len(x) - f), key=lambda s: between[np.ix_(s, s)].max()))
    return mean(x[best], 0)[0], best, None


def geometric_median(
    x: np.ndarray, f: int, tolerance: float = 0, max_iterations: int = 0, smoothing: float = 0
) -> Result:
    """A row that no force moves; else Newton's method, after Weiszfeld's on the points themselves, below all rows."""
    scale = np.abs(x).max() or 1.0
    points = x / scale
    for i, y in enumerate(points):
        apart = points - y
        lengths = np.linalg.norm(apart, axis=1)
        force = (apart[lengths > 0] / lengths[lengths > 0, None]).sum(axis=0)
        if np.linalg.norm(force) <= (lengths == 0).sum() * (1 + 1e-12):
            return x[i], None, None

    def total(y: np.ndarray) -> float:
        return math.fsum(np.linalg.norm(points - y, axis=1))

    lowest = min(points, key=total)
    y, step = points.mean(axis=0), 1.0
    while total(y) >= total(lowest):  # towards the lowest row, which is not the median, but not onto it
        step /= 2
        apart = points - lowest
        lengths = np.linalg.norm(apart, axis=1)
        y = lowest + step * (apart[lengths > 0] / lengths[lengths > 0, None]).sum(axis=0)
    for _ in range(200):
        weights = 1 / np.linalg.norm(points - y, axis=1)
        y = weights @ points / weights.sum()
    for _ in range(50):
        apart = points - y
        lengths = np.linalg.norm(apart, axis=1)
        units = apart / lengths[:, None]
        hessian = ((np.eye(x.shape[1]) - units[:, :, None] * units[:, None]) / lengths[:, None, None]).sum(axis=0)
        move, share = np.linalg.lstsq(hessian, units.sum(axis=0))[0], 1.0
        while total(y + share * move) > total(y) and share > 1e-9:
            share /= 2
        y = y + share * move if share > 1e-9 else y
    return y * scale, None, None


def elected(x: np.ndarray, rows: list[int], f: int, inner: dict[str, Any], p: float) -> int:
    """The position in `rows` of the row nearest to what `inner` gives for them; equal to rounding: the first."""
    fields = {"p": p, **inner} if inner["name"] not in ("median", "geometric-median") else dict(inner)
    r, name = len(rows), fields.pop("name")
    if name == "multi-krum":
        fields["m"] = max(1, min(fields.get("m") or r - f - 2, r))
    vector, selected, _ = ORACLES[name](x[rows], f, **fields)
    if name in ("krum", "medoid"):
        return selected[0]  # type: ignore[index]
    away = np.array([np.linalg.norm(row - vector) for row in x[rows]])
    return int((away <= away.min() * (1 + 1e-12)).argmax())


def bulyan(
    x: np.ndarray,
    f: int,
    inner: dict[str, Any] | str = "krum",
    theta: str = "n-2f",
    keep: str = "n-4f",
    middle: str = "lower",
    p: float = 2.0,
) -> Result:
    table = inner if isinstance(inner, dict) else {"name": inner}
    size = {"n-2f": len(x) - 2 * f, "n-2f-2": len(x) - 2 * f - 2}[theta]
    beta = size - 2 * f - {"n-4f": 0, "n-4f-1": 1}[keep]
    remaining = list(range(len(x)))
    selected = [remaining.pop(elected(x, remaining, f, table, p) if len(remaining) > 1 else 0) for _ in range(size)]
    out = []
    for column in x[selected].T:
        ordered = sorted(column)
        lower, upper = ordered[(size - 1) // 2], ordered[size // 2]
        centre = {"lower": lower, "upper": upper, "midpoint": (lower + upper) / 2}[middle]
        out.append(nearest(column, centre, beta))
    return np.array(out), sorted(selected), None


ORACLES: dict[str, Callable[..., Result]] = {
    "brute": brute,
    "bulyan": bulyan,
    "geometric-median": geometric_median,
    "krum": krum,
    "mean": mean,
    "mean-around-median": mean_around_median,
    "median": median,
    "medoid": medoid,
    "multi-krum": multi_krum,
    "phocas": phocas,
    "trimmed-mean": trimmed_mean,
    "two-means": two_means,
}
ORACLES |= robust.PLAIN | {
    name: robust.wrapping(oracle, lambda table, x, f: aggregate(table, x, f))
    for name, oracle in robust.WRAPPING.items()
}


def aggregate(table: dict[str, Any], x: np.ndarray, f: int) -> Result:
    """What the rule described by `table` gives, in float64."""
    fields = {key: math.inf if value == "inf" else value for key, value in table.items() if key != "name"}
    return ORACLES[table["name"]](np.asarray(x, dtype=np.float64), f, **fields)
