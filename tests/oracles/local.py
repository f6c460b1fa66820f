"""Local training, transcribed naively in numpy float64 for a softmax regression: what a worker does between two rounds.

Baruch et al., "A Little Is Enough" (2019), Algorithm 1, with momentum and L2 as the experiments' SGD has them.
N = samples, H = inputs, C = classes, D = C * H + C parameters, weights first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def gradient(w_D: Array, x_NH: Array, y_N: NDArray[np.int64], classes: int) -> Array:
    """Of the mean cross-entropy."""
    inputs = x_NH.shape[1]
    weight_CH, bias_C = w_D[: classes * inputs].reshape(classes, inputs), w_D[classes * inputs :]
    logits_NC = x_NH @ weight_CH.T + bias_C
    exp_NC = np.exp(logits_NC - logits_NC.max(1, keepdims=True))
    p_NC = exp_NC / exp_NC.sum(1, keepdims=True)
    p_NC[np.arange(len(y_N)), y_N] -= 1
    p_NC /= len(y_N)
    return np.concatenate([(p_NC.T @ x_NH).ravel(), p_NC.sum(0)])


def descend(
    start_D: Array,
    batches: list[tuple[Array, NDArray[np.int64]]],
    classes: int,
    eta: float,
    momentum: float = 0.0,
    l2: float = 0.0,
    velocity_D: Array | None = None,
) -> tuple[Array, Array]:
    """(p, v) after one step per batch: v <- momentum v - eta (g + l2 p); p <- p + v."""
    p_D, v_D = start_D.copy(), np.zeros_like(start_D) if velocity_D is None else velocity_D.copy()
    for x_NH, y_N in batches:
        v_D = momentum * v_D - eta * (gradient(p_D, x_NH, y_N, classes) + l2 * p_D)
        p_D = p_D + v_D
    return p_D, v_D
