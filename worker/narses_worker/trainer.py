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
from narses.seeding import derive
from narses.task import Task
from narses_worker.batched import BatchedGradient
from narses_worker.gradients import Precision, gradient_of

Poison = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
Vector = Tensor | NDArray[Any]

ALIGNMENT = 64  # bytes: of torch's own tensors and of the matrix's padded rows


class Step(NamedTuple):
    """What one update was: its batches' mean loss, the Euclidean norm of g (or of p - P), the samples it was made from."""

    loss: float
    gradient_norm: float
    samples: int


class Trainer:
    """Computes the updates of `workers`, one at a time, on one thread; call it from one thread at a time.

    On the CPU the bits of an update depend on (parameters, momentum, task.seed, worker, round) and nothing else: not on the
    other workers, on earlier calls, on the number of cores or on where the vectors lie in memory. Dropout masks too are a
    function of (task.seed, worker, round), and BatchNorm takes the batch's own statistics. On CUDA: close, not equal.
    `poison`, if any, is applied to every batch; it may be replaced between updates.
    """

    def __init__(
        self,
        task: Task,
        workers: Sequence[int],
        *,
        device: str = "auto",
        precision: Precision = "float32",
        data_dir: Path | None = None,
        poison: Poison | None = None,
        allow: Collection[str] = (),
    ) -> None:
        """Build the task's model and load its data.

        allow: the import strings that the task, which came over the wire, may name.
        ConfigError: an unknown name, an import string that is not allowed, a worker the task does not have, an absent
        device, bfloat16 without CUDA, a whole shard where workers have none, or a model that is not the server's. DataError:
        the data set is not on this machine.
        """
        self.task = task
        self.workers = tuple(workers)
        self.device = choose_device(device)
        if precision != "float32" and self.device.type != "cuda":
            raise ConfigError(
                f"precision = {precision!r} is for CUDA, and device = {device!r} computes on the CPU here: take float32"
            )
        self.poison = poison
        self._data = datasets.load(task.dataset, data_dir, allow=allow)
        self._shares = partition.make(task.partition, allow=allow).divide(task.seed, task.n, self._data.train_labels)
        for worker in self.workers:
            self._indices(worker, 0)
            self._steps(worker)
        module = models.make(task.model, allow=allow).build(self._data.shape, self._data.classes, task.seed)
        if flat.count(module) != task.dimension or flat.layout_hash(module) != task.layout:
            raise ConfigError(
                f"model {task.model} on data set {task.dataset} has {flat.count(module)} parameters here and "
                f"{task.dimension} at the server, or in another layout: run the same version of narses on both sides"
            )
        self._gradient = gradient_of(module, self.device, precision)
        with one_thread():
            self._draws = trial(module, self._data.train_inputs[:2].to(self.device), self._data.classes)
        self._together: BatchedGradient | None = None
        if self.device.type == "cuda" and task.micro_batch is None:
            self._together = BatchedGradient(module, self.device, precision)
            # One worker's batch is less work than its way to the device.
            self._near = self._data.train_inputs.to(self.device), self._data.train_labels.to(self.device)
        self._parameters_D = torch.empty(task.dimension)
        self._row_D = torch.empty(task.dimension)
        self._scratch_D = torch.empty(task.dimension)

    def update(
        self, worker: int, round_: int, parameters_D: Vector, out_D: Vector, velocity_D: Vector | None = None
    ) -> Step:
        """Write the update of `worker` for round `round_`, as Task.update defines it, into `out_D`.

        parameters_D, out_D: (D,) float32, CPU tensors or numpy arrays; the former is only read. velocity_D: likewise, the
        worker's momentum before this round, replaced by that after it; there exactly where task.local_momentum is.
        InputError: another shape or dtype, or a poisoned batch that is no batch of this data set. ConfigError: a worker
        that is not one of this trainer's.
        """
        if worker not in self.workers:
            raise ConfigError(f"worker {worker}: this trainer has the workers {', '.join(map(str, self.workers))}")
        if (velocity_D is not None) != bool(self.task.local_momentum):
            raise InputError(
                f"velocity_D is {'absent' if velocity_D is None else 'there'} with local_momentum = "
                f"{self.task.local_momentum}: it belongs to every update with momentum, and to no other"
            )
        out = self._checked("out_D", out_D)
        velocity = None if velocity_D is None else self._checked("velocity_D", velocity_D)
        # Matrix kernels start differently, and so round differently, with the alignment of their operands.
        row_D = out if _aligned(out) else self._row_D
        with one_thread():
            start_D = self._aligned_parameters(parameters_D)
            make = self._descend if self.task.update == "parameters" else self._differentiate
            step = make(worker, round_, start_D, row_D, velocity)
        if row_D is not out:
            out.copy_(row_D)
        return step

    def updates(
        self,
        workers: Sequence[int],
        round_: int,
        parameters_D: Vector,
        rows_KD: Sequence[Vector],
        velocities_KD: Sequence[Vector] | None = None,
    ) -> list[Step]:
        """The updates of `workers` for one round into their rows, as update() would write them; on CUDA all at once."""
        if self._together is not None and self.poison is None and all(self._steps(worker) == 1 for worker in workers):
            return self._at_once(self._together, workers, round_, parameters_D, rows_KD, velocities_KD)
        return [
            self.update(worker, round_, parameters_D, row_D, None if velocities_KD is None else velocities_KD[i])
            for i, (worker, row_D) in enumerate(zip(workers, rows_KD, strict=True))
        ]

    def _at_once(
        self,
        together: BatchedGradient,
        workers: Sequence[int],
        round_: int,
        parameters_D: Vector,
        rows_KD: Sequence[Vector],
        velocities_KD: Sequence[Vector] | None,
    ) -> list[Step]:
        """Gradients in one go, then each worker's step from its gradient."""
        start_D = self._aligned_parameters(parameters_D)
        indices = [self._indices(worker, round_).to(self.device) for worker in workers]
        inputs = [self._near[0].index_select(0, index_B) for index_B in indices]
        labels = [self._near[1].index_select(0, index_B) for index_B in indices]
        gradients_KD = torch.empty(len(workers), self.task.dimension, pin_memory=self.device.type == "cuda")
        seeds = [self._seed("model", worker, round_) for worker in workers] if self._draws else None
        losses = together(start_D, inputs, labels, gradients_KD, seeds)
        steps = []
        for i, (loss, gradient_D) in enumerate(zip(losses, gradients_KD, strict=True)):
            velocity_D = None if velocities_KD is None else self._checked("velocity_D", velocities_KD[i])
            norm = self._from_gradient(gradient_D, start_D, round_, velocity_D)
            self._checked("out_D", rows_KD[i]).copy_(gradient_D)
            steps.append(Step(loss, norm, len(labels[i])))
        return steps

    def _from_gradient(self, row_D: Tensor, start_D: Tensor, round_: int, velocity_D: Tensor | None) -> float:
        """Turn the gradient at start_D in `row_D` into the update of one step; the norm of g, or of p - P."""
        if self.task.local_l2:
            row_D.add_(start_D, alpha=self.task.local_l2)
        parameters = self.task.update == "parameters"
        if parameters:
            row_D.mul_(-self.task.learning_rate.at(round_))
        norm = _norm(row_D)
        if velocity_D is not None:
            row_D.copy_(velocity_D.mul_(self.task.local_momentum).add_(row_D))
        if parameters:
            norm = _norm(row_D)
            row_D.add_(start_D)
        return norm

    def _differentiate(
        self, worker: int, round_: int, start_D: Tensor, row_D: Tensor, velocity_D: Tensor | None
    ) -> Step:
        """row_D = g, or with momentum m <- momentum m + g."""
        loss, samples = self._mean_gradient(worker, round_, 0, start_D, row_D)
        norm = _norm(row_D)
        if velocity_D is not None:
            row_D.copy_(velocity_D.mul_(self.task.local_momentum).add_(row_D))
        return Step(loss, norm, samples)

    def _descend(self, worker: int, round_: int, start_D: Tensor, row_D: Tensor, velocity_D: Tensor | None) -> Step:
        """row_D = p after v <- momentum v - eta (g + l2 p); p <- p + v, local_steps times from p = start_D."""
        step_D, steps, rate = self._scratch_D, self._steps(worker), self.task.learning_rate.at(round_)
        row_D.copy_(start_D)
        losses, samples = 0.0, 0
        for k in range(steps):
            loss, size = self._mean_gradient(worker, round_, k, row_D, step_D)
            losses, samples = losses + loss, samples + size
            step_D.mul_(-rate)
            if velocity_D is not None:
                step_D.copy_(velocity_D.mul_(self.task.local_momentum).add_(step_D))
            row_D.add_(step_D)
        return Step(losses / steps, _norm(row_D - start_D), samples)

    def _mean_gradient(
        self, worker: int, round_: int, k: int, parameters_D: Tensor, out_D: Tensor
    ) -> tuple[float, int]:
        """The gradient at `parameters_D` of the mean loss of the round's batch number k, with L2: (mean loss, samples)."""
        inputs, labels_B = self.batch(worker, round_, k)
        size = len(labels_B)
        pieces = range(0, size, self.task.micro_batch or size)
        mean = 0.0
        for number, at in enumerate(pieces):
            part = slice(at, at + pieces.step)
            target_D = torch.empty_like(out_D) if number else out_D
            seed = self._seed("model", worker, round_, k, number) if self._draws else None
            loss = self._gradient(parameters_D, inputs[part], labels_B[part], target_D, seed)
            if len(pieces) > 1:
                weight = len(labels_B[part]) / size
                loss *= weight
                out_D.mul_(weight) if not number else out_D.add_(target_D, alpha=weight)
            mean += loss
        if self.task.local_l2:
            out_D.add_(parameters_D, alpha=self.task.local_l2)
        return mean, size

    def batch(self, worker: int, round_: int, k: int = 0) -> tuple[Tensor, Tensor]:
        """Batch number k of (worker, round), poisoned if this trainer poisons: fresh inputs (B, *shape), labels (B,)."""
        indices_B = self._indices(worker, round_ * self._steps(worker) + k)
        inputs = self._data.train_inputs.index_select(0, indices_B)
        labels_B = self._data.train_labels.index_select(0, indices_B)
        if self.poison is None:
            return inputs, labels_B
        draws = torch.Generator().manual_seed(self._seed("poison", worker, round_, k))
        inputs, labels_B = self.poison(inputs, labels_B, draws)
        expected = ((len(labels_B), *self._data.shape), (len(labels_B),), torch.float32, torch.int64)
        if len(labels_B) == 0 or (inputs.shape, labels_B.shape, inputs.dtype, labels_B.dtype) != expected:
            raise InputError(
                f"a poisoned batch must be float32 {('B', *self._data.shape)} with int64 labels ('B',), "
                f"got {inputs.dtype} {tuple(inputs.shape)} with {labels_B.dtype} {tuple(labels_B.shape)}"
            )
        return inputs.contiguous(), labels_B

    def _indices(self, worker: int, step: int) -> Tensor:
        size = self.task.batch
        return self._shares.batch(worker, step, self._share(worker) if size == "shard" else size)

    def _steps(self, worker: int) -> int:
        """Local steps of `worker` in each round."""
        steps, batch = self.task.local_steps, self.task.batch
        if steps != "pass":
            return steps
        share = self._share(worker)
        return 1 if batch == "shard" else -(-share // batch)

    def _share(self, worker: int) -> int:
        """Samples of the worker's own; ConfigError where the partition knows none."""
        share: Callable[[int], int] | None = getattr(self._shares, "share", None)
        if share is None:
            raise ConfigError(
                f"partition {self.task.partition}: its division has no share(worker), so there is no whole shard and no pass "
                f"over it; take a number for batch and local_steps"
            )
        return share(worker)

    def _seed(self, what: str, worker: int, round_: int, *more: int) -> int:
        """Of a stream of (worker, round); the first batch's first piece has no further keys."""
        return derive(self.task.seed, what, worker, round_, *(more if any(more) else ()))

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


def _norm(vector_D: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector_D))
