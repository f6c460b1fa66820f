"""The trusted state of a run, and what happens to it when a round closes: rule, step, encoding, checkpoint.

Every method that takes or returns tensors runs in the executor, one at a time; the coordinator calls them between rounds.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from narses import flat, rules
from narses.errors import CheckpointError, ConfigError, InputError
from narses.rpc.convert import table_to_wire
from narses.rules import Context
from narses.task import Task
from narses.updates import Updates
from narses_server.checkpoint import Checkpoint, Checkpoints, config_hash
from narses_server.config import CheckpointConfig, RunConfig
from narses_server.model import Optimizer, norm_if_finite, payload
from narses_server.published import Published
from narses_server.watch import Watch


class Closed(NamedTuple):
    """What closing a round produced."""

    published: Published | None  # None: the step made the parameters non-finite
    selected: tuple[int, ...] | None  # worker ids used whole by the rule
    norm: float
    seconds: dict[str, float]  # phase -> seconds


class Extra(NamedTuple):
    """What a checkpoint keeps beside the state: of the scoreboard."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class State:
    """Parameters, optimiser, rule. `parameters_D` is replaced at every step, never changed: an evaluation may be reading it."""

    def __init__(
        self,
        config: RunConfig,
        module: nn.Module,
        watch: Watch,
        *,
        output: Path | None = None,
        checkpoint: CheckpointConfig | None = None,
    ) -> None:
        """A fresh state with the parameters of `module`, or, with checkpoint, the one an earlier process got to."""
        self.parameters_D = flat.flatten(module).contiguous()
        self.rule = config.round.built_rule
        self.rule_table = table_to_wire(rules.rule_table(self.rule))
        self.durable_round: int | None = None
        self.resumed: Checkpoint | None = None
        self._optimizer = Optimizer(config.optimizer, len(self.parameters_D))
        self._rule_state: object | None = None
        self._watch = watch
        self._checkpoints: Checkpoints | None = None
        if checkpoint is not None and output is not None:
            self._every = checkpoint.every
            folder = output / config.name / "checkpoints"
            self._checkpoints = Checkpoints(folder, config_hash(config.model_dump(mode="json")), checkpoint.keep)
            self.resumed = self._checkpoints.newest()
        self.run_id = secrets.token_bytes(16)
        if self.resumed is not None:
            self._restore(self.resumed)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.run_id = bytes.fromhex(checkpoint.facts["run_id"])
        self.durable_round = checkpoint.rounds - 1 if checkpoint.rounds else None
        self.parameters_D = checkpoint.tensors["parameters"]
        self._optimizer.restore(checkpoint.tensors)

    def learning_rate(self, round_: int) -> float:
        """eta(round_)."""
        return self._optimizer.learning_rate(round_)

    def encode(self, task: Task, round_: int) -> Published:
        """The current parameters as round `round_` publishes them."""
        return Published.of(round_, payload(self.parameters_D), task.digest, task.chunk_bytes)

    def close(
        self, task: Task, index: int, matrix_ND: NDArray[np.float32], rows: tuple[int, ...], f: int, extra: Extra
    ) -> Closed:
        """Aggregate the updates of workers `rows` (rows of the matrix), step, encode, make it durable if that is due."""
        clock = [time.perf_counter()]
        every = None if len(rows) == len(matrix_ND) else list(rows)
        updates = Updates.of(torch.from_numpy(matrix_ND), rows=every, finite=True)
        context = Context(
            round=index,
            parameters_D=self.parameters_D,
            learning_rate=self.learning_rate(index),
            state=self._rule_state,
            trusted=None,
        )
        aggregation = self.rule(updates, f, context)
        self._rule_state = aggregation.state
        selected = None if aggregation.selected is None else tuple(rows[i] for i in aggregation.selected.tolist())
        norm = norm_if_finite(aggregation.vector_D)
        if norm is None:
            raise InputError(
                f"rule {self.rule_table} returned NaN or infinity for finite updates: the rule is at fault"
            )
        clock.append(time.perf_counter())
        newer_D = self._optimizer.step(self.parameters_D, aggregation.vector_D, index)
        finite = norm_if_finite(newer_D) is not None
        if finite:
            self.parameters_D = newer_D
        clock.append(time.perf_counter())
        published = self.encode(task, index + 1) if finite else None
        clock.append(time.perf_counter())
        # Before the parameters are first sent: from then on the round is acknowledged.
        if finite and self._due(index + 1, task.rounds):
            self.save(index + 1, extra)
        clock.append(time.perf_counter())
        phases = ("aggregate", "apply", "publish", "checkpoint")
        seconds = {phase: b - a for phase, a, b in zip(phases, clock, clock[1:], strict=False)}
        return Closed(published, selected, norm, seconds)

    def _due(self, rounds: int, last: int) -> bool:
        return self._checkpoints is not None and (rounds == last or rounds % self._every == 0)

    def save(self, rounds: int, extra: Extra) -> None:
        """Make the state after `rounds` rounds durable, where checkpoints are kept; CheckpointError if the disk refuses."""
        if self._checkpoints is None or self.durable_round == rounds - 1:
            return
        if self._rule_state is not None:
            raise ConfigError(
                f"rule {self.rule_table} keeps a state from round to round, which checkpoints of this version do not hold; "
                f"remove [checkpoint] or choose a rule without one"
            )
        begun = time.perf_counter()
        tensors: Mapping[str, Tensor] = {"parameters": self.parameters_D, **self._optimizer.tensors(), **extra.tensors}
        try:
            size = self._checkpoints.save(rounds, tensors, {"run_id": self.run_id.hex(), **extra.facts})
        except CheckpointError:
            self._watch.checkpoint_failed()
            raise
        self.durable_round = rounds - 1
        self._watch.checkpointed(rounds, size, time.perf_counter() - begun)
