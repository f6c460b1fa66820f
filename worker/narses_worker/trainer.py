"""Training as a worker does it: update (worker, round) from the round's parameters, for one daemon's logical workers.

D = parameters in the flat vector, B = samples in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from narses import datasets, flat, models, partition
from narses.errors import ConfigError, InputError
from narses.models.compute import choose_device, one_thread, trial
from narses.seeding import derive, generator
from narses.task import Task
from narses_worker.gradients import gradient_of

Poison = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
Vector = Tensor | NDArray[Any]

ALIGNMENT = 64  # bytes: of torch's own tensors and of the matrix's padded rows


class Step(NamedTuple):
    """What one update was: the batch's mean loss, the update's Euclidean norm, the batch's size."""

    loss: float
    gradient_norm: float
    samples: int


class Trainer:
    """Computes the updates of `workers`, one at a time, on one thread; call it from one thread at a time.

    On the CPU the bits of an update depend on (parameters, task.seed, worker, round) and nothing else: not on the other
    workers, on earlier calls, on the number of cores or on where the vectors lie in memory. Dropout masks too are a function
    of (task.seed, worker, round), and BatchNorm takes the batch's own statistics. On CUDA: close, not equal.
    `poison`, if any, is applied to every batch; it may be replaced between updates.
    """

    def __init__(
        self,
        task: Task,
        workers: Sequence[int],
        *,
        device: str = "auto",
        data_dir: Path | None = None,
        poison: Poison | None = None,
        allow: Collection[str] = (),
    ) -> None:
        """Build the task's model and load its data.

        allow: the import strings that the task, which came over the wire, may name.
        ConfigError: an unknown name, an import string that is not allowed, a worker the task does not have, an absent
        device, or a model that is not the server's. DataError: the data set is not on this machine.
        """
        self.task = task
        self.workers = tuple(workers)
        self.device = choose_device(device)
        self.poison = poison
        self._data = datasets.load(task.dataset, data_dir, allow=allow)
        self._shares = partition.make(task.partition, allow=allow).divide(task.seed, task.n, self._data.train_labels)
        for worker in self.workers:
            self._indices(worker, 0)
        module = models.make(task.model, allow=allow).build(self._data.shape, self._data.classes, task.seed)
        if flat.count(module) != task.dimension or flat.layout_hash(module) != task.layout:
            raise ConfigError(
                f"model {task.model} on data set {task.dataset} has {flat.count(module)} parameters here and "
                f"{task.dimension} at the server, or in another layout: run the same version of narses on both sides"
            )
        self._gradient = gradient_of(module, self.device)
        with one_thread():
            self._draws = trial(module, self._data.train_inputs[:2].to(self.device), self._data.classes)
        self._parameters_D = torch.empty(task.dimension)
        self._row_D = torch.empty(task.dimension)

    def update(self, worker: int, round_: int, parameters_D: Vector, out_D: Vector) -> Step:
        """Write the gradient of the mean loss of `worker`'s batch of round `round_` into `out_D`.

        parameters_D, out_D: (D,) float32, CPU tensors or numpy arrays; the former is only read.
        InputError: another shape or dtype, or a poisoned batch that is no batch of this data set. ConfigError: a worker
        that is not one of this trainer's.
        """
        if worker not in self.workers:
            raise ConfigError(f"worker {worker}: this trainer has the workers {', '.join(map(str, self.workers))}")
        out = self._checked("out_D", out_D)
        # Matrix kernels start differently, and so round differently, with the alignment of their operands.
        row_D = out if _aligned(out) else self._row_D
        with one_thread():
            inputs, labels_B = self.batch(worker, round_)
            seed = derive(self.task.seed, "model", worker, round_) if self._draws else None
            loss = self._gradient(self._aligned_parameters(parameters_D), inputs, labels_B, row_D, seed)
            norm = torch.linalg.vector_norm(row_D).item()
        if row_D is not out:
            out.copy_(row_D)
        return Step(loss, norm, len(labels_B))

    def batch(self, worker: int, round_: int) -> tuple[Tensor, Tensor]:
        """The batch of (worker, round), poisoned if this trainer poisons: fresh inputs (B, *shape) and labels (B,)."""
        indices_B = self._indices(worker, round_)
        inputs = self._data.train_inputs.index_select(0, indices_B)
        labels_B = self._data.train_labels.index_select(0, indices_B)
        if self.poison is None:
            return inputs, labels_B
        inputs, labels_B = self.poison(inputs, labels_B, generator(self.task.seed, "poison", worker, round_))
        expected = ((len(labels_B), *self._data.shape), (len(labels_B),), torch.float32, torch.int64)
        if len(labels_B) == 0 or (inputs.shape, labels_B.shape, inputs.dtype, labels_B.dtype) != expected:
            raise InputError(
                f"a poisoned batch must be float32 {('B', *self._data.shape)} with int64 labels ('B',), "
                f"got {inputs.dtype} {tuple(inputs.shape)} with {labels_B.dtype} {tuple(labels_B.shape)}"
            )
        return inputs.contiguous(), labels_B

    def _indices(self, worker: int, round_: int) -> Tensor:
        return self._shares.batch(worker, round_, self.task.batch)

    def _aligned_parameters(self, parameters_D: Vector) -> Tensor:
        if isinstance(parameters_D, np.ndarray) and not parameters_D.flags.writeable:
            parameters_D = parameters_D.copy()  # torch warns of a tensor over read-only memory
        vector_D = self._checked("parameters_D", parameters_D)
        return vector_D if _aligned(vector_D) else self._parameters_D.copy_(vector_D)

    def _checked(self, name: str, vector_D: Vector) -> Tensor:
        if isinstance(vector_D, np.ndarray):
            if not vector_D.flags.writeable:
                raise InputError(f"{name} is read-only")
            vector_D = torch.from_numpy(vector_D)
        if vector_D.shape != (self.task.dimension,) or vector_D.dtype != torch.float32 or vector_D.device.type != "cpu":
            got = f"{tuple(vector_D.shape)} {vector_D.dtype} on {vector_D.device.type}"
            raise InputError(f"{name}: expected ({self.task.dimension},) torch.float32 on cpu, got {got}")
        return vector_D


def _aligned(vector_D: Tensor) -> bool:
    return vector_D.is_contiguous() and vector_D.data_ptr() % ALIGNMENT == 0
