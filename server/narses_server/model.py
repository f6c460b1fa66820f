"""The trusted state of a run: parameters, and the optimiser that moves them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from narses import flat, models
from narses.datasets import Dataset
from narses.models.compute import trial
from narses_server.config import OptimizerConfig, TaskConfig


class Optimizer:
    """SGD as the papers write it: v <- momentum v - eta(t) (aggregate + l2 w); w <- w + v.

    The learning rate multiplies before the momentum sum, so with a fading rate old steps keep the rate they were taken at.
    """

    def __init__(self, config: OptimizerConfig, dimension: int) -> None:
        self._config = config
        self._schedule = config.schedule
        self._velocity_D = torch.zeros(dimension) if config.momentum else None

    def learning_rate(self, round_: int) -> float:
        """eta(round_)."""
        return self._schedule.at(round_)

    def step(self, parameters_D: Tensor, aggregate_D: Tensor, round_: int) -> Tensor:
        """The parameters after one step against `aggregate_D` (D,), in that vector's memory; `parameters_D` stays as it is."""
        step_D = aggregate_D
        if self._config.l2:
            step_D.add_(parameters_D, alpha=self._config.l2)
        step_D.mul_(-self.learning_rate(round_))
        if self._velocity_D is not None:
            step_D.copy_(self._velocity_D.mul_(self._config.momentum).add_(step_D))
        return step_D.add_(parameters_D)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {} if self._velocity_D is None else {"velocity": self._velocity_D}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        if self._velocity_D is not None:
            self._velocity_D.copy_(tensors["velocity"])


def initial_model(task: TaskConfig, dataset: Dataset) -> nn.Module:
    """The run's model with its first parameters, from the task's seed; ConfigError if it is no model for this data."""
    module = models.make(task.model, trusted=True).build(dataset.shape, dataset.classes, task.seed)
    trial(module, dataset.train_inputs[:2], dataset.classes)
    return module


def named(parameters_D: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """The parameters (D,) as the tensors of `module`: name -> view. Only names and shapes of `module` are used."""
    names = [name for name, _ in module.named_parameters()]
    return dict(zip(names, flat.views(parameters_D, module), strict=True))


BLOCK = 1 << 20
"""Values looked at in one go: torch's own isfinite and float64 norm make copies of the whole vector."""


def norm_if_finite(vector_D: Tensor, minus_D: Tensor | None = None) -> float | None:
    """The Euclidean norm of `vector_D` (D,), or of its difference to `minus_D`, summed in float64; no copy of the vector.

    None if it holds NaN or infinity.
    """
    total = 0.0
    for number, block in enumerate(torch.split(vector_D, BLOCK)):
        wide = block.double()
        if minus_D is not None:
            wide.sub_(minus_D[number * BLOCK : (number + 1) * BLOCK])
        total += float(wide @ wide)
    return math.sqrt(total) if math.isfinite(total) else None


def subtract(matrix_ND: NDArray[np.float32], rows: Sequence[int], parameters_D: Tensor) -> None:
    """Turn the parameters in `rows` of the matrix into differences to `parameters_D`, finite whatever a worker sent."""
    start_D, limit = parameters_D.numpy(), np.finfo(np.float32).max
    for row in rows:
        with np.errstate(over="ignore"):
            np.subtract(matrix_ND[row], start_D, out=matrix_ND[row])
        np.clip(matrix_ND[row], -limit, limit, out=matrix_ND[row])


def payload(parameters_D: Tensor) -> memoryview:
    """The parameters' bytes as they travel: little-endian float32."""
    return parameters_D.numpy().view("uint8").data
