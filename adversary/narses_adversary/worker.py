"""The adversary as f corrupted workers: a cohort that trains honestly, looks at its own updates only, and lies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Executor

import structlog

from narses import datasets
from narses.observe.metrics import Metrics
from narses.rpc.status import OK, REFUSALS
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses.task import Task
from narses_adversary import attacks
from narses_adversary.config import AdversaryConfig
from narses_adversary.craft import Crafter, Forged, Row
from narses_worker.client import Pulled
from narses_worker.cohort import Cohort
from narses_worker.trainer import Step

log = structlog.get_logger("narses.adversary")


class CorruptedCohort(Cohort):
    """Logical workers in one adversary's hands. Vantage point *own*: it sees what they would have sent, nothing else."""

    def __init__(self, config: AdversaryConfig, task: Task, executor: Executor, metrics: Metrics) -> None:
        super().__init__(
            task, config.workers, executor, device=config.device, data_dir=config.data_dir, metrics=metrics
        )
        self._adversary_metrics = metrics
        self._forged: tuple[int, bytes, Forged] | None = None  # kept: a round asked for again gets the same bytes
        plan = config.plan_for(task.run_name)
        self._crafter = Crafter(task, plan, config.seed) if plan is not None else None
        self._poison = None
        if plan is not None and attacks.is_data_attack(plan.attack):
            self._poison = plan.attack.bind(datasets.load(task.dataset, config.data_dir).classes)
        name = "none" if plan is None else plan.name
        metrics.declare("attack", [name])
        metrics.info("narses_adversary_info", attack=name)
        metrics.set("narses_adversary_active", 0)
        if self._crafter is not None:
            log.info("attack", run=task.run_name, attack=name, workers=list(self.workers), knows="own")

    def _members(self, pulled: Pulled) -> tuple[int, ...]:
        if self._crafter is None:
            return ()
        return self._crafter.members(pulled.header.round, self.workers, len(self.workers))

    def compute(self, group: range, pulled: Pulled) -> list[Step]:
        """Honest gradients, on poisoned batches for the members of a data attack."""
        poisoned = self._members(pulled) if self._poison is not None else ()
        steps = []
        for index in group:
            self.trainer.poison = self._poison if self.workers[index] in poisoned else None
            steps += super().compute(range(index, index + 1), pulled)
        return steps

    async def produce(self, pulled: Pulled) -> AsyncGenerator[tuple[int, Row], None]:
        """The cohort's updates, the members' replaced."""
        metrics, members = self._adversary_metrics, self._members(pulled)
        metrics.set("narses_adversary_active", float(bool(members)))
        metrics.set("narses_adversary_colluders", len(members))
        if not members or self._poison is not None or self._crafter is None:
            async for worker, row in super().produce(pulled):
                yield worker, row
            return
        honest = {worker: row async for worker, row in super().produce(pulled)}
        header = pulled.header
        forged = self._known(header)
        if forged is None:
            loop = asyncio.get_running_loop()
            forged = await loop.run_in_executor(
                self._executor, self._crafter.craft, header, pulled.parameters_D, honest, members
            )
            if forged is not None:
                self._forged = (header.round, header.digest, forged)
                metrics.observe(
                    "narses_adversary_forge_duration_seconds", forged.seconds, attack=self._crafter.plan.name
                )
                metrics.set("narses_adversary_strength", self._crafter.strength(len(members)))
                metrics.set("narses_adversary_observed_updates", len(honest))
                metrics.set("narses_adversary_forged_distance_ratio", forged.distance_ratio)
        for worker, row in honest.items():
            yield worker, row if forged is None else forged.rows.get(worker, row)

    def settled(self, verdicts: Sequence[pb.PushResponse]) -> None:
        """Count what became of the forged updates."""
        if self._crafter is None or self._forged is None:
            return
        round_, _, forged = self._forged
        for verdict in verdicts:
            if verdict.round == round_ and verdict.worker in forged.rows:
                refusal = REFUSALS.get(verdict.reason)
                late = refusal is not None and refusal.outcome == "late"
                outcome = "accepted" if verdict.code == OK else "late" if late else "rejected"
                self._adversary_metrics.inc(
                    "narses_adversary_updates_total", attack=self._crafter.plan.name, outcome=outcome
                )

    def _known(self, header: pb.RoundHeader) -> Forged | None:
        if self._forged is not None and self._forged[:2] == (header.round, header.digest):
            return self._forged[2]
        return None
