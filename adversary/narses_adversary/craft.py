"""From what was seen of a round to the updates that replace the members': the one place where an attack is called."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from narses import rules, seeding
from narses.errors import ConfigError, NarsesError
from narses.rpc.convert import table_from_wire
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses.task import Task
from narses_adversary import attacks
from narses_adversary.plan import Plan
from narses_adversary.view import View

log = structlog.get_logger("narses.adversary")

Row = NDArray[np.float32]


class Forged(NamedTuple):
    """rows: per member, fresh memory. seconds: what crafting took. distance_ratio: see the metric of that name."""

    rows: dict[int, Row]
    seconds: float
    distance_ratio: float
    estimate: bool


class Crafter:
    """One run's attack and its memory. craft() is pure tensor work for an executor thread, one call at a time."""

    def __init__(self, task: Task, plan: Plan, seed: int) -> None:
        self.task = task
        self.plan = plan
        self._seed = seed
        self._memory: dict[str, Any] = {}
        self._rule: tuple[str, rules.Rule | None] = ("", None)

    def members(self, round_: int, candidates: Sequence[int], f: int) -> tuple[int, ...]:
        """Who attacks in round `round_`; nobody while the plan is not active."""
        return self.plan.members_of(round_, candidates, f, self._seed) if self.plan.active(round_) else ()

    def craft(
        self, header: pb.RoundHeader, parameters_D: Row | None, seen: Mapping[int, Row], members: Sequence[int]
    ) -> Forged | None:
        """The members' replacements, or None (said in the log) if the attack cannot make any from what was seen."""
        begun = time.perf_counter()
        finite = {worker: row for worker, row in sorted(seen.items()) if np.isfinite(row).all()}
        view_D = np.zeros(self.task.dimension, np.float32) if parameters_D is None else parameters_D
        stacked_HD = (
            torch.from_numpy(np.stack(list(finite.values()))) if finite else torch.empty(0, self.task.dimension)
        )
        try:
            view = View(
                updates_HD=stacked_HD,
                worker_ids=tuple(finite),
                parameters_D=torch.from_numpy(view_D),
                n=header.n,
                f=header.f,
                round=header.round,
                rule=self._rule_of(header.rule),
                learning_rate=self.task.learning_rate.at(header.round),
                generator=seeding.generator(self._seed, "attack", self.task.run_name, header.round),
                members=tuple(members),
                kind=self.task.update,
                task=self.task,
                memory=self._memory,
            )
            forged_MD = self.plan.attack(view, len(members))
        except NarsesError as error:
            log.warning(
                "attack impossible", run=self.task.run_name, round=header.round, attack=self.plan.name, why=str(error)
            )
            return None
        rows = {worker: row.numpy() for worker, row in zip(members, forged_MD, strict=True)}
        ratio = _distance_ratio(stacked_HD, forged_MD)
        return Forged(rows, time.perf_counter() - begun, ratio, bool(self._memory.get("estimate", False)))

    def strength(self, m: int) -> float:
        """The attack's factor when m workers attack, 0 where it has none."""
        value = attacks.strength(self.plan.attack, n=self.task.n, m=m)
        return 0.0 if value is None else value

    def _rule_of(self, table: str) -> rules.Rule | None:
        if self._rule[0] != table:
            try:
                self._rule = (table, rules.make(table_from_wire(table, "rule"), trusted=False))
            except ConfigError as error:
                log.info("the server's rule is not known here", why=str(error))
                self._rule = (table, None)
        return self._rule[1]


def _distance_ratio(seen_HD: torch.Tensor, forged_MD: torch.Tensor) -> float:
    """||forged - mean(seen)|| over the median of ||seen - mean(seen)||; 0 where fewer than two rows were seen."""
    if len(seen_HD) < 2 or not len(forged_MD):
        return 0.0
    mean_D = seen_HD.mean(dim=0)
    usual = torch.linalg.vector_norm(seen_HD - mean_D, dim=1).median().item()
    forged = torch.linalg.vector_norm(forged_MD[0] - mean_D).item()
    return forged / usual if usual > 0 else 0.0
