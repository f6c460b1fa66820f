"""A trusted batch whose loss is a formula: F(w) = |w - c|^2 / (2 D), c_j = cos(j); in numpy float64 and for rules."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from narses.rules import Context

RATE = 0.1


def start(d: int) -> np.ndarray:
    """Where the model stands, (D,)."""
    return np.sin(np.arange(d) + 1.0)


def loss(w: np.ndarray) -> float:
    """F(w)."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(((w - np.cos(np.arange(len(w)))) ** 2).sum() / (2 * len(w)))


def gradient(w: np.ndarray) -> np.ndarray:
    """The gradient of F."""
    return (w - np.cos(np.arange(len(w)))) / len(w)


class Bowl:
    """The `TrustedBatch` of that loss."""

    def loss(self, parameters_D: Tensor) -> float:
        return loss(parameters_D.cpu().double().numpy())

    def gradient(self, parameters_D: Tensor) -> Tensor:
        return torch.from_numpy(gradient(parameters_D.cpu().double().numpy()))


def context(d: int, round_: int = 0) -> Context:
    """A round with this batch, for D = d."""
    return Context(round=round_, parameters_D=torch.from_numpy(start(d)), learning_rate=RATE, trusted=Bowl())
