"""What several rules do to rows: weigh them, shorten them, or hold them against a vector.

N = updates, K = rows in use, D = parameters, C = columns of one block
"""

from __future__ import annotations

import torch
from torch import Tensor

from narses.combine import Mean
from narses.models.compute import one_thread
from narses.updates import Updates

_BLOCK = 16384  # columns of one block of float64 products


def weighted_mean(updates: Updates, weights_N: Tensor) -> Tensor:
    """sum_i w_i x_i / sum_i w_i as (D,), for weights >= 0 of which one is positive.

    Where all positive weights are equal it is the mean of those rows, to the last bit.
    """
    rows_K = weights_N.nonzero().squeeze(1)
    weights_K = weights_N[rows_K]
    if bool((weights_K == weights_K[0]).all()):
        return updates.per_coordinate(Mean(), rows=rows_K)
    return updates.weighted_sum((weights_N / weights_N.sum()).unsqueeze(0))[0]


def shortening(norms_N: Tensor, limit: float) -> Tensor:
    """The factors min(1, limit / norm) that bring vectors of these lengths to `limit` at most, as (N,) float64 on the CPU.

    A row whose length float64 cannot hold (over 1e154) gets the factor 0, unless the limit cannot be held either.
    """
    norms_N = norms_N.cpu()
    return torch.where(norms_N <= limit, 1.0, limit / norms_N)


def scaled(updates: Updates, factors_N: Tensor) -> Updates:
    """The rows times their factors (0 to 1), in (N, D) of fresh memory; `updates` itself where every factor is 1."""
    rows = (factors_N != 1).nonzero().squeeze(1).tolist()
    if not rows:
        return updates
    x_ND = updates.columns(torch.arange(updates.dimension))
    with one_thread():  # rows are too short to be worth waking torch's threads for each
        for i in rows:
            x_ND[i] = x_ND[i].double().mul_(float(factors_N[i]))
    return Updates.of(x_ND, finite=True)


def inner_products(updates: Updates, v_D: Tensor) -> Tensor:
    """<x_i, v> as (N,) float64 on the CPU, summed directly.

    Never from squared lengths: ||x||^2 + ||v||^2 - ||x - v||^2 is noise where one of them is far longer than the other.
    """
    v_D = v_D.to(updates.device, torch.float64)
    total_N = torch.zeros(len(updates), dtype=torch.float64, device=updates.device)
    with one_thread():
        for columns_C in torch.split(torch.arange(updates.dimension), _BLOCK):
            x_NC = updates.columns(columns_C).double()
            total_N += x_NC.mul_(v_D[columns_C.to(v_D.device)]).sum(dim=1)
    return total_N.cpu()
