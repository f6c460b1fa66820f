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
from narses_worker.gradients import Precision
from narses_worker.momentum import Momentum
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
    again: the same rows are sent. Where workers have momentum, that of the next round is on disk before a round's last
    update is sent: the server may make the round durable from then on.
    """

    def __init__(
        self,
        task: Task,
        workers: Sequence[int],
        executor: Executor,
        *,
        device: str = "auto",
        precision: Precision = "float32",
        data_dir: Path | None = None,
        metrics: Metrics | None = None,
        allow: Collection[str] = (),
        state_dir: Path | None = None,
        rows_KD: Sequence[NDArray[np.float32]] | None = None,
        group: int | None = None,
        before: Cohort | None = None,
    ) -> None:
        """state_dir: where momentum is kept. rows_KD: one row (D,) per worker to write updates into; absent: its own.

        group: updates computed in one go; absent: GROUP_BYTES of them.
        before: the cohort that an earlier session of this daemon had, if any: in the same run its momentum goes on.
        """
        self.task = task
        self.workers = tuple(workers)
        self.trainer = Trainer(task, self.workers, device=device, precision=precision, data_dir=data_dir, allow=allow)
        if rows_KD is None:
            rows_KD = list(aligned_rows(len(self.workers), task.dimension))
        self.rows_KD = rows_KD
        self._momentum: Momentum | None = None
        if task.local_momentum:
            again = before is not None and before.task == task
            kept = before._momentum if before is not None and again else None
            self._momentum = kept or Momentum(task.run_id, self.workers, task.dimension, state_dir)
        self._velocity_KD: NDArray[np.float32] | None = None
        self._group = group or max(1, GROUP_BYTES // (4 * task.dimension))
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
            job = loop.run_in_executor(self._executor, self._first, groups[0], pulled)
            try:
                for group, following in zip(groups, [*groups[1:], None], strict=True):
                    steps += await asyncio.shield(job)  # a cancelled future would not be waited for below
                    if following is not None:
                        job = loop.run_in_executor(self._executor, self.compute, following, pulled)
                    elif self._momentum is not None:
                        job = loop.run_in_executor(self._executor, self._keep, pulled.header.round)
                        steps += await asyncio.shield(job)
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

    def _first(self, group: range, pulled: Pulled) -> list[Step]:
        """compute() for a round's first group."""
        if self._momentum is not None:
            header = pulled.header
            durable = header.durable_round if header.HasField("durable_round") else None
            self._velocity_KD = self._momentum.before(header.round, durable)
        return self.compute(group, pulled)

    def compute(self, group: range, pulled: Pulled) -> list[Step]:
        """Fill the rows of workers[group]; in an executor thread. What a dishonest cohort overrides."""
        part = slice(group.start, group.stop)
        velocities = None if self._velocity_KD is None else list(self._velocity_KD[part])
        return self.trainer.updates(
            self.workers[part], pulled.header.round, pulled.parameters_D, self.rows_KD[part], velocities
        )

    def _keep(self, round_: int) -> list[Step]:
        """After a round's last group: a job like the others, without steps of its own."""
        assert self._momentum is not None
        assert self._velocity_KD is not None
        self._momentum.after(round_, self._velocity_KD)
        return []

    def settled(self, verdicts: Sequence[pb.PushResponse]) -> None:
        """Nothing: an honest cohort does not care."""

    def _observe(self, steps: list[Step]) -> None:
        if self._metrics is not None:
            self._metrics.set("narses_worker_train_loss", sum(s.loss for s in steps) / len(steps))
            self._metrics.set("narses_worker_gradient_norm", sum(s.gradient_norm for s in steps) / len(steps))
            self._metrics.inc("narses_worker_samples_total", sum(s.samples for s in steps))
