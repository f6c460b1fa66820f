"""Distances between updates: direct differences, summed in float64 over fixed blocks of columns in fixed order.

N = updates, C = columns of one block, M = rows after row i

Never a Gram matrix and never torch.cdist: x.x - 2 x.y + y.y cancels to noise when honest updates are close together
(relative error 1e2 at a spread of 1e-4), and noise then decides which vector Krum picks. A difference is exact to
rounding, identical rows are at exactly 0, and float64 holds the square of any float32. The sum of one pair depends on
the two rows and BLOCK alone: not on the other rows, not on torch's threads, not on whether rows came one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Two float64 blocks of 51 rows stay in the L2 cache on CPU; a GPU wants few, large launches.
BLOCK = {"cpu": 2048, "cuda": 65536}

Blocks = Callable[[], Iterator[Tensor]]  # one pass over the matrix, as (N, C) blocks
Reduce = Callable[
    [Tensor, Tensor, int], None
]  # (total_M, difference_MC, i): adds one block of row i against later rows


def block_width(device: torch.device) -> int:
    """Columns per block on this device."""
    return BLOCK.get(device.type, BLOCK["cuda"])


def squared(blocks: Blocks, n: int, device: torch.device) -> Tensor:
    """||x_i - x_j||_2^2 as (N, N) float64. Beyond 1e154 a float64 input's square is inf, which sorts last."""
    return _pairs(blocks, n, device, _add_squares)


def pairwise(blocks: Blocks, n: int, device: torch.device, p: float) -> Tensor:
    """||x_i - x_j||_p as (N, N) float64 for any real p >= 1 or infinity; for p = 2 the root of `squared` is better.

    Cost O(N^2 D), and two passes over the matrix unless p is 1 or infinity.
    """
    if p == 1:
        return _pairs(blocks, n, device, _add_absolute)
    largest_NN = _pairs(blocks, n, device, _keep_largest)
    if math.isinf(p):
        return largest_NN
    # |d|^p leaves float64 for large p, so each pair is summed in units of its own largest coordinate.
    unit_NN = torch.where(largest_NN == 0, 1.0, largest_NN)

    def add_powers(total_M: Tensor, difference_MC: Tensor, i: int) -> None:
        difference_MC.abs_().div_(unit_NN[i, i + 1 :, None])
        # pow in a SIMD register and pow in the loop's tail differ in the last bit: row by row, and the roots one by one,
        # the result of a pair does not depend on its place in the matrix or on how threads cut it.
        for difference_C in difference_MC:
            difference_C.pow_(p)
        total_M += difference_MC.sum(dim=1)

    total_NN = _pairs(blocks, n, device, add_powers).cpu().apply_(lambda total: total ** (1 / p)).to(device)
    return torch.where(largest_NN.isinf(), largest_NN, largest_NN * total_NN)


def to_point(blocks: Iterator[Tensor], n: int, v_D: Tensor | None, device: torch.device) -> Tensor:
    """||x_i - v||_2 as (N,) float64; v_D = None stands for the origin."""
    total_N = torch.zeros(n, dtype=torch.float64, device=device)
    start = 0
    for x_NC in blocks:
        stop = start + x_NC.shape[1]
        difference_NC = x_NC.to(torch.float64, copy=True)
        if v_D is not None:
            difference_NC -= v_D[start:stop]
        total_N += difference_NC.square_().sum(dim=1)
        start = stop
    return total_N.sqrt_()


def _pairs(blocks: Blocks, n: int, device: torch.device, reduce: Reduce) -> Tensor:
    total_NN = torch.zeros((n, n), dtype=torch.float64, device=device)
    scratch = torch.empty(0, dtype=torch.float64, device=device)
    for x_NC in blocks():
        c = x_NC.shape[1]
        if not len(scratch):  # the first block is the widest
            scratch = torch.empty(2 * n * c, dtype=torch.float64, device=device)
        wide_NC = scratch[: n * c].view(n, c).copy_(x_NC)
        for i in range(n - 1):
            m = n - 1 - i
            difference_MC = scratch[n * c : (n + m) * c].view(m, c)
            torch.sub(wide_NC[i + 1 :], wide_NC[i], out=difference_MC)
            reduce(total_NN[i, i + 1 :], difference_MC, i)
    return total_NN + total_NN.T


def _add_squares(total_M: Tensor, difference_MC: Tensor, i: int) -> None:
    total_M += difference_MC.square_().sum(dim=1)


def _add_absolute(total_M: Tensor, difference_MC: Tensor, i: int) -> None:
    total_M += difference_MC.abs_().sum(dim=1)


def _keep_largest(total_M: Tensor, difference_MC: Tensor, i: int) -> None:
    torch.maximum(total_M, difference_MC.abs_().amax(dim=1), out=total_M)
