"""The aggregation rules as the papers write them: naive numpy in float64, one coordinate and one election at a time.

x is (n, D). Every oracle returns (vector, selected rows or None, scores or None); ties go to the smallest index, equally near
values to the smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

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


def bulyan(
    x: np.ndarray,
    f: int,
    inner: dict[str, Any] | str = "krum",
    theta: str = "n-2f",
    keep: str = "n-4f",
    middle: str = "lower",
    p: float = 2.0,
) -> Result:
    fields = {"neighbours": "n-f-2", "power": 2, **(inner if isinstance(inner, dict) else {})}
    size = {"n-2f": len(x) - 2 * f, "n-2f-2": len(x) - 2 * f - 2}[theta]
    beta = size - 2 * f - {"n-4f": 0, "n-4f-1": 1}[keep]
    remaining, selected = list(range(len(x))), []
    for _ in range(size):
        values = scores(x, remaining, f, p, fields["neighbours"], fields["power"])
        selected.append(remaining.pop(int(values.argmin())))
    out = []
    for column in x[selected].T:
        ordered = sorted(column)
        lower, upper = ordered[(size - 1) // 2], ordered[size // 2]
        centre = {"lower": lower, "upper": upper, "midpoint": (lower + upper) / 2}[middle]
        out.append(nearest(column, centre, beta))
    return np.array(out), sorted(selected), None


ORACLES: dict[str, Callable[..., Result]] = {
    "bulyan": bulyan,
    "krum": krum,
    "mean": mean,
    "mean-around-median": mean_around_median,
    "median": median,
    "multi-krum": multi_krum,
    "trimmed-mean": trimmed_mean,
}


def aggregate(table: dict[str, Any], x: np.ndarray, f: int) -> Result:
    """What the rule described by `table` gives, in float64."""
    fields = {key: math.inf if value == "inf" else value for key, value in table.items() if key != "name"}
    return ORACLES[table["name"]](np.asarray(x, dtype=np.float64), f, **fields)
