"""A daemon's logical workers in one run: their rows, and the order in which they are computed and sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from narses.flat import aligned_rows
from narses.observe.metrics import Metrics
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses.task import Task
from narses_worker.client import Pulled
from narses_worker.trainer import Step, Trainer

GROUP_BYTES = 8 << 20
"""Updates of this size together are computed in one go.

While one thread computes and another sends, every tensor operation fights for the interpreter: with groups of 256 KiB, 17
updates of 318 KB cost half as much again.
"""


class Producer(Protocol):
    """What the daemon pushes: for each round, (worker, row) pairs as they become ready."""

    def produce(self, pulled: Pulled) -> AsyncGenerator[tuple[int, NDArray[np.float32]], None]: ...

    def settled(self, verdicts: Sequence[pb.PushResponse]) -> None:
        """The server's verdicts on what was produced."""


Make = Callable[[Task], Producer]


class Cohort:
    """Honest logical workers. Built in an executor thread (it loads data); each worker has one padded row, reused every round.

    Computing (worker i + 1) overlaps sending (worker i). A round asked for again, after a broken connection, is not computed
    again: the same rows are sent.
    """

    def __init__(
        self,
        task: Task,
        workers: Sequence[int],
        executor: Executor,
        *,
        device: str = "auto",
        data_dir: Path | None = None,
        metrics: Metrics | None = None,
        allow: Collection[str] = (),
    ) -> None:
        self.task = task
        self.workers = tuple(workers)
        self.trainer = Trainer(task, self.workers, device=device, data_dir=data_dir, allow=allow)
        self.rows_KD: NDArray[np.float32] = aligned_rows(len(self.workers), task.dimension)
        self._group = max(1, GROUP_BYTES // self.rows_KD.strides[0])
        self._executor = executor
        self._metrics = metrics
        self._done: tuple[int, bytes] | None = None  # (round, base) whose rows are complete

    async def produce(self, pulled: Pulled) -> AsyncGenerator[tuple[int, NDArray[np.float32]], None]:
        """Yield every worker's update of the pulled round; the row stays valid until the next round is produced."""
        key = (pulled.header.round, pulled.header.digest)
        if self._done != key:
            self._done = None
            loop = asyncio.get_running_loop()
            groups = [
                range(at, min(at + self._group, len(self.workers))) for at in range(0, len(self.workers), self._group)
            ]
            steps: list[Step] = []
            job = loop.run_in_executor(self._executor, self.compute, groups[0], pulled)
            try:
                for group, following in zip(groups, [*groups[1:], None], strict=True):
                    steps += await asyncio.shield(job)  # a cancelled future would not be waited for below
                    if following is not None:
                        job = loop.run_in_executor(self._executor, self.compute, following, pulled)
                    for index in group:
                        yield self.workers[index], self.rows_KD[index]
            finally:
                # An abandoned round must not leave a thread writing into rows that the next one fills.
                await asyncio.wait((job,))
            self._done = key
            self._observe(steps)
        else:
            for worker, row_D in zip(self.workers, self.rows_KD, strict=True):
                yield worker, row_D

    def compute(self, group: range, pulled: Pulled) -> list[Step]:
        """Fill the rows of workers[group]; in an executor thread. What a dishonest cohort overrides."""
        return [
            self.trainer.update(self.workers[i], pulled.header.round, pulled.parameters_D, self.rows_KD[i])
            for i in group
        ]

    def settled(self, verdicts: Sequence[pb.PushResponse]) -> None:
        """Nothing: an honest cohort does not care."""

    def _observe(self, steps: list[Step]) -> None:
        if self._metrics is not None:
            self._metrics.set("narses_worker_train_loss", sum(s.loss for s in steps) / len(steps))
            self._metrics.set("narses_worker_gradient_norm", sum(s.gradient_norm for s in steps) / len(steps))
            self._metrics.inc("narses_worker_samples_total", sum(s.samples for s in steps))
