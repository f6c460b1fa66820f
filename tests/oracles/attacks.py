"""The attacks as their papers print them, transcribed naively in numpy float64. H = updates seen, D = parameters."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def z_max(n: int, m: int, ratio: str) -> float:
    """max {z : Phi(z) < share}, ALIE Algorithm 3 line 3, by bisection on the error function instead of a z-table."""
    s = math.floor(n / 2 + 1) - m
    share = (n - s) / n if ratio == "n" else (n - m - s) / (n - m)
    low, high = -40.0, 40.0
    for _ in range(200):
        z = (low + high) / 2
        if math.erfc(-z / math.sqrt(2)) / 2 < share:
            low = z
        else:
            high = z
    return low


def alie(x_HD: Array, corrupted: list[int], z: float, ddof: int, sign: int) -> Array:
    """Algorithm 3 lines 4-6: coordinate by coordinate, mean and deviation of the corrupted rows."""
    forged = np.empty(x_HD.shape[1])
    for j in range(x_HD.shape[1]):
        values = [float(x_HD[i, j]) for i in corrupted]
        mean = math.fsum(values) / len(values)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - ddof))
        forged[j] = mean + sign * z * std
    return forged


def ipm(x_HD: Array, remaining: list[int], epsilon: float) -> Array:
    """u = -(epsilon / |V|) * sum of the remaining correct gradients V, sections 6.2 and 6.3."""
    total = np.zeros(x_HD.shape[1])
    for i in remaining:
        total = total + x_HD[i]
    return -epsilon / len(remaining) * total


def sign_flip(x_HD: Array, row: int, scale: float) -> Array:
    """Minus the worker's own update."""
    return -scale * x_HD[row]


def label_flip(labels: list[int], classes: int) -> list[int]:
    """y -> C - 1 - y."""
    return [classes - 1 - y for y in labels]
