"""A module's parameters as one float32 vector (D,): the form in which they travel, are aggregated and are stored.

The order is `module.named_parameters()`, each parameter in row-major order whatever its memory format; tied parameters
appear once and buffers never do. D = parameters in the flat vector.
"""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from narses.errors import ConfigError, InputError

ROW_ALIGNMENT = 64  # bytes: a cache line, and the width of an AVX-512 register


def count(module: nn.Module) -> int:
    """D, the number of parameters of `module`; ConfigError if one of them is not float32 or is not trained."""
    total = 0
    for name, parameter in module.named_parameters():
        if parameter.dtype != torch.float32:
            raise ConfigError(f"parameter {name} is {parameter.dtype}: a model must hold its parameters in float32")
        if not parameter.requires_grad:
            raise ConfigError(f"parameter {name} is frozen: what is not trained must be a buffer")
        total += parameter.numel()
    return total


def flatten(module: nn.Module) -> Tensor:
    """The parameters of `module` as a fresh (D,) float32 CPU vector."""
    vector_D = torch.empty(count(module))
    with torch.no_grad():
        for view, parameter in zip(views(vector_D, module), module.parameters(), strict=True):
            view.copy_(parameter)
    return vector_D


def write(vector_D: Tensor, module: nn.Module) -> None:
    """Copy a (D,) vector into the parameters of `module`, on any device; InputError if it has another shape."""
    with torch.no_grad():
        for view, parameter in zip(views(vector_D, module), module.parameters(), strict=True):
            parameter.copy_(view)


class Layout:
    """Where each parameter of a module lies in the flat vector, worked out once: for what is done at every update.

    dimension: D; shapes: of the parameters, in order.
    """

    def __init__(self, module: nn.Module) -> None:
        self.shapes = [parameter.shape for parameter in module.parameters()]
        self._places: list[tuple[torch.Size, list[int], int]] = []  # (shape, row-major strides, first value)
        self.dimension = 0
        for shape in self.shapes:
            strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
            self._places.append((shape, strides, self.dimension))
            self.dimension += shape.numel()

    def views(self, row_D: Tensor) -> list[Tensor]:
        """One view into `row_D` per parameter, shaped like it: what is written to a view lands in the row.

        row_D: (D,) with stride 1, e.g. a row of the (n, D) matrix. InputError if its shape or stride is another.
        """
        if row_D.shape != (self.dimension,) or row_D.stride() != (1,):
            raise InputError(
                f"expected one vector of {self.dimension} values with stride 1 for this model, "
                f"got shape {tuple(row_D.shape)} with strides {row_D.stride()}"
            )
        start = row_D.storage_offset()
        return [row_D.as_strided(shape, strides, start + first) for shape, strides, first in self._places]


def views(row_D: Tensor, module: nn.Module) -> list[Tensor]:
    """`Layout(module).views(row_D)`, for what is done once."""
    return Layout(module).views(row_D)


def layout_hash(module: nn.Module) -> bytes:
    """32 bytes, SHA-256 over the names and shapes in order: equal where a (D,) vector means the same parameters."""
    layout = [[name, list(parameter.shape)] for name, parameter in module.named_parameters()]
    return hashlib.sha256(json.dumps(layout, separators=(",", ":")).encode()).digest()


def aligned_rows(count: int, dimension: int) -> NDArray[np.float32]:
    """A fresh (count, dimension) float32 matrix, zero, every row starting at a multiple of 64 bytes (a cache line).

    It is touched here: the kernel hands out pages at first touch, at a quarter of the speed at which updates arrive.
    """
    stride = -(-dimension * 4 // ROW_ALIGNMENT) * ROW_ALIGNMENT
    raw = np.empty(count * stride + ROW_ALIGNMENT, np.uint8)
    raw.fill(0)
    start = -raw.ctypes.data % ROW_ALIGNMENT
    return raw[start : start + count * stride].view(np.float32).reshape(count, stride // 4)[:, :dimension]
