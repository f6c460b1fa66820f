"""The trusted state of a run: parameters, and the optimiser that moves them."""

from __future__ import annotations

import torch
from torch import Tensor

from narses import flat, models
from narses.datasets import Dataset
from narses.rpc.digest import digest
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

    def step(self, parameters_D: Tensor, aggregate_D: Tensor, round_: int) -> None:
        """Move `parameters_D` (D,) in place by one step against `aggregate_D` (D,), which is overwritten."""
        step_D = aggregate_D
        if self._config.l2:
            step_D.add_(parameters_D, alpha=self._config.l2)
        step_D.mul_(-self.learning_rate(round_))
        if self._velocity_D is not None:
            step_D = self._velocity_D.mul_(self._config.momentum).add_(step_D)
        parameters_D.add_(step_D)


def initial_parameters(task: TaskConfig, dataset: Dataset) -> tuple[Tensor, bytes]:
    """The run's first parameters (D,) and the layout hash, from the task's seed."""
    module = models.make(task.model, trusted=True).build(dataset.shape, dataset.classes, task.seed)
    return flat.flatten(module).contiguous(), flat.layout_hash(module)


def payload(parameters_D: Tensor) -> memoryview:
    """The parameters' bytes as they travel: little-endian float32."""
    return parameters_D.numpy().view("uint8").data


def parameters_digest(parameters_D: Tensor, algorithm: str) -> bytes:
    """The digest that a pull's header carries for `parameters_D`."""
    return digest(algorithm, payload(parameters_D))
