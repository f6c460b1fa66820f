"""A module's parameters as one float32 vector (D,): the form in which they travel, are aggregated and are stored.

The order is `module.named_parameters()`, each parameter in row-major order whatever its memory format; tied parameters
appear once and buffers never do. D = parameters in the flat vector.
"""

from __future__ import annotations

import hashlib
import json

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


def views(row_D: Tensor, module: nn.Module) -> list[Tensor]:
    """One view into `row_D` per parameter of `module`, shaped like it: what is written to a view lands in the row.

    row_D: (D,) with stride 1, e.g. a row of the (n, D) matrix. InputError if its shape or stride is another.
    """
    sizes = [parameter.numel() for parameter in module.parameters()]
    if row_D.shape != (sum(sizes),) or row_D.stride() != (1,):
        raise InputError(
            f"expected one vector of {sum(sizes)} values with stride 1 for this model, "
            f"got shape {tuple(row_D.shape)} with strides {row_D.stride()}"
        )
    parts = torch.split(row_D, sizes)
    return [part.view(parameter.shape) for part, parameter in zip(parts, module.parameters(), strict=True)]


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
